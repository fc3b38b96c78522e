"""A run with damaged and planted files, a full disk or a jumping clock: a clear message, and nothing lost before the last step."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import Payload, contents, flip, largest
from phrase_config import get_config
from tiny_run import results, unbroken

from discover_jax import config as settings
from discover_jax import main
from discover_jax.archive.journal import Journal
from discover_jax.exceptions import RunError
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import QuietConsole
from discover_jax.runs.host_state import HostState


class Noting(QuietConsole):
    """Records the lines and notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, title: str, lines: list[str]) -> None:
        self.notes += lines

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def whole(root, in_this_process) -> Path:
    """The folder of the uninterrupted run."""
    return unbroken(root)


@pytest.fixture
def workdir(whole, tmp_path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def resume(root: Path, workdir: Path) -> str:
    """Resumes the run in this process and returns its console output."""
    console = Noting()
    main.run(settings.validate(get_config(str(root / "model"))), workdir, console=console)
    return "\n".join(console.notes)


@pytest.mark.slow  # other tests damage checkpoints and verdicts one by one
def test_run_recovers_from_damaged_and_planted_files(root, whole, workdir, tmp_path):
    """Pickles with a payload replace the last checkpoint and all cached verdicts. The checkpoint before has one flipped bit."""
    payload = pickle.dumps(Payload(tmp_path / "mark"))
    planted = [path for folder in ("cache", "checkpoints/3") for path in (workdir / folder).rglob("*") if path.is_file()]
    assert len(planted) > 20
    for path in planted:
        path.write_bytes(payload)
    flip(largest(workdir / "checkpoints" / "2"))
    said = resume(root, workdir)
    for step in (3, 2):
        assert re.search(rf"(?s)Checkpoint {step} is damaged.*\bfrom checkpoint 1\b", said)
    assert re.search(r"\bresume[sd]\b.*\bstep 2\b", said)
    assert not (tmp_path / "mark").exists()
    assert results(workdir) == results(whole)
    assert {path.name for path in (workdir / "checkpoints.damaged").iterdir()} == {"2-1", "3-1"}
    rows = {json.loads(line)["id"] for line in (workdir / "journal.discarded.jsonl").read_text().splitlines()}
    assert rows == {attempt.id for attempt in Journal(whole / "journal.jsonl").read() if attempt.step >= 2}


def damage_all_checkpoints(workdir: Path) -> None:
    for folder in (workdir / "checkpoints").iterdir():
        flip(largest(folder))


def delete_all_checkpoints(workdir: Path) -> None:
    for folder in (workdir / "checkpoints").iterdir():
        shutil.rmtree(folder)


def raise_a_reward(workdir: Path) -> None:
    """Changes one digit, so that the file keeps its length."""
    path = workdir / "journal.jsonl"
    text = path.read_text()
    start = text.index('"reward": 0.') + len('"reward": 0.')
    path.write_text(text[:start] + ("9" if text[start] != "9" else "8") + text[start + 1 :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # Slow, because test_no_valid_checkpoint_is_an_error_and_deletes_nothing covers it without a run.
        pytest.param(damage_all_checkpoints, r"(?s)Cannot restore any checkpoint.*checkpoint 3: ", marks=pytest.mark.slow),
        (delete_all_checkpoints, r"journal\b.*\b4 steps\b.*\bno checkpoint\b"),
        (raise_a_reward, r"journal\b.*altered since the checkpoint.*\b24 rows\b"),
    ],
)
def test_irreparable_damage_is_one_error_and_changes_nothing(root, workdir, damage, message):
    damage(workdir)
    before = contents(workdir)
    with pytest.raises(RunError, match=message):
        resume(root, workdir)
    assert contents(workdir) == before


@pytest.mark.slow  # another test finds every reading of the wall clock
def test_jumping_clock_changes_nothing(root, whole, workdir, monkeypatch):
    """Repeats the last step while each reading of the clock gives another year; files are from the future and the distant past."""
    shutil.rmtree(workdir / "checkpoints" / "3")
    rng = random.Random(0)
    for path in workdir.rglob("*"):
        os.utime(path, (moment := rng.choice([0, 4e9]), moment))
    asked = []

    def clock() -> float:
        asked.append(rng.uniform(0, 4e9))
        return asked[-1]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", clock)
        patch.setattr(time, "time_ns", lambda: int(1e9 * clock()))
        said = resume(root, workdir)
    assert asked  # orbax writes the time
    assert re.search(r"\bresume[sd]\b.*\bstep 3\b", said)
    assert results(workdir) == results(whole)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["programs/cached_frac"] == 1.0
    assert all(value is None or value >= 0 for name, value in last.items() if name.startswith("time/"))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=3, every=0, read_only=True)
    assert checkpoints.latest() == 3
    checkpoints.close()
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_no_process_of_a_run_reads_the_date():
    """Covers workers and sandboxes, whose clocks the test above cannot set: they use only monotonic clocks and no times of files.

    TensorBoard's events and the lock of the run directory contain a date for display; no decision depends on it.
    """
    calls = r"\btime\.(time|time_ns|ctime|gmtime|localtime|strftime)\b|\.(now|utcnow|today)\("
    wall_clocks = re.compile(rf"{calls}|CLOCK_REALTIME|st_[mac]time|getmtime")
    package = Path(main.__file__).parent
    asking = [str(path.relative_to(package)) for path in package.rglob("*.py") if wall_clocks.search(path.read_text())]
    assert sorted(asking) == ["runs/event_files.py", "runs/lock.py"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode == 0
    )
    if not mounted:
        pytest.skip(
            "needs root, to mount a small disk. Other tests simulate a full disk for each writer: checkpoints, metrics, best/ and files"
            " in tests/runs, the journal in tests/archive"
        )
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, pages: int) -> None:
    """Fills the disk up to `pages` free pages of 4 KiB."""
    with (disk / "filler").open("wb") as file:
        space = os.statvfs(disk)
        file.write(bytes(max(0, space.f_bavail * space.f_frsize - 4096 * pages)))
    space = os.statvfs(disk)
    assert space.f_bavail * space.f_frsize == 4096 * pages


def test_full_disk(root, whole, small_disk):
    """No space at first, then a little more each time, so that different writers fail; finally enough."""
    workdir = Path(shutil.copytree(whole, small_disk / "run"))
    shutil.rmtree(workdir / "checkpoints" / "3")
    kept = {name: data for name, data in contents(workdir).items() if name.startswith(("checkpoints", "best", "config"))}
    told = set()
    for pages in (0, 1, 9):
        fill(small_disk, pages)
        with pytest.raises(RunError, match=r"Free some space(?s:.)*resumes?\b") as caught:
            resume(root, workdir)
        told.add(re.split(r" \(|: ", str(caught.value).replace(str(workdir), "RUN"))[0])  # without the operating system's reason
        assert kept.items() <= contents(workdir).items()
    assert len(told) == 3, told
    (small_disk / "filler").unlink()
    assert re.search(r"\bresume[sd]\b.*\bstep 3\b", resume(root, workdir))
    assert results(workdir) == results(whole)


@pytest.fixture
def stand(workdir) -> HostState:
    """The host state of the last checkpoint, with position and checksum of the journal."""
    metadata = json.loads((workdir / "checkpoints" / "3" / "host" / "metadata").read_bytes())
    return HostState.from_json(metadata["host"], 3)


def rows_edited(edit):
    """Turns an edit of the journal's rows into an edit of the file's bytes."""

    def of_bytes(data: bytes) -> bytes:
        rows = data.splitlines(keepends=True)
        edit(rows)
        return b"".join(rows)

    return of_bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.replace(b'{"id": "0001-000-001"', b'{"id"; "0001-000-001"'), "Line 8 of the journal .* is damaged"),
        (lambda data: data.replace(b'{"id": "0001-000-001"', b'{"id": "\xff001-000-001"'), "Line 8 of the journal .* is damaged"),
        (lambda data: data.replace(b'"tokens": ', b'"tokens": NaN, "t": ', 1), r"Line 1 of the journal .*\bNaN\b"),
        (lambda data: data.replace(b'"tokens": ', b'"tokens": 1' + b"0" * 5000, 1), "Line 1 of the journal .* is damaged"),
        (lambda data: data.replace(b'"tokens": ', b'"tokens": 1' + b"0" * 50, 1), r"Line 1 of the journal .*\btokens\b.*\bbits\b"),
        (
            lambda data: data.replace(b'"reward": 0', b'"reward": ' + b"[" * 3000 + b"]" * 3000, 1),
            "Line 1 of the journal .* is damaged",
        ),
        (lambda data: data.replace(b'"reward": 0.', b'"reward": 1.', 1), "altered since the checkpoint"),
        (lambda data: data.replace(b"fox", b"owl", 1), "altered since the checkpoint"),
        (rows_edited(lambda rows: rows.reverse()), "altered since the checkpoint"),
        (rows_edited(lambda rows: rows.pop(3)), "rows were deleted"),
        (rows_edited(lambda rows: rows.pop()), "rows were deleted"),
        (rows_edited(lambda rows: rows.insert(3, rows[4])), "altered since the checkpoint"),
        (lambda data: data[:-7], "rows were deleted"),
        (lambda data: b"", "rows were deleted"),
    ],
)
def test_altered_journal_is_refused(workdir, stand, damage, message):
    path = workdir / "journal.jsonl"
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(RunError, match=message):
        Journal(path).resume(stand.journal_position, stand.journal_sha256)
    assert path.read_bytes() == damaged
    assert not path.with_name("journal.discarded.jsonl").exists()


@pytest.mark.parametrize("tail", [b'{"id": "0004-000', b"\x00" * 4096, b'{"id": "0004-000-000"}\n', b"\xff\n{"])
def test_rows_after_the_last_checkpoint_are_set_aside(workdir, stand, tail):
    """Rows of an unfinished step, a row cut off by a kill, or zeros that some disks leave after a power failure."""
    path = workdir / "journal.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + tail)
    rows = Journal(path).resume(stand.journal_position, stand.journal_sha256)
    assert len(rows) == 24
    assert path.read_bytes() == before
    assert path.with_name("journal.discarded.jsonl").read_bytes().rstrip(b"\n") == tail.rstrip(b"\n")


@pytest.mark.parametrize(
    "change",
    [
        {"first_step": -1},
        {"first_step": 4},
        {"first_step": True},
        {"journal_position": -1},
        {"journal_position": 10**400},
        {"journal_position": 1.5},
        {"journal_sha256": None},
        {"archive": {}},
        {"more": 1},
    ],
)
def test_invalid_host_state_is_refused(stand, change):
    with pytest.raises(RunError, match="host state of checkpoint 3 is invalid"):
        HostState.from_json(stand.to_json() | change, 3)
    assert HostState.from_json(stand.to_json(), 3) == stand
