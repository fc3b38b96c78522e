"""digits-parity: is a handwritten digit even? Built from scikit-learn's bundled digits, so it needs no data of the user's."""

from pathlib import Path

import numpy as np

from discover_jax.tasks.competition import Competition
from discover_jax.tasks.metrics import ACCURACY

_TRAIN_ROWS = 600
_SPLIT_SEED = 0

_DESCRIPTION = """\
Each row is a small grey-scale picture of one handwritten digit, 8 by 8 pixels. Column `pixel_R_C` is the darkness of the pixel in row R and
column C, an integer from 0 to 16; both are counted from 0 at the top left. The target `even` is True if the digit is 0, 2, 4, 6 or 8 and
False if it is odd. Which of the ten digits it is stays hidden: of the training rows, too, only the parity is known.
There are no missing values. `id` only names a row and tells nothing about the digit."""


def _prepare(raw: Path | None, public: Path, private: Path) -> None:
    """The 1,797 digits in a fixed random order: 600 to learn from, 1,197 to predict."""
    import pandas as pd
    from sklearn.datasets import load_digits

    del raw
    pixels_RC, digits_R = load_digits(return_X_y=True)
    columns = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]
    # RandomState's stream is frozen by numpy's policy, so this split is the same everywhere.
    order_R = np.random.RandomState(_SPLIT_SEED).permutation(len(digits_R))
    table = pd.DataFrame(pixels_RC[order_R].astype(int), columns=columns)
    table.insert(0, "id", [f"d{number:04d}" for number in range(1, len(table) + 1)])
    table["even"] = digits_R[order_R] % 2 == 0
    train, test = table[:_TRAIN_ROWS], table[_TRAIN_ROWS:]
    train.to_csv(public / "train.csv", index=False, lineterminator="\n")
    test.drop(columns="even").to_csv(public / "test.csv", index=False, lineterminator="\n")
    test.loc[:, ["id", "even"]].assign(even=False).to_csv(public / "sample_submission.csv", index=False, lineterminator="\n")
    test.to_csv(private / "test.csv", index=False, lineterminator="\n")


COMPETITION = Competition(
    id="digits-parity",
    description=_DESCRIPTION,
    id_column="id",
    target="even",
    metric=ACCURACY,
    prepare=_prepare,
    prepared_md5={
        "public/train.csv": "7283a9a120309fd7930ae4ccedf80471",
        "public/test.csv": "d7e3e5f791d9977cfe70e89b00935053",
        "public/sample_submission.csv": "87c6f02a81d89ecaf0d8fbbd470c1619",
        "private/test.csv": "b92f1b664d4ebf79f189b0973422eeb1",
    },
    sample_score=0.50459,
)
