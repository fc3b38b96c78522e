"""kill -9 of the main process, workers and sandboxed programs at random moments of a real run: its results stay the same."""

import contextlib
import dataclasses
import itertools
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_run import STEPS, command, environment, results, unbroken

from discover_jax.runs.metrics import read_metrics

SLOW_DISK = 0.3
SECONDS = {
    "starting": 2.0,
    "writing": SLOW_DISK + 0.1,
    "committing": SLOW_DISK + 0.02,
    "sampling": 0.02,
    "running programs": 1.0,
    "learning": 0.012,
    "saving": 0.15,
}
"""Approximate seconds of each phase; the moment of a kill is drawn from it. The announcement takes a millisecond to arrive.

While a checkpoint is written and committed in the background, the next step samples and runs programs.
"""


@dataclasses.dataclass(frozen=True)
class Kill:
    """What to kill: `delay` seconds after the next such phase starts."""

    victim: str  # "main", "worker" or "sandbox"
    phase: str
    delay: float


def draw_kills(victims: Sequence[str], seed: int) -> list[Kill]:
    """One kill for each victim. The main process is killed in each phase in turn, the others at any moment of a step."""
    rng = random.Random(seed)
    phases_of_main = itertools.cycle(rng.sample(list(SECONDS), len(SECONDS)))
    kills = []
    for victim in victims:
        phase = next(phases_of_main) if victim == "main" else "sampling"
        seconds = SECONDS[phase] if victim == "main" else sum(map(SECONDS.__getitem__, ("running programs", "learning", "saving")))
        kills.append(Kill(victim, phase, rng.uniform(0, seconds)))
    return kills


class Start:
    """One start of the run: its process and the phases that it has announced."""

    def __init__(self, root: Path, workdir: Path, steps: int, log: Path):
        self._log = log.open("w")
        self.process = subprocess.Popen(
            command(root, workdir, steps),
            env=environment(root, DISCOVER_TEST_SLOW_DISK=str(SLOW_DISK)),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._news = threading.Condition()
        self._phases = ["starting"]  # all phases so far
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("phase "):
                with self._news:
                    self._phases.append(line.removeprefix("phase ").strip())
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def await_phase(self, name: str, seconds: float = 120) -> bool:
        """Waits for the next phase of this name to start; False if the run ends first. ("starting" has started and may have ended.)"""
        if name == "starting":
            return True
        with self._news:
            seen = len(self._phases)
            assert self._news.wait_for(lambda: name in self._phases[seen:] or self._ended, seconds), f"no phase {name!r} any more"
            return name in self._phases[seen:]

    @property
    def phase(self) -> str:
        return self._phases[-1]

    def end(self, signal_number: int | None = None) -> int:
        """Sends the signal, if one is given, waits for the process and returns its exit code."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        code = self.process.wait(300)
        self._reader.join()
        self._log.close()
        return code


def children() -> dict[int, list[int]]:
    """The pids of each process's children, oldest first."""
    found: dict[int, list[tuple[int, int]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found.setdefault(int(fields[1]), []).append((int(fields[19]), int(name)))
    return {parent: [pid for _, pid in sorted(pids)] for parent, pids in found.items()}


def worker_pids(main: int) -> list[int]:
    def is_worker(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    return [pid for pid in children().get(main, []) if is_worker(pid)]


def sandbox_pids(main: int) -> list[int]:
    """The pids of each worker's oldest sandbox, which is the first to run a program: two of bubblewrap, and the program's."""
    tree = children()
    found = []
    for worker in worker_pids(main):
        process = next(iter(tree.get(worker, [])), None)
        while process is not None:
            found.append(process)
            process = next(iter(tree.get(process, [])), None)
    return found


def strike(start: Start, kill: Kill, rng: random.Random) -> str | None:
    """Carries out the kill and returns its phase; None if there was no process to kill."""
    if not start.await_phase(kill.phase):
        return None
    time.sleep(kill.delay)
    phase, main = start.phase, start.process.pid
    if kill.victim == "main":
        assert start.end(signal.SIGKILL) == -signal.SIGKILL, "the run was over before it could be killed"
        return phase
    find = worker_pids if kill.victim == "worker" else sandbox_pids
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and start.process.poll() is None:
        if _kill_one(find(main), lambda pid: pid in find(main), rng):
            return phase
    return None


def _kill_one(pids: Sequence[int], still_lives: Callable[[int], bool], rng: random.Random) -> bool:
    """Kills one of the processes. False if there is none, or if it ended before it could be killed."""
    if not pids:
        return False
    pid = rng.choice(pids)
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        descriptor = os.pidfd_open(pid)
        try:
            if still_lives(pid):  # its number may have been reused
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def check(root: Path, folder: Path, steps: int, kills: Sequence[Kill]) -> Counter[tuple[str, str]]:
    """Carries out the kills, lets the run end, and compares it with the uninterrupted one. Returns the kills by victim and phase."""
    expected = results(unbroken(root, steps))
    workdir, logs = folder / "run", (folder / f"start-{number}.txt" for number in itertools.count())
    struck: Counter[tuple[str, str]] = Counter()
    rng = random.Random(0)
    start = Start(root, workdir, steps, next(logs))
    for kill in kills:
        while (phase := strike(start, kill, rng)) is None:
            assert start.process.poll() is None, f"the run ended after {struck.total()} of {len(kills)} kills"
        struck[kill.victim, phase] += 1
        if kill.victim == "main":
            start = Start(root, workdir, steps, next(logs))
    assert start.end() == 0, [path.read_text() for path in folder.glob("start-*.txt")]
    said = "".join(path.read_text() for path in folder.glob("start-*.txt"))
    retries = len(re.findall(r"\b[23] of 3\b", said))  # a warning for each second and third try
    print(f"killed: {dict(struck)}; programs run again: {retries}")
    assert "Traceback" not in said
    # Each kill of a running program was detected and retried. The retries were counted, except in steps that were repeated.
    assert retries
    retried = sum(row["programs/retried"] for row in read_metrics(workdir / "metrics.jsonl"))
    assert retried <= retries
    assert retried == retries or any(kill.victim == "main" for kill in kills)
    found = results(workdir)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name
    assert not (workdir / "checkpoints.damaged").exists()
    return struck


def test_some_kills(root, tmp_path):
    """Kills a sandbox while its program runs, a worker, and the main process before a checkpoint in the background is committed.

    The slow test kills at random moments.
    """
    kills = [Kill("sandbox", "running programs", 0.1), Kill("worker", "running programs", 0.1), Kill("main", "committing", 0.1)]
    assert check(root, tmp_path, STEPS, kills).total() == 3


@pytest.mark.slow  # tests/hosts/test_hosts_in_threads.py tests the counting of retries
def test_retried_programs_are_counted(root, tmp_path):
    """One start, so that no count is lost: the metrics count as many retries as the log has lines."""
    kills = [Kill("sandbox", "running programs", 0.1), Kill("worker", "running programs", 0.1)]
    assert check(root, tmp_path, STEPS, kills).total() == 2


@pytest.mark.slow
def test_thirty_kills(root, tmp_path):
    victims = random.Random(1).choices(["main", "worker", "sandbox"], k=30)
    struck = check(root, tmp_path, 40, draw_kills(victims, seed=4))
    assert struck.total() == 30
    assert {victim for victim, _ in struck} == {"main", "worker", "sandbox"}
    assert len({phase for victim, phase in struck if victim == "main"}) >= 4  # which ones depends on the machine's speed
    assert struck["main", "writing"] + struck["main", "committing"]
