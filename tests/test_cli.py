"""The command line as users see it: help, overrides, and errors as one message with exit code 2 and no traceback."""

import re
import subprocess
import sys

import pytest

from discover_jax.config import settings

_COMMAND = """
from discover_jax.cli import launch
def run(config, workdir):
    print(workdir, config.train.learning_rate, config.task.raw)
launch(run)
"""


def _run(*arguments):
    return subprocess.run([sys.executable, "-c", _COMMAND, *arguments], capture_output=True, text=True, check=False)


def test_overrides_and_default_folder():
    done = _run("--config=configs/spaceship.py:run3", "--config.train.learning_rate=1e-5", "--config.task.raw=x.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["runs/spaceship-run3", "1e-05", "x.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config=configs/quickstart.py"),
        (("--config=configs/nope.py",), "configs/nope.py"),
        (("--config=configs/spaceship.py:run9",), "run1, run2, run3, run4, paper, apprentice"),
        (("--config=configs/quickstart.py", "--config.task.rw=x"), "--config.task.raw"),
        (("--config=configs/quickstart.py", "--config.train.steps=abc"), "config.train.steps"),
        (("--config=configs/quickstart.py", "--config.train.steps=0"), "config.train.steps must be at least 1; got 0"),
        (("--config=configs/quickstart.py", "--wrkdir=x"), "workdir"),
        (("--config=configs/quickstart.py", "stray"), "stray"),
    ],
)
def test_mistakes_are_one_message_that_names_them(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_prints_flags_main_settings_and_where_to_find_the_rest(flag):
    done = _run(flag)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = re.findall(r"^  --(?:config\.)?([a-z_.]+)", done.stdout, re.MULTILINE)
    assert shown == ["config", "workdir", *(name for name, row in settings().items() if row.tier == 1)]
    assert all(f"{name}={row.default!r}" in done.stdout for name, row in settings().items() if row.tier == 1)
    assert "docs/settings.md" in done.stdout
    assert "--helpfull" in done.stdout


def test_full_help_prints_all_settings_and_the_flags_of_libraries():
    done = _run("--helpfull")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  --config\.([a-z_0-9.]+)=", done.stdout, re.MULTILINE) == list(settings())
    assert "--verbosity" in done.stdout


@pytest.mark.parametrize("command", ["main", "search"])
def test_commands_that_start_runs_explain_their_flags(command):
    done = subprocess.run([sys.executable, "-m", f"discover_jax.{command}", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"discover_jax.{command}" in done.stdout
    assert all(f"  --{flag}" in done.stdout for flag in ("dry_run", "machine", "coordinator"))
    assert "--config.train.steps=10" in done.stdout
