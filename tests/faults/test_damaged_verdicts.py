"""Damaged, planted and forged files of the cache of verdicts: they never become a reward."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
from damage import Payload

from discover_jax.exceptions import RunError
from discover_jax.execution.cache import VerdictCache
from discover_jax.types import Execution, Grade, Outcome, Verdict

VERDICT = Verdict(Outcome.OK, Grade(True, "", 0.5, 0.25), Execution(Outcome.OK, b"id,y\n1,0\n", "out", "", 1.5))


@pytest.fixture
def cache(tmp_path) -> VerdictCache:
    return VerdictCache(tmp_path / "cache", {"task": "t"})


@pytest.fixture
def entry(cache, tmp_path) -> Path:
    """The file with the verdict on the program "p"."""
    cache.put(cache.key("p"), VERDICT)
    (path,) = (tmp_path / "cache").glob("*/*.json")
    found = cache.get(cache.key("p"))
    assert found is not None
    assert found.grade == VERDICT.grade
    assert found.execution.cached
    return path


def nested(depth: int) -> bytes:
    return b'{"sha256": "", "verdict": ' + b'{"a": ' * depth + b"1" + b"}" * depth + b"}"


@pytest.mark.parametrize(
    "alter",
    [
        lambda data, mark: pickle.dumps(Payload(mark)),
        lambda data, mark: data.replace(b'"score": 0.5', b'"score": 0.9'),
        lambda data, mark: data.replace(b'"score": 0.5', b'"score": NaN'),
        lambda data, mark: data.replace(b'"score": 0.5', b'"score": Infinity'),
        lambda data, mark: data.replace(b'"score": 0.5', b'"score": 1e999'),
        lambda data, mark: data.replace(b'"score": 0.5', b'"score": ' + b"9" * 4000),
        lambda data, mark: data.replace(b'"score": 0.5', b'"score": ' + b"9" * 5000),
        lambda data, mark: data.replace(b'"score": 0.5', b'"score": "0.5"'),
        lambda data, mark: data.replace(b'"outcome": "ok", "grade"', b'"outcome": [], "grade"'),
        lambda data, mark: data[:-10],
        lambda data, mark: b"",
        lambda data, mark: b"\xff" + data,
        lambda data, mark: b"[]",
        *(lambda data, mark, depth=depth: nested(depth) for depth in (100, 960, 980, 990, 1000, 100_000)),
    ],
)
def test_altered_verdict_is_ignored(cache, entry, tmp_path, caplog, alter):
    """The program runs again, which is always correct, and the log says why."""
    data = entry.read_bytes()
    entry.write_bytes(alter(data, tmp_path / "mark"))
    assert entry.read_bytes() != data
    assert cache.get(cache.key("p")) is None
    assert f"verdict in {entry} is damaged" in caplog.text
    assert not (tmp_path / "mark").exists()


def test_verdict_on_another_program_is_ignored(cache, entry, tmp_path):
    """A file is copied to the name of another program, which would otherwise get its score."""
    other = cache.key("q")
    place = tmp_path / "cache" / other[:2] / f"{other}.json"
    place.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(entry, place)
    assert cache.get(other) is None


def test_forged_verdict_with_a_valid_checksum_must_be_consistent(cache, entry):
    """Whoever can write to the folder can also write checksums. But a score without a submission never becomes a reward."""
    from discover_jax.execution import cache as cache_module

    row = json.loads(entry.read_bytes())["verdict"]
    row["execution"] |= {"csv": None, "packed": ""}
    key = cache.key("p")
    entry.write_text(json.dumps({"sha256": cache_module._checksum(key, row), "verdict": row}))
    assert cache.get(key) is None


def as_link(entry: Path) -> None:
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to("elsewhere")


def folder_as_link(entry: Path) -> None:
    entry.parent.rename(entry.parent.with_name("elsewhere"))
    entry.parent.symlink_to("elsewhere")


def as_fifo(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


@pytest.mark.parametrize(
    ("make", "named", "message"),
    [
        (as_link, "entry", "Cannot read"),
        (folder_as_link, "folder", "is a link"),
        (as_fifo, "entry", "not a regular file"),
        (lambda entry: entry.chmod(0o620), "entry", "written by others .mode 620"),
        (lambda entry: entry.parent.chmod(0o702), "folder", "written by others .mode 702"),
        (lambda entry: os.truncate(entry, 2**31), "entry", "2,147,483,648 bytes"),
    ],
)
def test_verdict_that_others_could_have_written_ends_the_run(cache, entry, tmp_path, make, named, message):
    make(entry)
    with pytest.raises(RunError, match=rf"{message}.*Delete the folder {tmp_path / 'cache'}\b") as caught:
        cache.get(cache.key("p"))
    assert re.search(rf"{entry if named == 'entry' else entry.parent}[ :]", str(caught.value))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of files")
@pytest.mark.parametrize("whose", ["file", "folder", "cache"])
def test_another_user_s_verdicts_end_the_run(cache, entry, tmp_path, whose):
    owned = {"file": entry, "folder": entry.parent, "cache": tmp_path / "cache"}[whose]
    os.chown(owned, 60_598, -1)
    with pytest.raises(RunError, match=f"^{owned} belongs to another user"):
        VerdictCache(tmp_path / "cache", {"task": "t"}).get(cache.key("p"))
