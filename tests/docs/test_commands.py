"""Every command in README and docs names the test that runs it, says what it needs, or runs here (once per set of flags).

In all cases its program, flags and settings exist, and a run accepts its config.
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
NEEDS = {"gpu", "tpu", "weights", "data", "hosts", "network", "minutes"}
OTHERS = {"source", "export", "pip", "ray", "tensorboard", "mkdocs", "docker", "kubectl", "gcloud", "sbatch", "sed", "ssh-add", "hf"}
"""External programs; their flags are not checked."""

ALL = shell_commands()
MAKEFILE = (ROOT / "Makefile").read_text()


def _id(command: Command) -> str:
    return f"{command.where}: {' '.join(command.words)[:60]}"


def test_blocks_name_their_language_and_commands_are_found():
    unknown = [
        f"{block.page}:{block.line}: {block.language!r}" for page in PAGES for block in blocks(page) if block.language not in LANGUAGES
    ]
    assert not unknown
    assert {"discover_jax.main", "make quickstart"} <= {each.program for each in ALL}
    assert len(ALL) >= 20
    assert inline_commands()


def test_marks_are_known():
    for command in ALL:
        assert not command.needs or not command.run_by, f"{command.where}: both needs something and is run"
        assert set(command.needs) <= NEEDS, f"{command.where} needs {command.needs}; known: {sorted(NEEDS)}"


# ---------------------------------------------------------------------- programs, flags and settings


@functools.cache
def _source(program: str) -> Path:
    """The file of a Python program."""
    path = ROOT / program if program.endswith(".py") else ROOT / program.replace(".", "/")
    found = next((file for file in (path, path.with_suffix(".py"), path / "__main__.py") if file.is_file()), None)
    assert found is not None, f"program not found: {program}"
    return found


@functools.cache
def _flags(program: str) -> frozenset[str]:
    """The flags of a program. main, search and doctor define theirs with absl in cli.py, the others with argparse."""
    names = {"--help"}
    launched = re.search(r"cli\.launch\((.+)\)", _source(program).read_text())
    tree = ast.parse((ROOT / "discover_jax/cli.py" if launched else _source(program)).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args and isinstance(node.args[0], ast.Constant):
            if launched and node.func.attr.startswith("DEFINE_"):
                names.add(f"--{node.args[0].value}")
            elif not launched and node.func.attr == "add_argument":
                names.add(str(node.args[0].value))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "add_mesh":  # of benchmarks/measuring.py
            names |= {"--data", "--expert"}
    if launched and "," not in launched[1]:  # commands that do not start a run
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
    assert command.words[0] == "python", f"{command.where}: this test does not know the program {program}"
    for flag in command.flags:
        name = flag.split("=")[0]
        if name.startswith("--config."):
            assert name.removeprefix("--config.") in settings(), f"{name} is not a setting"
        else:
            assert name in _flags(program), f"{program} has no flag {name}; it has {sorted(_flags(program))}"


@pytest.mark.parametrize("command", [each for each in [*ALL, *inline_commands()] if "discover_jax" in each.program], ids=_id)
def test_config_is_valid(command, monkeypatch):
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


def test_settings_named_on_pages_exist():
    known = settings()
    groups = {name.rsplit(".", depth)[0] for name in known for depth in (1, 2)}
    for page in PAGES:
        for name in re.findall(r"(?<![\w.])config\.([a-z_]+(?:\.[a-z_]+)*)", page.read_text()):
            assert name in known or name in groups or name.startswith(("json", "py")), f"{page.name}: config.{name} is not a setting"


# ---------------------------------------------------------------------- marks


def _made(target: str) -> str:
    """The recipe of a target in the Makefile."""
    recipe = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert recipe, f"make has no target {target}"
    return recipe[1]


@pytest.mark.parametrize("command", [each for each in ALL if each.run_by], ids=_id)
def test_the_test_that_runs_a_command_exists(command):
    for place in command.run_by:
        file, _, name = place.partition("::")
        text = (ROOT / file).read_text()
        if not name:  # a script with the same command
            assert " ".join(command.words) in text.splitlines()
            continue
        assert name in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"
        said = _made(command.words[1]) if command.words[0] == "make" else " ".join(command.words)
        module = re.search(r"-m discover_jax\.(?:\w+\.)*(\w+)", said)
        config = re.search(r"--config=\S*?(\w+)\.py", said)
        for word in [module and module[1], config and config[1], Path(command.program).name if command.program.endswith(".sh") else None]:
            assert word is None or re.search(rf"\b{re.escape(word)}\b", text), f"{file} does not use {word}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the repository with the runs that the pages mention."""
    place = tmp_path_factory.mktemp("repository")
    for name in ("configs", "docs", "benchmarks", "Makefile"):
        (place / name).symlink_to(ROOT / name)
    rows = [attempt(step, 0, index, "seed", "x = 1", 0.7 + 0.01 * step) for step in range(2) for index in range(2)]
    for name in ("quickstart", "longer", "train", "search", "other", "spaceship-run3"):
        write_run(place / "runs" / name, rows)
    return place


def _kinds(commands: list[Command]) -> list[Command]:
    """The first of the commands that differ only in the values of their flags."""
    found = {(each.program, *(flag.split("=")[0] for flag in each.flags)): each for each in reversed(commands)}
    return list(reversed(found.values()))


@pytest.mark.parametrize("command", _kinds([each for each in ALL if not each.needs and not each.run_by]), ids=_id)
def test_command_runs(command, folder):
    if command.program == "source":
        return  # activates the environment that runs this test
    words = [sys.executable if word == "python" else word for word in command.words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
