"""A tiny competition with a boolean target, and the user's own copy of Kaggle's table, if any."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for submission_table

_SOURCE = """
from pathlib import Path
import pandas as pd
from discover_jax.tasks.competition import Competition, Metric, Threshold
from discover_jax.tasks import metrics


def table(start, rows):
    numbers = range(start, start + rows)
    # Floats that a rewriting through float64 and back could alter, text with commas and quotes, empty cells.
    return pd.DataFrame({
        "key": [f"{n:04d}_01" for n in numbers],
        "size": [["0.1", "1e3", "-7.50", ""][n % 4] for n in numbers],
        "note": [["a, b", 'say "x"', "", "NA"][n % 4] for n in numbers],
        "sinks": [n * 7 % 11 < 5 for n in numbers],
    })


def prepare(raw, public, private):
    train, test = table(0, 100), table(100, 40)
    train.to_csv(public / "train.csv", index=False)
    test.drop(columns="sinks").to_csv(public / "test.csv", index=False)
    test[["key"]].assign(sinks=False).to_csv(public / "sample_submission.csv", index=False)
    test.to_csv(private / "test.csv", index=False)
    CHANGE


COMPETITION = Competition(**(dict(
    id="boats", description="Which boats sink?", id_column="key", target="sinks", metric=metrics.ACCURACY, prepare=prepare,
) | dict(FIELDS)))
"""


@pytest.fixture
def write_competition(tmp_path):
    """Writes the competition's file with a line added to prepare() and changed fields. Returns its path."""

    def write(change: str = "pass", fields: str = "") -> str:
        path = tmp_path / "boats.py"
        path.write_text(textwrap.dedent(_SOURCE).replace("CHANGE", change).replace("FIELDS", fields))
        return str(path)

    return write


@pytest.fixture(scope="session")
def spaceship_raw():
    """Kaggle's train.csv. It must not be redistributed, so an environment variable gives the path of your copy."""
    path = os.environ.get("DISCOVER_JAX_SPACESHIP_RAW", "")
    if not path:
        pytest.skip("needs Kaggle's Spaceship Titanic: set DISCOVER_JAX_SPACESHIP_RAW to the path of train.csv")
    assert Path(path).is_file(), f"DISCOVER_JAX_SPACESHIP_RAW={path} is no file"
    return path
