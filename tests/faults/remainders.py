"""A competition for the phrase model: is a number modulo 7 below 3?"""

from pathlib import Path

import numpy as np
import pandas as pd

from discover_jax.tasks.competition import Competition, Metric


def _accuracy(answers_R: np.ndarray, predictions_R: np.ndarray) -> float:
    """Avoids scikit-learn: its import would take half of the start-up time."""
    return float((np.asarray(answers_R) == np.asarray(predictions_R)).mean())


def prepare(raw: Path | None, public: Path, private: Path) -> None:
    """Writes the four tables. `raw`, if given, is a table of private answers that replaces the correct ones."""
    table = pd.DataFrame({"id": range(100)})
    table["y"] = (table["id"] % 7 < 3).astype(int)
    train, test = table.iloc[:30], table.iloc[30:]
    train.to_csv(public / "train.csv", index=False)
    test[["id"]].to_csv(public / "test.csv", index=False)
    test[["id"]].assign(y=1).to_csv(public / "sample_submission.csv", index=False)
    (test if raw is None else pd.read_csv(raw)).to_csv(private / "test.csv", index=False)


COMPETITION = Competition(
    id="remainders",
    description="Predict `y` from `id`.",
    id_column="id",
    target="y",
    metric=Metric("accuracy", higher_is_better=True, function=_accuracy, proportion=True),
    failure_reward=0.0,
    prepare=prepare,
)
