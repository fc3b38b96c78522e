"""diabetes: how far has the disease come after a year? Built from scikit-learn's bundled table, so it needs no data of the user's."""

from pathlib import Path

import numpy as np
import pandas as pd

from discover_jax.tasks.competition import Competition
from discover_jax.tasks.metrics import RMSE

_TRAIN_ROWS = 242
_SPLIT_SEED = 0

_DESCRIPTION = """\
Each row is a patient with diabetes: age in years, sex (1 or 2), body mass index, mean blood pressure, and six measurements of blood serum,
s1 to s6 (total cholesterol, low-density and high-density lipoproteins, total cholesterol / HDL, logarithm of triglycerides, blood sugar).
The target `progression` is a measure of how far the disease has come one year later, from 25 to 346. There are no missing values. `id`
only names a row."""


def _prepare(raw: Path | None, public: Path, private: Path) -> None:
    """The 442 patients in a fixed random order: 242 to learn from, 200 to predict."""
    from sklearn.datasets import load_diabetes

    del raw
    columns, target = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
    table = pd.DataFrame(columns).assign(progression=target)
    # RandomState's stream is frozen by numpy's policy, so this split is the same everywhere.
    table = table.iloc[np.random.RandomState(_SPLIT_SEED).permutation(len(table))]
    table.insert(0, "id", [f"p{number:04d}" for number in range(1, len(table) + 1)])
    train, test = table[:_TRAIN_ROWS], table[_TRAIN_ROWS:]
    train.to_csv(public / "train.csv", index=False, lineterminator="\n")
    test.drop(columns="progression").to_csv(public / "test.csv", index=False, lineterminator="\n")
    test[["id"]].assign(progression=150.0).to_csv(public / "sample_submission.csv", index=False, lineterminator="\n")
    test.to_csv(private / "test.csv", index=False, lineterminator="\n")


COMPETITION = Competition(
    id="diabetes",
    description=_DESCRIPTION,
    id_column="id",
    target="progression",
    metric=RMSE,
    transform="log",
    failure_reward=-7.0,  # an error of 1,097
    prepare=_prepare,
    prepared_md5={
        "public/train.csv": "b2abaa86a4a6ee017df2dc693c013228",
        "public/test.csv": "971e5909a7864a9a6d09186394d650e4",
        "public/sample_submission.csv": "4fbe5fb05eead5c5b24155a3acda5ce8",
        "private/test.csv": "9c6b302cdc7e8c915157bbb3fa631028",
    },
    sample_score=79.43038,
)
