"""experiments/ablations.py: measures of collapse and tables, computed by hand from synthetic runs."""

import csv
import math

import pytest
from synthetic_run import PROBLEM, attempt, write_run, write_seed_program

SCIPY = "from scipy.optimize import minimize\ndef run():\n    return minimize(f, x)\n"
PLAIN = "def run():\n    return 1\n"
RENAMED = "def run():\n\n    return 1  # the seed program\n"


def write_circles(folder, rows):
    """A run of two steps, from a seed program that scores 0.5. A row: parent, program, score."""
    attempts = [
        attempt(step, 0, index, parent, code, score, task="circles")
        for step, of_step in enumerate(rows)
        for index, (parent, code, score) in enumerate(of_step)
    ]
    write_seed_program(write_run(folder, attempts, disclosure=PROBLEM), "circles", 0.5)


def collected(tmp_path, output, *more):
    (tmp_path / "csv").mkdir(exist_ok=True)
    printed = output("experiments/ablations.py", f"--runs={tmp_path / 'runs'}", "--steps=2", f"--csv={tmp_path / 'csv'}", *more)
    return printed, {(row["arm"], row["seed"]): row for row in csv.DictReader((tmp_path / "csv" / "ablations.csv").open())}


def test_measures_by_hand(tmp_path, output):
    first = [("seed", SCIPY, 0.6), ("seed", RENAMED, 0.5), ("seed", SCIPY + "x = 2\n", None), ("seed", None, None)]
    best = "0000-000-000"
    second = [(best, SCIPY + "y = 3\n", 0.6 + 1e-9), (best, SCIPY, 0.6), (best, "def run():\n    return 2\n", 0.7), (best, PLAIN, None)]
    write_circles(tmp_path / "runs" / "circles-base-3", [first, second])
    _, rows = collected(tmp_path, output)
    families = [4, 3]  # of the seven programs, four name an optimiser
    expected = {
        "programs": 8,
        "best_grade": 0.7,
        "better": 2 / 8,  # a gain of 1e-9 is rounding
        "valid": 5 / 8,
        "mean": (1.1 + 1.9) / 8,
        "results": (2 / 4 + 2 / 4) / 2,
        "structures": (3 / 4 + 4 / 4) / 2,
        "repeats": 3 / 5,  # of the seed program, and twice of the first program
        "as_parent": 3 / 8,
        "families": math.exp(-sum(count / 7 * math.log(count / 7) for count in families)),
    }
    assert {name: float(rows["base", "3"][name]) for name in expected} == pytest.approx(expected)


def test_arms_are_compared_seed_by_seed(tmp_path, output, capsys):
    """Arm `keep` has no seed 3; seed 2 of arm `short` has one step only."""
    for name, scores in {
        "base-1": (0.6, 0.7),
        "base-2": (0.6, 0.6),
        "base-3": (0.6, 0.6),
        "keep-1": (0.6, 0.8),
        "keep-2": (0.6, 0.8),
    }.items():
        rows = [[("seed", PLAIN, score), ("seed", PLAIN, None)] for score in scores]
        write_circles(tmp_path / "runs" / f"circles-{name}", rows)
    write_circles(tmp_path / "runs" / "circles-short-2", [[("seed", PLAIN, 0.6)]])
    printed, rows = collected(tmp_path, output)
    assert set(rows) == {("base", "1"), ("base", "2"), ("base", "3"), ("keep", "1"), ("keep", "2")}
    half = 12.706204736 * 0.05  # the two differences are 0.1 and 0.2
    assert "| circles | base (3 seeds) | keep minus base (2 seeds) |" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("| best score |"))
    assert line.endswith(f"| +0.1500 +- {half:.4f} |")
    assert "0 of 10 intervals of differences exclude 0; by chance, about 0.5 would." in printed


def test_rows_of_other_problems_stay(tmp_path, output):
    for problem in ("circles", "spaceship"):
        rows = [[("seed", SCIPY, 0.6), ("seed", None, None)]] * 2
        write_circles(tmp_path / problem / f"{problem}-base-1", rows)
        (tmp_path / "csv").mkdir(exist_ok=True)
        output("experiments/ablations.py", f"--runs={tmp_path / problem}", "--steps=2", f"--csv={tmp_path / 'csv'}")
    rows = list(csv.DictReader((tmp_path / "csv" / "ablations.csv").open()))
    assert [(row["problem"], row["seed"], row["programs"], row["results"]) for row in rows] == [
        ("circles", "1", "4", "0.5"),
        ("spaceship", "1", "4", "0.5"),
    ]


def test_a_run_without_valid_programs(tmp_path, output):
    """It has no best score and no repeats. Differences of these leave its seed out."""
    for name, score in {"base-1": 0.6, "base-2": 0.6, "base-3": 0.6, "puct-1": None, "puct-2": 0.7, "puct-3": 0.8}.items():
        write_circles(tmp_path / "runs" / f"circles-{name}", [[("seed", SCIPY, score)]] * 2)
    printed, rows = collected(tmp_path, output)
    assert [rows["puct", "1"][name] for name in ("best_grade", "repeats", "valid", "results")] == ["", "", "0.0", "0.0"]
    (best,) = (line for line in printed.splitlines() if line.startswith("| best score |"))
    assert best.endswith(f"| +0.1500 +- {12.706204736 * 0.05:.4f} (2 seeds) |")


def test_plots_need_a_base(tmp_path, output):
    write_circles(tmp_path / "runs" / "circles-keep-1", [[("seed", PLAIN, 0.6)]] * 2)
    with pytest.raises(ValueError, match=r"arm 'base'; its arms are keep. Set --base"):
        collected(tmp_path, output)


def test_no_table_yet(tmp_path, output, capsys):
    with pytest.raises(SystemExit):
        output("experiments/ablations.py", f"--csv={tmp_path}")
    assert "Set --runs" in capsys.readouterr().err
