"""Seed programs of a run: their state, and what a resumed run accepts."""

import json
import re

import numpy as np
import pytest

from discover_jax.exceptions import ConfigError, RunError
from discover_jax.execution import values
from discover_jax.execution.cache import verdict_row
from discover_jax.runs.attempts import seed_of, seed_verdicts, stored_seeds
from discover_jax.runs.best import _readable
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Execution, Grade, Outcome, Verdict

FILE = """\
from discover_jax.tasks.problem import Problem

PROBLEM = Problem(id="lowest", description="d", evaluate=print, higher_is_better=False, transform="negate", failure_reward=-10.0)
"""


def verdict(score):
    return Verdict(Outcome.OK, Grade(True, "", score, score, "near"), Execution(Outcome.OK, b"1\n", "said", "", 1.0))


@pytest.fixture
def task(tmp_path):
    (tmp_path / "lowest.py").write_text(FILE)
    return prepare_task(str(tmp_path / "lowest.py"), raw=None, reward="grade", folder=tmp_path / "task")


def test_state_of_a_seed_program(task):
    seed = seed_of(task, "x = 1", verdict(3.0))
    assert seed.is_seed
    assert (seed.id, seed.code, seed.score, seed.value, seed.feedback, seed.stdout) == ("seed", "x = 1", 3.0, -3.0, "near", "said")


def test_seed_program_must_be_worth_more_than_a_failure(task):
    with pytest.raises(ConfigError, match=r"scores 10\.0.*failure_reward"):  # the reward itself is raised to failure_reward
        seed_of(task, "x = 1", verdict(10.0))


@pytest.mark.parametrize(
    ("own", "remedy"), [(True, r"^Correct seed_program or evaluate\(\)"), (False, r"^Correct the program in config\.task\.seed_program")]
)
def test_seed_program_without_a_score_says_where_to_correct_it(task, own, remedy):
    detail = 'File "solution.py", line 2\nZeroDivisionError: division by zero\n'
    failed = Verdict(Outcome.EXCEPTION, Grade(False, "no", None, None), Execution(Outcome.EXCEPTION, None, "", detail, 1.0))
    with pytest.raises(ConfigError, match="no score") as caught:
        seed_of(task, task.problem.seed_program if own else "x = 1", failed)
    *_, shown, said = str(caught.value).splitlines()
    assert shown == "ZeroDivisionError: division by zero"
    assert re.search(remedy, said)


def test_a_resumed_run_has_the_stored_seed_programs(tmp_path):
    file, rows = tmp_path / "seeds.json", [{"task": "a", "program": "x = 1", "verdict": verdict_row(verdict(3.0))}]
    file.write_text(json.dumps(rows))
    assert list(seed_verdicts(file, stored_seeds(file, {"a": "x = 1"}))) == [("a", "x = 1", verdict(3.0))]
    for changed in ({"a": "x = 2"}, {}, {"a": "x = 1", "b": ""}):
        with pytest.raises(RunError, match="new run"):
            stored_seeds(file, changed)
    for damaged in ("", "[]x", "3", '[{"task": "a"}]', json.dumps([rows[0] | {"verdict": {}}])):
        file.write_text(damaged)
        with pytest.raises(RunError, match="Restore"):
            list(seed_verdicts(file, stored_seeds(file, {"a": "x = 1"})))


@pytest.mark.parametrize(
    ("value", "shown"),
    [([1.5, float("inf")], "[1.5, Infinity]"), ({"a": None}, '{"a": null}')],
)
def test_returned_values_are_readable(value, shown):
    assert _readable(values.encode(value, 1000)) == f"{shown}\n".encode()


def test_arrays_are_readable_and_other_bytes_are_null():
    assert json.loads(_readable(values.encode(np.array([[0.1, 2.0]]), 1000))) == [[0.1, 2.0]]
    assert json.loads(_readable(values.encode(np.array([1 + 2j]), 1000))) == ["(1+2j)"]
    assert _readable(b"") == _readable(b"noise") == b"null\n"


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_values_that_cost_too_much_are_null(monkeypatch, error):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000, 0), }".ljust(117) + b"\n"
    assert _readable(b'{"array":0}\n\x93NUMPY\x01\x00' + len(header).to_bytes(2, "little") + header) == b"null\n"

    def fails(data):
        raise error

    monkeypatch.setattr(values, "decode", fails)
    assert _readable(b"1\n") == b"null\n"
