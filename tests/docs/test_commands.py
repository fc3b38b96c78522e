"""Every command of README and docs: it names the test that runs it, says what it needs, or is run here, one of those with the same flags.

Whether run or not, its program, its flags and its settings exist, and its config is one that a run accepts.
"""

import ast
import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from shell_blocks import PAGES, ROOT, Command, blocks, inline_commands, shell_commands
from synthetic_run import attempt, write_run

from discover_jax.config import settings, validate

LANGUAGES = {"bash", "python", "text"}
NEEDS = {"gpu", "weights", "data", "hosts", "network", "minutes"}
OTHERS = {"source", "pip", "ray", "tensorboard", "mkdocs"}
"""Programs that are not the project's, whose flags are not looked at."""

ALL = shell_commands()
MAKEFILE = (ROOT / "Makefile").read_text()


def _id(command: Command) -> str:
    return f"{command.where}: {' '.join(command.words)[:60]}"


def test_blocks_say_their_language_and_commands_are_found():
    unknown = [
        f"{block.page}:{block.line}: {block.language!r}" for page in PAGES for block in blocks(page) if block.language not in LANGUAGES
    ]
    assert not unknown
    assert {"discover_jax.main", "discover_jax.doctor", "make quickstart", "experiments/estimators.py"} <= {each.program for each in ALL}
    assert any(each.program == "benchmarks/kernels.py" for each in inline_commands())


def test_marks_are_known():
    for command in ALL:
        assert not command.needs or not command.run_by, f"{command.where}: both needs something and is run"
        assert set(command.needs) <= NEEDS, f"{command.where} needs {command.needs}; known: {sorted(NEEDS)}"


# ---------------------------------------------------------------------- what a command is made of exists


@functools.cache
def _source(program: str) -> Path:
    """File of a Python program."""
    path = ROOT / program if program.endswith(".py") else ROOT / program.replace(".", "/")
    found = next((file for file in (path, path.with_suffix(".py"), path / "__main__.py") if file.is_file()), None)
    assert found is not None, f"there is no program {program}"
    return found


@functools.cache
def _flags(program: str) -> frozenset[str]:
    """Names of a program's flags: of main, search and doctor by absl in cli.py, of the others by argparse."""
    names = {"--help"}
    launched = re.search(r"cli\.launch\((.+)\)", _source(program).read_text())
    tree = ast.parse((ROOT / "discover_jax/cli.py" if launched else _source(program)).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args and isinstance(node.args[0], ast.Constant):
            if launched and node.func.attr.startswith("DEFINE_"):
                names.add(f"--{node.args[0].value}")
            elif not launched and node.func.attr == "add_argument":
                names.add(str(node.args[0].value))
    if launched and "," not in launched[1]:  # commands that make no runs
        names &= {"--help", "--config", "--workdir"}
    return frozenset(names)


@pytest.mark.parametrize("command", [*ALL, *inline_commands()], ids=_id)
def test_program_flags_and_settings_exist(command):
    program = command.program
    if program in OTHERS or program.startswith("-"):
        return
    if program.startswith("make "):
        target, *variables = command.words[1:]
        assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), f"make has no target {target}"
        assert all(re.search(rf"\$\({variable.split('=')[0]}\)", MAKEFILE) for variable in variables), variables
        return
    if program.endswith(".sh"):
        return
    assert command.words[0] == "python", f"{command.where}: {program} is no program that this test knows"
    for flag in command.flags:
        name = flag.split("=")[0]
        if name.startswith("--config."):
            assert name.removeprefix("--config.") in settings(), f"{name} is no setting"
        else:
            assert name in _flags(program), f"{program} has no flag {name}; it has {sorted(_flags(program))}"


@pytest.mark.parametrize("command", [each for each in [*ALL, *inline_commands()] if "discover_jax" in each.program], ids=_id)
def test_its_config_is_accepted(command, monkeypatch):
    given = dict(flag.removeprefix("--").partition("=")[::2] for flag in command.flags)
    if "config" not in given:
        return
    monkeypatch.chdir(ROOT)
    path, *argument = given["config"].split(":")
    config = runpy.run_path(path)["get_config"](*argument)
    for name, value in given.items():
        if name.startswith("config."):
            *groups, key = name.split(".")[1:]
            kind = type(settings()[name.removeprefix("config.")].default)
            node = functools.reduce(getattr, groups, config)
            node[key] = {"True": True, "False": False}[value] if kind is bool else kind(value)
    validate(config, for_run="dry_run" not in given)


def test_settings_that_pages_name_exist():
    known = settings()
    groups = {name.rsplit(".", depth)[0] for name in known for depth in (1, 2)}
    for page in PAGES:
        for name in re.findall(r"\bconfig\.([a-z_]+(?:\.[a-z_]+)*)", page.read_text()):
            assert name in known or name in groups or name.startswith(("json", "py")), f"{page.name}: config.{name} is no setting"


# ---------------------------------------------------------------------- what a command says of itself


def _made(target: str) -> str:
    """What make runs for a target, as the Makefile has it."""
    recipe = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert recipe, f"make has no target {target}"
    return recipe[1]


@pytest.mark.parametrize("command", [each for each in ALL if each.run_by], ids=_id)
def test_the_test_that_runs_it_is_there(command):
    for place in command.run_by:
        file, _, name = place.partition("::")
        text = (ROOT / file).read_text()
        if not name:  # a script, which has the command itself
            assert " ".join(command.words) in text.splitlines()
            continue
        assert name in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"
        said = _made(command.words[1]) if command.words[0] == "make" else " ".join(command.words)
        module = re.search(r"-m discover_jax\.(?:\w+\.)*(\w+)", said)
        config = re.search(r"--config=\S*?(\w+)\.py", said)
        for word in [module and module[1], config and config[1], Path(command.program).name if command.program.endswith(".sh") else None]:
            assert word is None or re.search(rf"\b{re.escape(word)}\b", text), f"{file} knows nothing of {word}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Looks like the repository, with the runs that the pages speak of."""
    place = tmp_path_factory.mktemp("repository")
    for name in ("configs", "docs", "benchmarks", "Makefile"):
        (place / name).symlink_to(ROOT / name)
    rows = [attempt(step, 0, index, "seed", "x = 1", 0.7 + 0.01 * step) for step in range(2) for index in range(2)]
    for name in ("quickstart", "longer", "train", "search", "other", "spaceship-run3"):
        write_run(place / "runs" / name, rows)
    return place


def _kinds(commands: list[Command]) -> list[Command]:
    """Of commands that differ in the flags' values alone, the first."""
    found = {(each.program, *(flag.split("=")[0] for flag in each.flags)): each for each in reversed(commands)}
    return list(reversed(found.values()))


@pytest.mark.parametrize("command", _kinds([each for each in ALL if not each.needs and not each.run_by]), ids=_id)
def test_it_runs(command, folder):
    if command.program == "source":
        return  # the environment of this very Python
    words = [sys.executable if word == "python" else word for word in command.words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
