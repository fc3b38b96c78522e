"""A competition on your own table: --config.task.raw=customers.csv, with the columns id, left (True or False) and any others."""

from pathlib import Path

import pandas as pd

from discover_jax.tasks.competition import Competition
from discover_jax.tasks.metrics import ACCURACY


def prepare(raw: Path | None, public: Path, private: Path) -> None:
    """Splits off a random fifth of the rows for grading."""
    table = pd.read_csv(raw).sample(frac=1, random_state=0)
    test, train = table.iloc[: len(table) // 5], table.iloc[len(table) // 5 :]
    train.to_csv(public / "train.csv", index=False)
    test.drop(columns="left").to_csv(public / "test.csv", index=False)
    test[["id"]].assign(left=False).to_csv(public / "sample_submission.csv", index=False)
    test[["id", "left"]].to_csv(private / "test.csv", index=False)


COMPETITION = Competition(
    id="customers",
    description="Each row is a customer at the end of a year. Predict `left`, True or False: whether he left within the next one.",
    id_column="id",
    target="left",
    metric=ACCURACY,
    failure_reward=0.0,  # reward of a failed program; below the sample submission's
    prepare=prepare,
)
