"""Modules beside a competition's file: imported by name, part of the definition's digest, and told apart from installed ones."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks import helper_modules
from discover_jax.tasks.helper_modules import find_helpers
from discover_jax.tasks.loading import load_competition, locate_definition
from discover_jax.tasks.prepare import prepare_task


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Forgets the modules of a test."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield
    finder = next((finder for finder in sys.meta_path if isinstance(finder, helper_modules._Finder)), None)
    for name in set(finder.known if finder else {}) & (sys.modules.keys() - before):
        del sys.modules[name]


def write(folder: Path, **modules: str) -> None:
    """Writes modules; `a__b` is a/b.py."""
    for name, code in modules.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != folder:
            (path.parent / "__init__.py").touch()
        path.write_text(code)


def competition(write_competition, imports: str, prepare: str = "pass") -> Path:
    """The boats with these imports at the top."""
    path = Path(write_competition(prepare))
    path.write_text(f"{imports}\n{path.read_text()}")
    return path


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ("import one", {"one"}),
        ("from one import value", {"one"}),
        ("import numpy, one as first", {"one"}),
        ("def f():\n    import one", {"one"}),
        ("import chain", {"chain", "one"}),
        ("import kit.tools", {"kit", "kit.tools", "kit.deep", "one"}),
        ("from kit import tools", {"kit", "kit.tools", "kit.deep", "one"}),
        ("import kit", {"kit"}),
        ("import cycle_a", {"cycle_a", "cycle_b"}),
        ("import json, os.path, pandas as pd", set()),
        ("from . import one", set()),
        ("import absent", set()),
        ("not python", set()),
    ],
)
def test_helpers_are_found_in_the_text(tmp_path, imports, expected):
    write(
        tmp_path,
        one="value = 1",
        unused="1 / 0",
        chain="from one import value",
        kit__tools="from . import deep\nfrom .deep import x",
        kit__deep="import one\nx = 2",
        cycle_a="import cycle_b",
        cycle_b="import cycle_a",
    )
    assert set(find_helpers(tmp_path / "mine.py", imports.encode())) == expected


def test_helpers_are_imported_and_used(tmp_path, write_competition):
    """At the top of the file, in functions that run later, and from packages. No compiled files are left."""
    write(tmp_path, boat_rows="from boat_kit.numbers import COUNT\n", boat_kit__numbers="COUNT = 7\n", boat_later="NAME = 'later'\n")
    path = competition(
        write_competition, "import boat_rows", "import boat_later; (public / f'{boat_later.NAME}.txt').write_text(str(boat_rows.COUNT))"
    )
    task = prepare_task(str(path), raw=None, reward="grade", folder=tmp_path / "task")
    assert (task.public_dir / "later.txt").read_text() == "7"
    assert not list(tmp_path.rglob("__pycache__"))
    (tmp_path / "task.pickle").write_bytes(pickle.dumps(task))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).id)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "task.pickle")], capture_output=True, text=True, check=True, cwd="/", timeout=100
    )
    assert done.stdout.strip() == "boats"


def test_hidden_files_beside_a_competition(tmp_path, write_competition):
    """A file whose name begins with a dot, a module that begins with an underscore, and data beside it."""
    write(tmp_path, _boat_secret="NOTE = 'hidden'\n")
    (tmp_path / ".boat_notes.txt").write_text("notes")
    path = competition(
        write_competition, "import _boat_secret", "(public / 'n.txt').write_text((Path(__file__).parent / '.boat_notes.txt').read_text())"
    )
    hidden = path.rename(tmp_path / ".boats.py")
    task = prepare_task(str(hidden), raw=None, reward="grade", folder=tmp_path / "task")
    assert (task.public_dir / "n.txt").read_text() == "notes"
    assert locate_definition(str(hidden))[0] == str(hidden)


def test_changed_helper(tmp_path, write_competition):
    """A helper is part of the definition: a change is refused while a run lasts, and seen by a new one."""
    write(tmp_path, boat_name="NAME = 'a'\n")
    path = competition(write_competition, "import boat_name", "(public / 'name.txt').write_text(boat_name.NAME)")
    source, digest = locate_definition(str(path))
    first = prepare_task(str(path), raw=None, reward="grade", folder=tmp_path / "a")
    write(tmp_path, boat_name="NAME = 'b'\n")
    load_competition.__globals__["load_definition"].cache_clear()
    with pytest.raises(DataError, match=r"boats\.py, or a module beside it \(boat_name\), changed"):
        load_competition(source, digest)
    second = prepare_task(str(path), raw=None, reward="grade", folder=tmp_path / "b")
    assert [(task.public_dir / "name.txt").read_text() for task in (first, second)] == ["a", "b"]
    assert first.fingerprint != second.fingerprint
    with pytest.raises(DataError, match="helpers_sha256"):
        prepare_task(str(path), raw=None, reward="grade", folder=tmp_path / "a")


def test_folders_of_earlier_versions(tmp_path, write_competition):
    """They did not record helpers, which could be imported from the working directory."""
    write(tmp_path, boat_old="")
    path = str(competition(write_competition, "import boat_old"))
    task = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")
    record = json.loads((task.folder / "prepared.json").read_text())
    assert len(record["settings"]["definition_sha256"]) == len(record["settings"].pop("helpers_sha256")) == 64
    (task.folder / "prepared.json").write_text(json.dumps(record))
    old = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")
    assert old.fingerprint != task.fingerprint
    assert "helpers_sha256" not in dict(old.settings)


def test_digest_without_helpers_is_that_of_the_file(write_competition):
    assert "+" not in locate_definition(write_competition())[1]


@pytest.mark.parametrize("name", ["json", "sys", "pandas", "colorsys", "zlib"])
def test_helper_with_the_name_of_an_installed_module_is_refused(tmp_path, write_competition, name):
    write(tmp_path, **{name: ""})
    with pytest.raises(ConfigError, match=rf"'{name}'.*{name}\.py.*Rename"):
        load_competition(*locate_definition(str(competition(write_competition, f"import {name}"))))


def test_unused_modules_beside_the_file_do_not_matter(tmp_path, write_competition):
    write(tmp_path, json="1 / 0", colorsys="1 / 0", notes="1 / 0")
    assert load_competition(*locate_definition(write_competition())).id == "boats"
    with pytest.raises(ImportError):
        __import__("notes")


def test_two_competitions_with_helpers_of_one_name(tmp_path, write_competition):
    paths = []
    for folder, value in (("a", 1), ("b", 2), ("c", 1)):
        write(tmp_path / folder, boat_shared=f"VALUE = {value}\n")
        path = competition(write_competition, "import boat_shared")
        paths.append(str(path.rename(tmp_path / folder / "boats.py")))
    load_competition(*locate_definition(paths[0]))
    load_competition(*locate_definition(paths[2]))  # the same module
    with pytest.raises(ConfigError, match=r"b/boats\.py.*'boat_shared'.*b/boat_shared\.py.*Rename"):
        load_competition(*locate_definition(paths[1]))


def test_helper_that_fails_is_reported(tmp_path, write_competition):
    write(tmp_path, boat_broken="1 / 0")
    with pytest.raises(ConfigError, match=r"(?s)boats\.py failed while loading.*boat_broken\.py.*ZeroDivisionError"):
        load_competition(*locate_definition(str(competition(write_competition, "import boat_broken"))))


def test_our_own_package_beside_the_file_is_not_a_helper(write_competition):
    code = b"from discover_jax.tasks.competition import Competition"
    assert find_helpers(Path(__file__).parents[2] / "mine.py", code) == {}


def test_helpers_of_the_working_directory(tmp_path, write_competition, monkeypatch):
    """`python -m` has the working directory on its path; the digest does not depend on it."""
    write(tmp_path, boat_cwd="VALUE = 3\n")
    path = str(competition(write_competition, "import boat_cwd"))
    elsewhere = locate_definition(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate_definition(path) == elsewhere
    assert load_competition(*elsewhere).id == "boats"
