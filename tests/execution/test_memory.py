"""Memory limits: control groups, causes of kills, measurement without groups, and waiting for free memory."""

import collections
import dataclasses
import errno
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_competition import GOOD, GOOD_SCORE, LIMITS

from discover_jax.exceptions import SandboxError
from discover_jax.execution import Executor, admission, bubblewrap, memory, sandbox
from discover_jax.execution.admission import Admission
from discover_jax.execution.limits import GIB, MIB
from discover_jax.types import Outcome

pytestmark = pytest.mark.sandbox


_FILES = {
    1: (
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.oom_control",
        "cgroup.procs",
    ),
    2: ("memory.max", "memory.swap.max", "memory.oom.group", "memory.events", "pids.max", "cgroup.procs"),
}


def make_group(version: int, folder: Path) -> memory.Group:
    """A group of plain files, laid out as in the kernel's documentation: a machine has writable groups of at most one version."""
    real_mkdir = Path.mkdir

    def mkdir_like_kernel(self, *args, **kwargs):
        real_mkdir(self, *args, **kwargs)
        for name in _FILES[version]:
            (self / name).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(folder), "mkdir", mkdir_like_kernel)
        return memory.Group(memory.Cgroups(version, folder, folder if version == 2 else None), "0-0", 1 << 30, 256)


def test_control_group_of_version_2(tmp_path):
    group, folder = make_group(2, tmp_path), tmp_path / f"discover_jax-{os.getpid()}-0-0"
    assert [(folder / name).read_text() for name in ("memory.max", "memory.swap.max", "memory.oom.group", "pids.max")] == [
        str(1 << 30),
        "0",
        "1",
        str(256 + 16),
    ]
    assert group.procs_files == [str(folder / "cgroup.procs")]
    group.kill()  # without cgroup.kill, as in kernels before 5.14
    assert not (folder / "cgroup.kill").exists()
    (folder / "cgroup.kill").touch()
    group.kill()
    assert (folder / "cgroup.kill").read_text() == "1"


_EVENTS = "low 0\nhigh 0\nmax {}\noom {}\noom_kill {}\noom_group_kill 0\n"
_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


def _most(memory: int, with_swap: int | None) -> dict[str, str | None]:
    """The peak usage of a group of version 1; None for swap if it is not accounted."""
    return {"memory.max_usage_in_bytes": f"{memory}\n", "memory.memsw.max_usage_in_bytes": None if with_swap is None else f"{with_swap}\n"}


@pytest.mark.parametrize(
    ("version", "files", "exceeded"),
    [
        (2, {"memory.events": _EVENTS.format(0, 0, 0)}, False),
        (2, {"memory.events": _EVENTS.format(12, 1, 0)}, False),  # an allocation failed without a kill: the program handles it
        (2, {"memory.events": _EVENTS.format(12, 1, 3)}, True),
        (2, {"memory.events": _EVENTS.format(0, 0, 1)}, None),
        (2, {"memory.events": _EVENTS.format(900, 0, 1)}, None),  # file pages were reclaimed at its limit; an outer group killed it
        (1, {"memory.oom_control": _CONTROL.format(0), **_most(1 << 30, 1 << 30)}, False),
        (1, {"memory.oom_control": _CONTROL.format(1), **_most(1 << 30, 1 << 30)}, True),
        (1, {"memory.oom_control": _CONTROL.format(1), **_most((1 << 30) - 8192, 1 << 30)}, True),
        (1, {"memory.oom_control": _CONTROL.format(1), **_most(1 << 29, 1 << 29)}, None),
        (1, {"memory.oom_control": _CONTROL.format(1), **_most(1 << 29, None)}, None),
    ],
)
def test_kill_is_the_programs_fault_only_at_its_own_limit(tmp_path, version, files, exceeded):
    group, folder = make_group(version, tmp_path), tmp_path / f"discover_jax-{os.getpid()}-0-0"
    for name, text in files.items():
        if text is not None:
            (folder / name).write_text(text)
    if exceeded is None:
        with pytest.raises(SandboxError, match="memory"):
            group.exceeded()
    else:
        assert group.exceeded() is exceeded


def test_group_that_stays_busy_is_logged(tmp_path, monkeypatch, caplog):
    def busy(_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    group, folder = make_group(2, tmp_path), tmp_path / f"discover_jax-{os.getpid()}-0-0"
    (folder / "cgroup.procs").write_text("71\n72\n")
    monkeypatch.setattr(type(tmp_path), "rmdir", busy)
    monkeypatch.setattr(memory, "_REMOVE_TRIES", 2)
    with caplog.at_level(logging.WARNING):
        group.remove()
    (record,) = caplog.records
    assert re.search(rf"{folder}\b.*\b71, 72\b", record.getMessage())


@pytest.fixture
def narrow(spec):
    """Control groups below one with 250 MiB, as in a container; less than the limit of a program."""
    if spec.cgroups is None:
        pytest.skip("needs a control group that can be divided")
    folder = spec.cgroups.memory / f"discover_jax-{os.getpid()}-narrow"
    folder.mkdir()
    try:
        if spec.cgroups.version == 1:
            (folder / "memory.limit_in_bytes").write_text(str(250 * MIB))
        else:
            (folder / "memory.max").write_text(str(250 * MIB))
            (folder / "memory.swap.max").write_text("0")
            (folder / "cgroup.subtree_control").write_text("+memory")
        yield memory.Cgroups(spec.cgroups.version, folder, None)
    finally:
        folder.rmdir()


def test_container_out_of_memory_is_never_a_verdict(task, tmp_path, monkeypatch, narrow, caplog):
    monkeypatch.setattr(memory, "find_cgroups", lambda: narrow)
    hoard = "def run():\n    hold = []\n    while True:\n        hold.append(bytearray(b'x') * 20_000_000)\n"
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path) as pool:
        with caplog.at_level(logging.WARNING), pytest.raises(SandboxError, match=r"\b3\b[\s\S]*memory"):
            pool.submit(hoard).result(60)
        assert list(tmp_path.iterdir()) == []
        assert pool.retries == 2
        assert sum(re.search(r"\b[23]\D+3\b", record.getMessage()) is not None for record in caplog.records) == 2  # tries 2 and 3 of 3
        assert pool.submit(GOOD).result(60).grade.score == GOOD_SCORE


def test_memory_of_a_process_tree_counts_children():
    child = "data = bytearray(b'x') * 80_000_000; print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-S", "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert 80_000_000 <= memory.tree_bytes(process.pid) < 200_000_000
    finally:
        process.communicate(b"\n", timeout=10)
    assert memory.tree_bytes(process.pid) == 0


def test_without_a_control_group_empty_files_count(spec, run_with):
    """An empty file takes about a kilobyte of kernel memory and adds nothing to the folder's size."""
    weaker = dataclasses.replace(spec, cgroups=None)
    make = (
        "import os\ndef run():\n    for number in range(5_000_000):\n        os.mknod(f'f{number}')\n    raise RuntimeError('all made')\n"
    )
    began = time.monotonic()
    execution = run_with(weaker, make)
    assert (execution.outcome, execution.detail) == (Outcome.OUT_OF_MEMORY, "it used more than 0.88 GiB of memory")
    assert time.monotonic() - began < 50


def test_folder_bytes_of_files_with_and_without_content(spec):
    """Measured while the program waits: after creating a thousand empty files, then after one of 8 MiB in another folder."""
    box = sandbox.start(dataclasses.replace(spec, cgroups=None, limits=dataclasses.replace(spec.limits, seconds=4)))
    made = "[open(f'f{number}', 'w').close() for number in range(1000)]\ntime.sleep(1.5)\n"
    program = f"import time\n{made}open('/tmp/content', 'wb').write(bytes({8 * MIB}))\ntime.sleep(60)\n"
    seen: collections.Counter[int] = collections.Counter()
    try:
        box.wait_ready()
        before = memory.folder_bytes(box.pid, bubblewrap.WRITABLE)
        running = threading.Thread(target=box.run, args=(program,))
        running.start()
        while running.is_alive():
            seen[memory.folder_bytes(box.pid, bubblewrap.WRITABLE) - before] += 1
            time.sleep(0.02)
    finally:
        box.close()
    empty, whole = sorted(number for number, looks in seen.items() if looks > 3)[
        -2:
    ]  # values seen once or twice are from files being written
    assert 1000 * 960 <= empty <= 1000 * 2000  # 960 bytes each: the measured growth of a control group
    assert 8 * MIB + 1000 * 960 <= whole <= 8 * MIB + 1000 * 2000


def write_files(folder: Path, **texts: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    return folder


def test_free_memory_is_bounded_by_the_tightest_limit(tmp_path, monkeypatch):
    """Limits of this group and of those above it, in both versions. Only pages of files on disk count as free."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(admission, "own_folder", lambda _: None)
    assert admission.memory_limit() == machine
    assert 0 < admission.available_bytes() < machine

    stat = "anon 9\nactive_file 30000000\ninactive_file 50000000\n"
    outer = write_files(tmp_path / "outer", memory__max=600_000_000, memory__current=500_000_000, memory__stat=stat)
    inner = write_files(outer / "inner", memory__max="max", memory__current=300_000_000, memory__stat="active_file 0\n")
    monkeypatch.setattr(admission, "own_folder", lambda controller: inner if controller == "" else None)
    assert admission.memory_limit() == 600_000_000
    assert admission.available_bytes() == 180_000_000
    (inner / "memory.max").write_text("350000000\n")
    assert admission.memory_limit() == 350_000_000
    assert admission.available_bytes() == 50_000_000

    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 40000000\ntotal_active_file 10000000\n"
    limits = {"memory__limit_in_bytes": 400_000_000, "memory__usage_in_bytes": 350_000_000, "memory__stat": stat}
    old = write_files(tmp_path / "old", **limits)
    monkeypatch.setattr(admission, "own_folder", lambda controller: old if controller == "memory" else None)
    assert admission.memory_limit() == 400_000_000
    assert admission.available_bytes() == 100_000_000
    (old / "memory.usage_in_bytes").write_text("500000000\n")  # above the limit, which was lowered
    assert admission.available_bytes() == 0
    write_files(old, **{**limits, "memory__limit_in_bytes": 9223372036854771712})  # the kernel's value for no limit
    assert admission.memory_limit() == machine


class Door:
    """Programs that ask an Admission for entry, each in a thread, and stay until released."""

    def __init__(self, admitting: Admission) -> None:
        self._admission = admitting
        self._entered: list[threading.Event] = []
        self._go: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self.closed = threading.Event()

    def ask(self) -> int:
        number, entered, go = len(self._threads), threading.Event(), threading.Event()

        def program() -> None:
            with self._admission.program(self.closed.is_set):
                entered.set()
                go.wait()

        self._entered.append(entered)
        self._go.append(go)
        self._threads.append(threading.Thread(target=program, daemon=True))
        self._threads[-1].start()
        while len(self._admission._waiting) + sum(event.is_set() for event in self._entered) < number + 1:
            time.sleep(0.001)  # until it is in the queue, so that the order is known
        return number

    def is_in(self, number: int, seconds: float = 0.0) -> bool:
        return self._entered[number].wait(seconds)

    def leave(self, number: int) -> None:
        self._go[number].set()
        self._threads[number].join(10)


def test_program_starts_only_if_memory_is_free_for_it_and_all_running_ones():
    free = [2000]
    door = Door(Admission(1000, available=lambda: free[0]))
    first, second, third = door.ask(), door.ask(), door.ask()
    assert door.is_in(first, 5)
    assert door.is_in(second, 5)
    assert not door.is_in(third, 0.5)  # needs 3000: the two that run have not used any memory yet
    free[0] = 3000
    assert door.is_in(third, 5)  # no program left, but other processes freed memory
    for number in (first, second, third):
        door.leave(number)


def test_one_program_may_always_run_and_order_is_kept():
    door = Door(Admission(1000, available=lambda: 0))
    numbers = [door.ask() for _ in range(4)]
    for at, number in enumerate(numbers):
        assert door.is_in(number, 5)
        time.sleep(0.3)  # longer than the interval at which the others check again
        assert [door.is_in(later) for later in numbers[at + 1 :]] == [False] * (3 - at)
        door.leave(number)


def test_cancelled_programs_do_not_block_admission():
    door = Door(Admission(1000, available=lambda: 0))
    first, second = door.ask(), door.ask()
    assert door.is_in(first, 5)
    assert not door.is_in(second, 0.3)
    door.closed.set()
    assert door.is_in(second, 5)


def test_failing_measurement_is_raised_and_blocks_no_other_program():
    def broken() -> int:
        raise OSError("no /proc")

    admitting = Admission(1000, available=broken)
    with admitting.program(lambda: False), pytest.raises(OSError, match="no /proc"), admitting.program(lambda: False):
        pass
    with admitting.program(lambda: False):
        pass


# Programs that may overlap take longer, so that they do even on a busy machine.
@pytest.mark.parametrize(("programs_worth", "seconds", "overlap"), [(1, 1.5, False), pytest.param(2, 5.0, True, marks=pytest.mark.slow)])
def test_without_a_control_group_programs_wait_for_each_others_memory(task, tmp_path, monkeypatch, programs_worth, seconds, overlap):
    monkeypatch.setattr(memory, "find_cgroups", lambda: None)
    free = programs_worth * LIMITS.memory_bytes
    monkeypatch.setattr("discover_jax.execution.local.Admission", lambda limit: Admission(limit, available=lambda: free))
    program = "import time\nprint(time.monotonic())\ntime.sleep({})\nprint(time.monotonic())\n" + GOOD
    with Executor([task], LIMITS, workers=2, cache_dir=tmp_path) as pool:
        assert "a program starts once the memory for it is free" in pool.describe()
        warm = [pool.submit(f"{GOOD}# {number}\n") for number in range(2)]
        assert [future.result(60).grade.score for future in warm] == [GOOD_SCORE] * 2
        verdicts = [future.result(60) for future in [pool.submit(program.format(seconds + more)) for more in (0.0, 0.1)]]
    assert [verdict.grade.score for verdict in verdicts] == [GOOD_SCORE] * 2
    (a, b), (c, d) = sorted(tuple(map(float, verdict.execution.stdout.split())) for verdict in verdicts)
    assert a < b
    assert c < d
    assert (c < b) is overlap


def test_summary_uses_the_memory_of_the_container(pool, monkeypatch):
    monkeypatch.setattr("discover_jax.execution.summary.memory_limit", lambda: GIB)
    assert re.search(r"\b1 GiB", pool.describe())
    monkeypatch.setattr("discover_jax.execution.summary.memory_limit", lambda: 2 * GIB)
    assert not re.search(r"\b2 GiB", pool.describe())
