"""Damaged and planted files, a full disk, a jumping clock, a hanging worker: a clear message, and nothing lost before the last step."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from phrase_config import get_config
from tiny_run import environment, results, unbroken

from discover_jax import config as settings
from discover_jax import main
from discover_jax.archive.journal import Journal
from discover_jax.exceptions import RunError
from discover_jax.execution import Executor, ResourceLimits, sandbox
from discover_jax.execution.cache import VerdictCache
from discover_jax.learning.train_state import TrainState, adam, init_train_state
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import QuietConsole
from discover_jax.runs.host_state import HostState
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Execution, Grade, Outcome, Verdict


class Noting(QuietConsole):
    """Records the lines and notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, title: str, lines: list[str]) -> None:
        self.notes += lines

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def whole(root) -> Iterator[Path]:
    """The folder of the uninterrupted run. Runs in this process reuse its compiled functions."""
    folder = unbroken(root)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(root).items():
            patch.setenv(name, value)
        patch.setattr(sandbox, "PRELOAD", ())
        before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        yield folder
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture
def workdir(whole, tmp_path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def resume(root: Path, workdir: Path) -> str:
    """Resumes the run in this process and returns its console output."""
    console = Noting()
    main.run(settings.validate(get_config(str(root / "model"))), workdir, console=console)
    return "\n".join(console.notes)


def contents(folder: Path) -> dict[str, bytes]:
    """All files except those that every start writes again."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "disclosure.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x55
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# ---------------------------------------------------------------------- checkpoints


def state_of(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    lora = {"A": jnp.asarray(rng.normal(size=(50, 40)), jnp.float32), "B": [jnp.asarray(rng.normal(size=300), jnp.bfloat16)]}
    return init_train_state(lora, adam())


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    writer = Checkpoints(folder, keep=2, every=0)
    for step in (1, 2):
        writer.save(step, state_of(step), {"step": step, "text": "y" * 100})
    writer.close()
    return folder


def resumed(folder: Path) -> tuple[int, str]:
    """Resumes and checks the state against the step's. Returns the step and the notes."""
    notes: list[str] = []
    checkpoints = Checkpoints(folder, keep=2, every=0)
    found = checkpoints.resume(state_of(0), notes.append)
    assert found is not None
    step, state, host = found
    assert host == {"step": step, "text": "y" * 100}
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert checkpoints.latest() == step
    checkpoints.close()
    return step, "\n".join(notes)


def test_every_file_of_a_checkpoint_torn_flipped_or_gone(two_checkpoints, tmp_path):
    """Either everything is restored as it was saved, or the run resumes from the checkpoint before and the damaged one is set aside."""
    rng = random.Random(0)
    damages = {
        "deleted": lambda path: path.unlink(),
        "emptied": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[: int(rng.uniform(0.1, 0.9) * path.stat().st_size)]),
        "flipped": lambda path: flip(path, rng.random()),
        "replaced": lambda path: path.write_bytes(rng.randbytes(200)),
    }
    names = sorted(path.relative_to(two_checkpoints) for path in (two_checkpoints / "2").rglob("*") if path.is_file())
    assert len(names) > 10
    turn = itertools.cycle(damages)
    noticed = set()
    for number, (name, damage) in enumerate((name, next(turn)) for name in names for _ in range(2)):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(two_checkpoints, folder)
        damages[damage](folder / name)
        damaged = contents(folder / "2")
        step, notes = resumed(folder)
        if step == 2:
            assert not notes
            continue
        noticed.add(name)
        place = folder.with_name("checkpoints.damaged") / "2-1"
        assert re.search(rf"(?s)Checkpoint 2 is damaged: .*\bfrom checkpoint 1\b.*\bmoved to {place}", notes)
        assert contents(place) == damaged
    needed = {Path("2/host/metadata"), Path("2/train_state/_METADATA"), Path("2/train_state/manifest.ocdbt")}
    assert noticed >= needed
    assert len(noticed) > len(needed)


def test_flipped_bit_is_reported_with_the_name_of_the_array(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    flip(largest(tmp_path / "c" / "2"))
    step, notes = resumed(tmp_path / "c")
    assert step == 1
    assert "checksum mismatch in 1 arrays: lora/A." in notes


@pytest.mark.parametrize("part", ["", "host", "train_state"])
def test_missing_checkpoint_folders(two_checkpoints, tmp_path, part):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "2" / part)
    if not part:
        (tmp_path / "c" / "2").mkdir()
    step, notes = resumed(tmp_path / "c")
    assert step == 1
    assert "Checkpoint 2 is damaged" in notes


@pytest.mark.parametrize("text", ["[]", '{"item_handlers": 3}', '{"commit_timestamp_nsecs": 1%s}' % ("0" * 40), "\0"])
def test_damaged_orbax_metadata_does_not_prevent_resuming(two_checkpoints, tmp_path, monkeypatch, text):
    """This project does not use it, for example the time of writing. Also tests users without a name, as in containers."""

    def nobody(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    shutil.copytree(two_checkpoints, tmp_path / "c")
    for step in "12":
        (tmp_path / "c" / step / "_CHECKPOINT_METADATA").write_text(text)
    step, notes = resumed(tmp_path / "c")
    assert step == 2
    assert not notes
    flip(largest(tmp_path / "c" / "2"))
    step, notes = resumed(tmp_path / "c")
    assert step == 1
    assert "Checkpoint 2 is damaged" in notes


def test_damaged_checkpoints_of_one_step_are_all_kept(two_checkpoints, tmp_path):
    for number in (1, 2):
        shutil.copytree(two_checkpoints, tmp_path / "c", dirs_exist_ok=True)
        flip(tmp_path / "c" / "2" / "host" / "metadata")
        assert resumed(tmp_path / "c")[0] == 1
        assert sorted(path.name for path in (tmp_path / "c.damaged").iterdir()) == [f"2-{n}" for n in range(1, number + 1)]


def test_no_valid_checkpoint_is_an_error_and_deletes_nothing(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    flip(largest(tmp_path / "c" / "1"))
    (tmp_path / "c" / "2" / "host" / "metadata").unlink()
    before = contents(tmp_path)
    checkpoints = Checkpoints(tmp_path / "c", keep=2, every=0)
    with pytest.raises(RunError, match=r"(?s)Cannot restore any checkpoint.*checkpoint 2: .*checkpoint 1: .*\blora/A\b.*copy"):
        checkpoints.resume(state_of(0), pytest.fail)
    checkpoints.close()
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------- whole runs


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


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


# ---------------------------------------------------------------------- journal


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


# ---------------------------------------------------------------------- cached verdicts


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


# ---------------------------------------------------------------------- workers that hang


PROGRAM = """
import time
import pandas as pd
time.sleep(0.5)
def run():
    return pd.read_csv("data/sample_submission.csv")
"""


@pytest.fixture
def task(whole, tmp_path):
    return prepare_task(get_config().task.competition, raw="", reward="grade", folder=tmp_path / "task")


def stop_worker(pool: Executor, others: set[int | None]):
    """Submits a program and, while it runs, stops the worker that waits for it. Returns the future and the worker."""
    future = pool.submit(PROGRAM)
    deadline = time.monotonic() + 60
    while not future.running():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (worker,) = (c for c in multiprocessing.active_children() if c.name.startswith("execution-") and c.pid not in others)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    return future, worker


def test_hanging_worker_is_killed_and_its_program_runs_again(task, tmp_path, caplog):
    others = {child.pid for child in multiprocessing.active_children()}
    limits = ResourceLimits(seconds=4, cores=1)
    with Executor([task], limits, workers=1, cache_dir=tmp_path / "cache", grace_seconds=3) as pool:
        future, worker = stop_worker(pool, others)
        verdict = future.result(120)
        assert verdict.outcome is Outcome.OK
        assert not worker.is_alive()
    assert re.search(rf"process {worker.pid} did not reply within 7 s.*try 2 of 3", caplog.text)


def test_close_does_not_wait_for_a_hanging_worker(task, tmp_path, monkeypatch):
    """The worker's grace period would be ten minutes."""
    monkeypatch.setattr("discover_jax.execution.children._LEAVING_SECONDS", 0.5)
    others = {child.pid for child in multiprocessing.active_children()}
    pool = Executor([task], ResourceLimits(seconds=60, cores=1), workers=1, cache_dir=tmp_path / "cache")
    future, worker = stop_worker(pool, others)
    closing = threading.Thread(target=pool.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    assert not worker.is_alive()
    assert future.exception(1) is not None
