"""The command line, as a user meets it: one clear message, exit code 2, no traceback."""

import subprocess
import sys

import pytest

_PROGRAM = """
from discover_jax.cli import launch
def run(config, workdir):
    print(workdir, config.train.learning_rate, config.task.raw)
launch(run)
"""


def _run(*arguments):
    return subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False)


def test_overrides_and_default_folder():
    done = _run("--config=configs/spaceship.py:run3", "--config.train.learning_rate=1e-5", "--config.task.raw=x.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["runs/spaceship-run3", "1e-05", "x.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "No config was given"),
        (("--config=configs/nope.py",), "does not exist"),
        (("--config=configs/spaceship.py:run9",), "allowed: run1, run2, run3, run4, paper, apprentice"),
        (("--config=configs/quickstart.py", "--config.task.rw=x"), "Did you mean --config.task.raw?"),
        (("--config=configs/quickstart.py", "--config.train.steps=abc"), "config.train.steps"),
        (("--config=configs/quickstart.py", "--config.train.steps=0"), "too small"),
        (("--config=configs/quickstart.py", "--wrkdir=x"), "workdir"),
        (("--config=configs/quickstart.py", "stray"), "stray"),
    ],
)
def test_mistakes_end_in_one_message(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
