"""The tables in docs/results.md match those that experiments/evidence.py prints from the data in experiments/."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_run import attempt, write_run

from discover_jax.types import Outcome

ROOT = Path(__file__).parents[2]
TRAITS = 'def run():\n    X["deck"] = 1\n    return A(XGBClassifier(), LogisticRegression())\n'


def test_page_shows_the_measurements():
    command = [sys.executable, "experiments/evidence.py", "--csv=experiments/evidence"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert len(rows) >= 6
    assert [row for row in rows if row not in page] == []


def test_measures_by_hand(tmp_path):
    """Two steps of two programs; step 1 has the better program of step 0 as its parent."""
    scores = {"greedy-none-3": [(0.5, 0.6), (0.7, None)], "greedy-entropic-3": [(0.5, 0.6), (0.61, 0.5)]}
    for name, steps in scores.items():
        attempts = []
        for step, pair in enumerate(steps):
            for index, score in enumerate(pair):
                parent, code = "0000-000-001" if step else "seed", TRAITS if index else "pass"
                changes = {"outcome": Outcome.TIMEOUT, "private_score": None} if score is None else {"private_score": score - 0.1}
                attempts.append(attempt(step, 0, index, parent, code, score, **changes))
        write_run(tmp_path / "runs" / name, attempts)
    command = [sys.executable, "experiments/evidence.py", f"--runs={tmp_path / 'runs'}", f"--csv={tmp_path / 'csv'}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    runs = {row["setting"]: row for row in csv.DictReader((tmp_path / "csv" / "runs.csv").open())}
    expected = {
        "greedy-none": {"last_two_mean": (0.55 + 0.35) / 2, "best": 0.7, "private": 0.6, "better": 0.5, "broken": 0.5, "timeouts": 1},
        "greedy-entropic": {"last_two_mean": 0.5525, "last_two_private": 0.4525, "best": 0.61, "better": 0.5, "broken": 0.5},
    }
    for setting, values in expected.items():
        assert {name: float(runs[setting][name]) for name in values} == pytest.approx(values)
    assert "| greedy-entropic minus greedy-none (1 seeds) |" in printed
    assert "| best program, on the reward's rows | 0.6100 | 0.7000 | -0.0900 |" in printed
    traits = {(row["setting"], row["step"], row["trait"]): row["share"] for row in csv.DictReader((tmp_path / "csv" / "traits.csv").open())}
    assert traits["greedy-entropic", "2", "column deck"] == "0.5"
    assert traits["greedy-entropic", "1", "several models"] == "0.5"
    assert ("greedy-none", "2", "column deck") not in traits  # its only program with a score lacks the column
    assert not (tmp_path / "csv" / "same_prompts.csv").exists()
