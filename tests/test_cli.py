"""The command line as users see it: help, overrides, and errors as one message with exit code 2 and no traceback."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from discover_jax import cli
from discover_jax.config import settings
from discover_jax.config.arguments import check_arguments
from discover_jax.exceptions import ConfigError

QUICKSTART = f"--config={Path(__file__).parents[1] / 'configs' / 'quickstart.py'}"

# Forks for each command, because importing takes longer than the command. It writes the files `out` and `err` and prints the exit code.
_COMMANDS = """
import json, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from discover_jax.cli import launch
from discover_jax.exceptions import RunError
from discover_jax.runs.background import BackgroundWork
def write():
    time.sleep(5)
    print("went on", flush=True)
def run(config, workdir):
    if workdir.name.startswith("unfinished"):
        BackgroundWork(lambda: ThreadPoolExecutor().submit(write).result(), "checkpoint 1")
        raise KeyboardInterrupt if workdir.name == "unfinished" else RunError("gone")
    try:
        if workdir.name == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        print("cleaned up", flush=True)
        raise
    print(workdir, config.train.learning_rate, config.task.raw)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(sys.argv[1], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv[1:] = json.loads(line)
        with_dry_run = any(argument.startswith("--machine") for argument in sys.argv)
        launch(run, (lambda *_: True) if with_dry_run else None)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command with the given arguments."""
    folder = tmp_path_factory.mktemp("output")
    with subprocess.Popen([sys.executable, "-c", _COMMANDS, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forking:
        assert forking.stdin is not None
        answers = forking.stdout
        assert answers is not None

        def one(*arguments):
            print(json.dumps(arguments), file=forking.stdin, flush=True)
            code = int(answers.readline())
            return subprocess.CompletedProcess(arguments, code, *((folder / name).read_text() for name in ("out", "err")))

        yield one
        forking.stdin.close()


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}", "-{}={}"])
def test_overrides_and_default_folder(run, form):
    given = (("config", "configs/spaceship.py:run3"), ("config.train.learning_rate", "1e-5"), ("config.task.raw", "x.csv"))
    done = run(*(part for name, value in given for part in form.format(name, value).split()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["runs/spaceship-run3", "1e-05", "x.csv"]


def test_sigterm_ends_a_run_in_order(run):
    """It unwinds as after Ctrl-C, then dies of the signal, as its parent expects."""
    done = run("--config=configs/quickstart.py", "--workdir=terminated")
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "cleaned up\n"
    assert "same command resumes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("workdir", "code"), [("unfinished", 130), ("unfinished-after-error", 2)])
def test_a_checkpoint_that_is_left_unfinished_ends_at_once(run, workdir, code):
    """The lock of the run directory is gone by then, so nothing may write there any more."""
    done = run("--config=configs/quickstart.py", f"--workdir={workdir}")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert ("same command resumes" if code == 130 else "error: gone") in done.stderr


_START = "from discover_jax.config import default_config\ndef get_config():\n    config = default_config()\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_START + "    config.grops = 3\n    return config\n", r"in line 4: grops is not a setting. Did you mean config.groups\?"),
        (_START + "    config.groups = '3'\n    return config\n", r"in line 4: TypeError: .*groups"),
        (_START + "    return config.grops\n", r"in line 4: AttributeError: .*groups"),
        (_START, r"must return the config .*; it returned NoneType"),
        ("x = 1\n", r"does not define get_config\(\)"),
        ("def get_config(:\n", r"in line 1: SyntaxError"),
        ("import nowhere\n", r"in line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config(size):\n    return size\n", r"get_config\(size\) .* none was given. Give --config=\S+:ARGUMENT"),
    ],
)
def test_mistakes_in_a_config_file_are_one_message_with_their_line(run, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    done = run(f"--config={tmp_path / 'mine.py'}")
    assert done.returncode == 2
    assert str(tmp_path / "mine.py") in done.stderr
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 600


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
        (("--config",), "--config=configs/quickstart.py"),
        (("--config", "--workdir=x"), "--config=configs/quickstart.py"),
        (("--config", "configs/nope.py"), "configs/nope.py"),
        (("--config=configs/quickstart.py", "-config.grops=3"), "--config.groups"),
        (("--config=configs/quickstart.py", "--noconfig.task.stratifed"), "--config.task.stratified"),
        (("--config=configs/quickstart.py", "--noconfig.groups"), "--config.groups=VALUE"),
        (("--config=configs/quickstart.py", "--config.groups", "four"), "config.groups must be a whole number, such as 4; got 'four'"),
        (("--config=configs/quickstart.py", "--config.train.steps=1.5"), "got '1.5'"),
        (("--config=configs/quickstart.py", "--config.train.beta=2,0"), "config.train.beta must be a number, such as 0.5; got '2,0'"),
        (("--config=configs/quickstart.py", "--config.task.stratified=maybe"), "config.task.stratified must be True or False; got 'maybe'"),
        (("--config.groups=4", "--config=configs/quickstart.py"), "Give --config first"),
        (("--config=configs/quickstart.py:run1",), "--config=configs/quickstart.py, without an argument"),
        (("--config=configs/quickstart.py", "stray"), "stray"),
    ],
)
def test_mistakes_are_one_message_that_names_them(run, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--noconfig.train.measure_kl=False",), "--noconfig.train.measure_kl takes no value; got 'False'"),
        (("--config.groups",), "--config.groups has no value"),
        (("--config.groups", "--dry_run"), "--config.groups has no value"),
        (("--config.name", "--dry_run"), "--config.name has no value"),
        (("--config.groups=",), "must be a whole number, such as 4; got ''"),
    ],
)
def test_values_that_are_missing_or_not_allowed_are_named(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_arguments(["main", QUICKSTART, *arguments])


@pytest.mark.parametrize(
    "arguments", [("--config.name=",), ("--config.seed", "-1"), ("--noconfig.train.measure_kl",), ("--config.train.measure_kl",)]
)
def test_complete_overrides_pass(arguments):
    check_arguments(["main", QUICKSTART, *arguments])


def test_machine_requires_a_dry_run(run):
    done = run("--config=configs/quickstart.py", "--machine=h200")
    assert done.returncode == 2
    assert re.search(r"--machine=.?h200\b.*--dry_run", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_prints_flags_main_settings_and_where_to_find_the_rest(run, flag):
    done = run(flag)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = re.findall(r"^  --(?:config\.)?([a-z_.]+)", done.stdout, re.MULTILINE)
    assert shown == ["config", "workdir", *(name for name, row in settings().items() if row.tier == 1)]
    assert all(f"{name}={row.default!r}" in done.stdout for name, row in settings().items() if row.tier == 1)
    assert "docs/settings.md" in done.stdout
    assert "--helpfull" in done.stdout


def test_full_help_prints_all_settings_and_the_flags_of_libraries(run):
    done = run("--helpfull")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  --config\.([a-z_0-9.]+)=", done.stdout, re.MULTILINE) == list(settings())
    assert "--verbosity" in done.stdout


@pytest.mark.parametrize("command", ["main", pytest.param("search", marks=pytest.mark.slow)])
def test_commands_that_start_runs_explain_their_flags(command):
    done = subprocess.run([sys.executable, "-m", f"discover_jax.{command}", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"discover_jax.{command}" in done.stdout
    used_by_launch_scripts = {"workdir", "distributed", "coordinator", "num_processes", "process_id"}
    shown = set(re.findall(r"^  --([a-z_]+)", done.stdout, re.MULTILINE))
    assert {"dry_run", "machine", *used_by_launch_scripts} <= shown
    assert "--config.train.steps=10" in done.stdout


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        (
            "INTERNAL: CUDA error: Failed to check stream capturing status: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure",
            3,
            "a fault",
        ),
        ("INTERNAL: CUDA error: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered", 3, "a fault"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes. CUDA_ERROR_OUT_OF_MEMORY", 2, "Memory ran out"),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", 2, "Memory ran out"),
        ("INVALID_ARGUMENT: a bug", 1, None),
    ],
)
def test_errors_of_a_device(text, code, told, capsys):
    """After a fault of the GPU, a new process can resume, so launchers start the command again. Out of memory, it would fail again."""
    assert cli._report(jax.errors.JaxRuntimeError(text)) == code
    printed = capsys.readouterr().err
    assert text in printed
    assert ("\nerror: " in printed) == (told is not None)
    assert told is None or told in printed
