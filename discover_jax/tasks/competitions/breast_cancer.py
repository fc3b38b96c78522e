"""breast-cancer: how likely is a tumour malignant? Built from scikit-learn's bundled table, so it needs no data of the user's."""

from pathlib import Path

import numpy as np
import pandas as pd

from discover_jax.tasks.competition import Competition
from discover_jax.tasks.metrics import LOG_LOSS

_TRAIN_ROWS = 240
_SPLIT_SEED = 0

_DESCRIPTION = """\
Each row describes the cell nuclei in a picture of breast tissue by thirty numbers: mean, standard error and worst value of radius, texture,
perimeter, area, smoothness, compactness, concavity, concave points, symmetry and fractal dimension. The target `malignant` is 1 for a
malignant tumour and 0 for a benign one; predict the probability that it is 1, between 0 and 1. There are no missing values. `id` only names
a row."""


def _prepare(raw: Path | None, public: Path, private: Path) -> None:
    """The 569 tumours in a fixed random order: 240 to learn from, 329 to predict."""
    from sklearn.datasets import load_breast_cancer

    del raw
    columns, benign = load_breast_cancer(return_X_y=True, as_frame=True)
    table = pd.DataFrame(columns).rename(columns=lambda name: name.replace(" ", "_")).assign(malignant=1 - benign)
    # RandomState's stream is frozen by numpy's policy, so this split is the same everywhere.
    table = table.iloc[np.random.RandomState(_SPLIT_SEED).permutation(len(table))]
    table.insert(0, "id", [f"t{number:04d}" for number in range(1, len(table) + 1)])
    train, test = table[:_TRAIN_ROWS], table[_TRAIN_ROWS:]
    train.to_csv(public / "train.csv", index=False, lineterminator="\n")
    test.drop(columns="malignant").to_csv(public / "test.csv", index=False, lineterminator="\n")
    test[["id"]].assign(malignant=0.5).to_csv(public / "sample_submission.csv", index=False, lineterminator="\n")
    test.to_csv(private / "test.csv", index=False, lineterminator="\n")


COMPETITION = Competition(
    id="breast-cancer",
    description=_DESCRIPTION,
    id_column="id",
    target="malignant",
    metric=LOG_LOSS,
    transform="log",
    # Log loss of the worst probabilities that scikit-learn does not cut is 36; hard labels that miss one tumour in ten have 3.6.
    failure_reward=-4.0,
    prepare=_prepare,
    prepared_md5={
        "public/train.csv": "30806045e8303c0c1eeef68e7a1e96ea",
        "public/test.csv": "b981e2747cd82cb6e8637701657e4206",
        "public/sample_submission.csv": "a64e3493a04b338703c60c28af6d8925",
        "private/test.csv": "863ae62d07dc8b05a42ae91b8c17bbb4",
    },
    sample_score=0.69315,
)
