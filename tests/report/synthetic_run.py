"""Synthetic run directories for tests, written by the project's own writers."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from discover_jax.archive.journal import to_json
from discover_jax.config import default_config, flatten
from discover_jax.execution.cache import verdict_row
from discover_jax.runs.attempts import SEED_PROGRAMS
from discover_jax.runs.metrics import MetricsWriter
from discover_jax.runs.summary import step_row
from discover_jax.types import Attempt, Execution, Grade, Outcome, State, StopReason, Verdict

ROWS = 870
DISCLOSURE: dict[str, Any] = {
    "competitions": [
        {
            "id": "spaceship-titanic",
            "metric": {"name": "accuracy", "higher_is_better": True, "share_of_rows": True},
            "reward": {"source": "grade", "rows": ROWS, "text": f"Rewards come from the private answers ({ROWS} rows)."},
            "private_answers": {"rows": ROWS},
            "grader": "native",
            "leaderboard": {
                "thresholds": {"Kaggle median": 0.7957, "Kaggle 75th percentile": 0.8027, "Kaggle best": 0.82815},
                "source": "from the report, not from a leaderboard on this machine",
                "note": "Kaggle scores its public leaderboard on its own 4,277 hidden rows, so the comparison is only indicative.",
            },
        }
    ],
    "search": {},
    "goes_on_from": None,
    "isolation": {"isolated": True, "lines": ["bubblewrap 0.11.0"]},
}


PROBLEM: dict[str, Any] = {
    **DISCLOSURE,
    "competitions": [
        {
            "id": "circles",
            "metric": {"name": "sum of radii", "higher_is_better": True, "share_of_rows": False},
            "reward": {"source": "evaluate", "rows": 0, "text": "Rewards come from the problem's evaluate()."},
            "private_answers": {"rows": 0},
            "grader": "evaluate() of the problem",
            "leaderboard": {"thresholds": {"one": 2.63586276, "another": 2.63598308}, "source": "two papers", "note": ""},
        }
    ],
}
"""What disclosure.json says of a problem."""


def write_seed_program(run: Path, task: str, score: float, *, private_score: float | None = None, rows: str = "") -> None:
    """Adds the seed program of a problem to a run, as runs store it. Its score on the private answers is `score` by default."""
    grade = Grade(True, "", score, score if private_score is None else private_score, rows=rows)
    verdict = Verdict(Outcome.OK, grade, Execution(Outcome.OK, b"", "", "", 1.0))
    row = {"task": task, "program": "def run():\n    return 1\n", "verdict": verdict_row(verdict)}
    (run / SEED_PROGRAMS).write_text(json.dumps([row]))


def attempt(step: int, group: int, index: int, parent: str, code: str | None, score: float | None, **changes: Any) -> Attempt:
    """An attempt. Without a score, its program raised an exception."""
    values: dict[str, Any] = {
        "id": f"{step:04d}-{group:03d}-{index:03d}",
        "parent_id": parent,
        "task": "spaceship-titanic",
        "step": step,
        "group": group,
        "index": index,
        "code": code,
        "outcome": Outcome.EXCEPTION if score is None else Outcome.OK,
        "detail": "line 3, in run: 1 / 0\nZeroDivisionError: division by zero" if score is None else "",
        "stdout": f"fold scores {score}\n",
        "score": score,
        "private_score": score,
        "reward": score or 0.0,
        "adapter_step": step,
        "tokens": 900,
        "stop": StopReason.STOP_TOKEN,
    }
    return Attempt(**(values | changes))


def write_run(folder: Path, attempts: Sequence[Attempt], *, kind: str = "train", disclosure: Any = DISCLOSURE, seed: int = 0) -> Path:
    """Writes the run directory of a run with these attempts."""
    folder.mkdir(parents=True)
    config = default_config()
    config.name, config.seed = folder.name, seed
    config.train.steps = max((a.step for a in attempts), default=0) + 1
    (folder / "config.json").write_text(json.dumps({"kind": kind, "config": flatten(config)}))
    if disclosure is not None:
        (folder / "disclosure.json").write_text(json.dumps(disclosure))
    (folder / "journal.jsonl").write_text("".join(to_json(each) + "\n" for each in attempts))
    metrics = MetricsWriter(folder / "metrics.jsonl")
    best: State | None = None
    for step in sorted({a.step for a in attempts}):
        mine = [a for a in attempts if a.step == step]
        for state in filter(None, (a.state() for a in mine)):
            best = state if best is None or state.value > best.value else best  # type: ignore[operator]
        timings = {
            "time/sample_s": 90.0,
            "time/execute_s": 40.0,
            "time/update_s": 30.0,
            "time/save_s": 1.0,
            "time/checkpoint_wait_s": 0.5,
            "time/checkpoint_s": step or None,
        }
        learned = {"entropy": 0.7 - 0.02 * step, "logprob_gap/mean": 0.003, "logprob_gap/max": 0.09, "advantage/mean": 0.0}
        if kind == "train":
            learned |= {"kl_base/mean": 0.001 * step, "grad_norm": 2.0, "advantage/min": -0.4, "advantage/max": 1.1 + 0.1 * step}
        metrics.write(step_row(step, mine, best={"spaceship-titanic": best}, timings=timings, learning_metrics=learned))
    return folder


def searched(steps: int, groups: int, size: int, program: Callable[[random.Random, str], str], seed: int = 0) -> list[Attempt]:
    """Attempts of a search. Most are children of good programs and score slightly better or worse; some fail.

    Args:
      program: (random, parent's program or "") -> a program.
    """
    draw = random.Random(seed)
    rows: list[Attempt] = []
    for step in range(steps):
        kept = sorted((row for row in rows if row.score is not None), key=lambda row: -row.reward)[: 2 * groups]
        made = []
        for group in range(groups):
            parent = draw.choice(kept) if kept and draw.random() > 0.1 else None
            for index in range(size):
                code = program(draw, parent.code or "" if parent else "")
                level = parent.reward + draw.gauss(-0.002, 0.006) if parent else draw.gauss(0.76, 0.03)
                parent_id = parent.id if parent else "seed"
                tokens = draw.randrange(2_000, 12_000)
                if draw.random() < 0.12:
                    outcome = draw.choice([Outcome.EXCEPTION] * 4 + [Outcome.TIMEOUT, Outcome.INVALID_SUBMISSION, Outcome.FORMAT_ERROR])
                    text = None if outcome is Outcome.FORMAT_ERROR else code
                    made.append(attempt(step, group, index, parent_id, text, None, outcome=outcome, tokens=tokens))
                else:
                    score = round(min(level, 0.5 + level / 2.4, 0.99) * ROWS) / ROWS
                    made.append(attempt(step, group, index, parent_id, code, round(score, 5), tokens=tokens, stdout=_printed(draw, score)))
        rows += made
    return rows


def _printed(draw: random.Random, score: float) -> str:
    return "".join(f"fold {fold}: accuracy {score + draw.gauss(0, 0.01):.5f}, {draw.randrange(200, 900)} trees\n" for fold in range(8))


_WORDS = ("age", "cabin", "deck", "side", "spend", "cryo", "planet", "group", "family", "luxury", "ratio", "total", "mean", "fold", "model")


def line(draw: random.Random) -> str:
    """A line like those of programs for tables."""
    a, b, c = (draw.choice(_WORDS) for _ in range(3))
    number = draw.randrange(1, 1000)
    return draw.choice(
        [
            f'    frame["{a}_{b}_{number}"] = frame["{a}"].fillna({number}) / (frame["{c}"].clip(lower=1) + {draw.random():.3f})',
            f"    {a}_{b} = HistGradientBoostingClassifier(max_iter={number}, learning_rate={draw.random():.4f}, random_state={number})",
            f'    for {a} in ("{b}", "{c}"): frame[{a}] = frame[{a}].map(lambda v: v if v == v else {number})  # {a} without {c}',
            f"    {c}_{number} = cross_val_predict({a}_{b}, x_train, y_train, cv={number % 9 + 2}, method='predict_proba')[:, 1]",
            f"    # the {a} of the {b} tells more than its {c}: {number} of {number * 3} rows",
        ]
    )


def edited(lines: int, share: float, anew: float = 0.0) -> Callable[[random.Random, str], str]:
    """Programs of `lines` lines. A child changes a fraction `share` of its parent's lines; with probability `anew` all lines are new."""

    def program(draw: random.Random, parent: str) -> str:
        if not parent or draw.random() < anew:
            return "\n".join(["def run():", *(line(draw) for _ in range(lines))]) + "\n"
        old = parent.split("\n")
        return "\n".join(line(draw) if 0 < i < len(old) - 1 and draw.random() < share else each for i, each in enumerate(old))

    return program
