"""The tables in docs/results.md match those that the scripts in experiments/ print from the data there."""

import argparse
import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import DISCLOSURE, attempt, write_run, write_seed_program

from discover_jax.exceptions import RunError
from discover_jax.row_results import encode
from discover_jax.types import Outcome, StopReason

ROOT = Path(__file__).parents[2]
HOLDOUT = copy.deepcopy(DISCLOSURE)
HOLDOUT["competitions"][0]["reward"]["source"] = "holdout"
TRAITS = 'def run():\n    X["deck"] = 1\n    return A(XGBClassifier(), LogisticRegression())\n'


@pytest.mark.parametrize(
    "command",
    [
        ("experiments/evidence.py", "--csv=experiments/evidence"),
        ("experiments/evidence.py", "--csv=experiments/objectives", "--differences"),
        ("experiments/evidence.py", "--csv=experiments/objectives/digits", "--differences"),
        ("experiments/real_model.py",),
        ("experiments/ablations.py",),
        ("experiments/replay.py", "--csv=experiments/real_model/choices.csv"),
        ("experiments/replay.py", "--csv=experiments/selection/replay.csv"),
        ("experiments/replay.py", "--csv=experiments/objectives/replay.csv"),
        ("experiments/replay.py", "--csv=experiments/objectives/digits/replay.csv"),
    ],
    ids=lambda command: "-".join(Path(argument).name for argument in command),
)
def test_page_shows_the_measurements(command, output):
    rows = [line for line in output(*command).splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert len(rows) >= 5
    assert [row for row in rows if row not in page] == []


def test_measures_by_hand(tmp_path, output):
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
    printed = output("experiments/evidence.py", f"--runs={tmp_path / 'runs'}", f"--csv={tmp_path / 'csv'}")
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


def finalists(id, retested):
    return json.dumps([{"competition": "spaceship-titanic", "chosen": id, "finalists": [{"id": id, "retested_score": retested}]}])


def test_measures_of_a_real_model_by_hand(tmp_path, output):
    """Two steps of two programs, from a seed program with a score of 0.5. Only training has a better program in the second step."""
    scores = {"space-search-7": [(0.6, None), (None, 0.55)], "space-train-7": [(0.6, None), (0.7, 0.4)], "space-train-8": [(0.6, 0.7)] * 2}
    for name, steps in scores.items():
        attempts = [
            attempt(step, 0, index, "0000-000-000" if step else "seed", "pass", score, private_score=score and score - 0.1)
            for step, pair in enumerate(steps)
            for index, score in enumerate(pair)
        ]
        run = write_run(tmp_path / "runs" / name, attempts, disclosure=HOLDOUT)
        write_seed_program(run, "spaceship-titanic", 0.5)
        (run / "finalists.json").write_text(finalists("0000-000-000", 0.58))
    losses = copy.deepcopy(DISCLOSURE)
    losses["competitions"][0]["metric"] = {"name": "log loss", "higher_is_better": False, "share_of_rows": False}
    rows = [attempt(0, 0, index, "seed", "pass", score, reward=-score) for index, score in enumerate((0.4, 0.6, 0.7, 0.5))]
    rows.append(attempt(1, 0, 0, "seed", "pass", 0.8, reward=-0.8))
    write_seed_program(write_run(tmp_path / "runs" / "loss-search-7", rows, disclosure=losses), "spaceship-titanic", 0.5)
    (tmp_path / "csv").mkdir()
    printed = output("experiments/real_model.py", f"--runs={tmp_path / 'runs'}", "--steps=2", f"--csv={tmp_path / 'csv'}")
    rows = list(csv.DictReader((tmp_path / "csv" / "runs.csv").open()))
    assert [(row["best_grade"], row["better"]) for row in rows if row["problem"] == "loss"] == [("0.4", "0.2")]
    runs = {(row["arm"], row["seed"]): row for row in rows if row["problem"] == "space"}
    expected = {"best_grade": 0.7, "best_unseen": 0.6, "chosen_unseen": 0.5, "mean_last": 0.55, "valid_last": 1.0, "better": 0.5}
    assert {name: float(runs["train", "7"][name]) for name in expected} == pytest.approx(expected)
    assert float(runs["search", "7"]["better"]) == 0.25
    assert "training minus search (1 seeds)" in printed  # seed 8 has no search
    assert "loss: no seed has both arms" in printed
    assert "| best program, on the reward's rows | 0.6000 | 0.7000 | +0.1000 |" in printed


def collected(tmp_path, output, steps):
    """The table of the runs on one problem, and the rows of runs.csv by arm and seed."""
    (tmp_path / "csv").mkdir()
    printed = output("experiments/real_model.py", f"--runs={tmp_path / 'runs'}", f"--steps={steps}", f"--csv={tmp_path / 'csv'}")
    return printed, {(row["arm"], row["seed"]): row for row in csv.DictReader((tmp_path / "csv" / "runs.csv").open())}


def test_measures_that_some_runs_lack(tmp_path, output):
    """Search with seed 7 has no valid program, and with seed 8 no retest has a score. The other seeds are compared and counted."""
    scores = {("search", 7): None, ("search", 8): 0.5, ("search", 9): 0.5, ("train", 7): 0.6, ("train", 8): 0.6, ("train", 9): 0.7}
    for (arm, seed), score in scores.items():
        run = write_run(tmp_path / "runs" / f"circles-{arm}-{seed}", [attempt(0, 0, 0, "seed", "pass", score)])
        write_seed_program(run, "spaceship-titanic", 0.4)
        if score is not None:
            (run / "finalists.json").write_text(finalists("0000-000-000", None if (arm, seed) == ("search", 8) else score))
    printed, rows = collected(tmp_path, output, 1)
    assert (rows["search", "7"]["best_grade"], rows["search", "8"]["chosen_retested"]) == ("", "")
    half = 12.706204736 * 0.05  # the two differences are 0.1 and 0.2
    assert f"| best program, on the reward's rows | 0.5000 +- 0.0000 | 0.6500 +- {half:.4f} | +0.1500 +- {half:.4f} (2 seeds) |" in printed
    assert "| chosen program, in the retests | 0.5000 | 0.7000 | +0.2000 (1 seeds) |" in printed
    assert "| valid programs, last step | 0.6667 +- 1.4342 | 1.0000 +- 0.0000 | +0.3333 +- 1.4342 |" in printed


@pytest.mark.parametrize("script", ["real_model", "replay", "evidence"])
def test_finalists_of_later_steps_are_not_compared(tmp_path, output, script):
    """The retests of the whole run chose among programs of two steps; only the first step is compared."""
    results = [encode(np.arange(10) < right, share=True) for right in (4, 5, 6)]
    rows = [attempt(step, 0, 0, "seed", f"{step}", 0.5 + step / 10, private_score=0.5, rows=results[1 + step]) for step in (0, 1)]
    run = write_run(tmp_path / "runs" / "space-none-7", rows, disclosure=HOLDOUT)
    write_seed_program(run, "spaceship-titanic", 0.4, rows=results[0])
    found = json.loads(finalists("0000-000-000", 0.55))
    found[0]["finalists"].append({"id": "0001-000-000", "retested_score": 0.5})
    (run / "finalists.json").write_text(json.dumps(found))
    if script == "evidence":
        output("experiments/evidence.py", f"--runs={tmp_path / 'runs'}", f"--csv={tmp_path}", "--steps=1", "--base=space-none")
        (row,) = csv.DictReader((tmp_path / "runs.csv").open())
        assert (row["best"], row["chosen_private"]) == ("0.5", "")
        return
    runs = (f"--runs={run.parent}", f"--csv={tmp_path}") if script == "real_model" else (str(run), f"--csv={tmp_path / 'choices.csv'}")
    with pytest.raises(RunError, match=r"later steps: 0001-000-000\. .*retest\.py --steps=N"):
        output(f"experiments/{script}.py", *runs, "--steps=1")


def test_the_name_of_a_run_folder(tmp_path, output):
    write_run(tmp_path / "runs" / "space-train", [attempt(0, 0, 0, "seed", "pass", 0.5)])
    with pytest.raises(ValueError, match=r"space-train.* must be named PROBLEM-ARM-SEED"):
        collected(tmp_path, output, 1)


def test_scores_are_drawn_from_the_first_step_in_which_all_runs_have_one(output, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import real_model

    rows = [{"step": step, "seed": seed, "best": best} for step, seed, best in ((1, 1, 0.5), (1, 2, ""), (2, 1, 0.5), (2, 2, 0.7))]
    assert real_model.mean_by_step(rows, "best") == {2: pytest.approx(0.6)}
    assert real_model.mean_by_step(rows[::2], "best") == {1: 0.5, 2: 0.5}


def test_settings_without_a_shared_seed_or_a_valid_program(tmp_path, output):
    for name, score in {"greedy-none-1": 0.5, "greedy-none-2": None, "puct-none-3": 0.6, "fixed-none-2": 0.7}.items():
        write_run(tmp_path / "runs" / name, [attempt(0, 0, 0, "seed", "pass", score)])
    printed = output("experiments/evidence.py", f"--runs={tmp_path / 'runs'}", f"--csv={tmp_path / 'csv'}", "--base=greedy-none")
    assert "fixed-none minus greedy-none (1 seeds) | puct-none minus greedy-none (0 seeds)" in printed
    assert "| best program, on the reward's rows | 0.7000 | 0.5000 (1 seeds) | 0.6000 |  |  |" in printed


def test_longer_runs_are_compared_at_equal_numbers_of_programs(tmp_path, monkeypatch, capsys):
    """Both runs have two steps. The second has a third one, with a better program; a third run has no valid program."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import estimators

    for seed, steps in ((0, [0.5, 0.6]), (1, [0.5, 0.6, 0.9]), (2, [None, None])):
        rows = [attempt(step, 0, 0, "seed", f"{step}", score) for step, score in enumerate(steps)]
        write_run(tmp_path / f"fixed-none-{seed}", rows)
    arguments = argparse.Namespace(
        out=tmp_path, steps=2, first_seed=0, seeds=3, reuse="fixed", learning="none", diversity=False, csv=tmp_path / "c"
    )
    found = estimators.table(arguments)
    assert found["fixed/none"]["best"] == [0.6, 0.6, None]
    assert found["fixed/none"]["programs"] == 6
    assert found["fixed/none"]["distance"] == [None] * 3  # no group has two programs
    estimators.show(found, arguments)
    assert "| fixed/none | 3 | 0.6000 +- 0.0000 |" in capsys.readouterr().out
    assert estimators.paired(found, "fixed/none", "fixed/none", "best") == "+0.0000 +- 0.0000"
    estimators.write_csv(arguments)
    assert len(list(csv.DictReader((tmp_path / "c").open()))) == 6


def test_a_run_without_a_valid_program_has_no_finalists(tmp_path, output, capsys):
    run = write_run(tmp_path / "space-train-7", [attempt(0, 0, 0, "seed", "pass", None)])
    output("experiments/retest.py", str(run), "--raw=train.csv")
    assert not (run / "finalists.json").exists()


def test_choices_without_a_choice_by_score(tmp_path, monkeypatch):
    """A program whose private score is unknown has no row; what is compared with it has none, either."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import replay

    row = {"seed": 1, "estimate": 0.6, "unseen": 0.5, "gap": 0.1}
    rows = [row | {"run": run, "choice": choice} for run, choice in (("a", "raw"), ("a", "finalists"), ("b", "finalists"))]
    assert [line.split(" | ")[0] for line in replay.table(rows)[2:]] == ["| raw", "| finalists"]


def test_rows_that_gave_the_reward_are_not_unseen(tmp_path, output):
    """With the reward `grade`, the private score is the reward's. The retests are on other rows."""
    for arm in ("search", "train"):
        run = write_run(tmp_path / "runs" / f"spaceship-grade-{arm}-7", [attempt(0, 0, 0, "seed", "pass", 0.6)])
        write_seed_program(run, "spaceship-titanic", 0.5)
        (run / "finalists.json").write_text(finalists("0000-000-000", 0.58))
    (tmp_path / "csv").mkdir()
    printed = output("experiments/real_model.py", f"--runs={tmp_path / 'runs'}", "--steps=1", f"--csv={tmp_path / 'csv'}")
    rows = list(csv.DictReader((tmp_path / "csv" / "runs.csv").open()))
    assert {row["problem"] for row in rows} == {"spaceship-grade"}
    assert {(row["best_unseen"], row["chosen_unseen"], row["chosen_retested"]) for row in rows} == {("", "", "0.58")}
    assert "| best program, on the reward's rows |" in printed
    assert "unseen" not in printed


def test_replies_of_a_real_model_by_hand(tmp_path, output):
    """The last two steps of search have four replies. One is cut, but valid; of the other three, two are valid."""
    cut = {"stop": StopReason.MAX_TOKENS}
    for arm, more in (("search", cut), ("train", {})):
        rows = [attempt(0, 0, index, "seed", "pass", 0.6) for index in (0, 1)]
        rows += [attempt(1, 0, 0, "seed", "x" * 90, 0.6, tokens=900, **more), attempt(1, 0, 1, "seed", "pass", None, tokens=500)]
        rows += [attempt(2, 0, index, "0001-000-000", "pass", 0.6, tokens=300) for index in (0, 1)]
        write_seed_program(write_run(tmp_path / "runs" / f"spaceship-{arm}-7", rows), "spaceship-titanic", 0.5)
    (tmp_path / "csv").mkdir()
    printed = output("experiments/real_model.py", f"--runs={tmp_path / 'runs'}", "--steps=3", f"--csv={tmp_path / 'csv'}", "--replies")
    rows = {(row["arm"], row["part"]): row for row in csv.DictReader((tmp_path / "csv" / "replies.csv").open())}
    expected = {"cut": 0.25, "valid": 0.75, "valid_complete": 2 / 3, "tokens": 500, "parent": (90 + len("def run():\n    return 1\n")) / 2}
    assert {name: float(rows["search", "last"][name]) for name in expected} == pytest.approx(expected)
    assert float(rows["train", "last"]["cut"]) == 0
    assert "| valid programs among the other replies | 0.6667 | 0.7500 | +0.0833 |" in printed


def test_same_prompts_of_a_real_model_by_hand(tmp_path, output):
    """The training run has a best program of 0.7. The adapter finds a better one, and a copy of another; the base model finds neither."""
    runs, same, tables = (tmp_path / name for name in ("runs", "same", "csv"))
    rows = [attempt(0, 0, index, "seed", "minimize(f)" if index else "pass", score) for index, score in enumerate((0.7, 0.6))]
    write_seed_program(write_run(runs / "circles-train-7", rows), "spaceship-titanic", 0.5)
    for arm, scores in {"adapter": (0.75, 0.6, 0.6, None), "base": (0.55, None, None, None)}.items():
        write_run(same / f"circles-{arm}-7", [attempt(1, 0, index, "0000-000-001", "pass", score) for index, score in enumerate(scores)])
    tables.mkdir()
    other = {
        "problem": "space",
        "seed": "3",
        "arm": "base",
        "valid": "0.5",
        "mean": "0.1",
        "different": "2",
        "better": "0.0",
        "gain": "0.0",
    }
    (tables / "same_prompts.csv").write_text(f"{','.join(other)}\n{','.join(other.values())}\n")
    command = ("experiments/real_model.py", f"--runs={runs}", f"--same_prompts={same}", "--steps=1", f"--csv={tables}", "--replies")
    printed = output(*command)
    kept, *found = csv.DictReader((tables / "same_prompts.csv").open())
    assert {name: kept[name] for name in other} == other  # rows of other problems stay
    values = {row["arm"]: [float(row[name]) for name in ("valid", "different", "better", "gain")] for row in found}
    assert values == {"adapter": pytest.approx([0.75, 2, 0.25, 0.05]), "base": pytest.approx([0.25, 1, 0, 0])}
    assert "| best score over that of the training run | 0.0000 | 0.0500 | +0.0500 |" in printed
    assert "| valid programs among the other replies | 0.2500 | 0.7500 | +0.5000 |" in printed
    replies = {row["arm"]: row for row in csv.DictReader((tables / "replies.csv").open()) if row["part"] == "same"}
    assert float(replies["base"]["parent"]) == len("minimize(f)")  # of the training run
    (step,) = csv.DictReader((tables / "steps.csv").open())
    assert float(step["trait"]) == 0.5


def test_choices_of_the_best_program_by_hand(tmp_path, output):
    """The highest score is 0.3 too high with seed 1, and 0.1 or 0.3 with seed 2. The retests choose a better program in the first run."""
    for name, seed, unseen, winner in (("a", 1, 0.4, "0000-000-001"), ("b", 2, 0.6, "0000-000-000"), ("c", 2, 0.4, "0000-000-000")):
        results = [{"private_score": unseen + index / 10, "rows": encode(np.arange(10) < 7 - index, share=True)} for index in (0, 1)]
        attempts = [attempt(0, 0, index, "seed", f"{index}", 0.7 - index / 10, **results[index]) for index in (0, 1)]
        run = write_run(tmp_path / name, attempts, seed=seed)
        (run / "finalists.json").write_text(finalists(winner, 0.55))
        write_seed_program(run, "spaceship-titanic", 0.5, rows=encode(np.arange(10) < 5, share=True), private_score=0.45)
    runs = [str(tmp_path / name) for name in "abc"]
    printed = output("experiments/replay.py", *runs, f"--csv={tmp_path / 'choices.csv'}")
    half = 12.706204736 * 0.05  # of the two seeds' means, which are 0.1 apart
    assert "3 runs with 2 seeds" in printed
    raw = f"| raw | 0.7000 +- 0.0000 | 0.4500 +- {half:.4f} | +0.0000 +- 0.0000 | +0.2500 +- {half:.4f} | +0.0000 +- 0.0000 |"
    assert raw in printed
    assert "| seed program | 0.5000 +- 0.0000 | 0.4500 +- 0.0000 | +0.0000 +-" in printed
    rows = list(csv.DictReader((tmp_path / "choices.csv").open()))
    assert [float(row["gap"]) for row in rows if row["choice"] == "finalists"] == pytest.approx([0.05, -0.05, 0.15])
    assert [float(row["gap"]) for row in rows if row["choice"] == "seed program"] == pytest.approx([0.05] * 3)
