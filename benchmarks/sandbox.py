"""Many programs through the executor: programs per minute, the sandbox's overhead for each, and anything left behind.

    python benchmarks/sandbox.py                        # 1,000 programs: quick, slow, crashing, flooding, invalid
    python benchmarks/sandbox.py --programs=100 --preload=none

Prints one JSON object. `overhead_s` is a slot's time beyond the program's own: a fresh sandbox, its preloaded imports, the kill, and
grading. The resources of the main process and of each worker are counted when a tenth of the programs have ended and nothing runs, and
again at the end: descriptors, threads, processes (including zombies), control groups, memory. `grown` lists what increased (memory only if
it grew by more than --growth_mib in a process). `left` lists what is new after close(): processes, files in the temporary folder, mounts
and so on, and sandboxes of this executor anywhere on the machine. The exit code is 1 if anything grew or is left, or if a program had an
unexpected outcome.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from discover_jax.execution import Executor, ResourceLimits, memory, sandbox_spec
from discover_jax.execution.limits import MIB
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Outcome, Verdict

_QUICK = "import pandas as pd\ndef run():\n    return pd.read_csv('data/sample_submission.csv')\n"
PROGRAMS = {
    "quick": (_QUICK, Outcome.OK),
    "slow": ("import time\ntime.sleep(1)\n" + _QUICK, Outcome.OK),
    "working": ("for i in range(10**7): pass\n" + _QUICK, Outcome.OK),
    "raising": ("def run():\n    return {}['missing']\n", Outcome.EXCEPTION),
    "crashing": ("import ctypes\ndef run():\n    ctypes.string_at(0)\n", Outcome.KILLED),
    "flooding": ("def run():\n    while True:\n        print('x' * 10_000)\n", Outcome.OUTPUT_FLOOD),
    "hoarding": ("def run():\n    x = []\n    while True:\n        x.append(bytearray(b'x') * (64 << 20))\n", Outcome.OUT_OF_MEMORY),
    "invalid": ("import pandas as pd\ndef run():\n    return pd.DataFrame({'a': [1]})\n", Outcome.INVALID_SUBMISSION),
    "daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n" + _QUICK, Outcome.OK),
}
_SETTLE_SECONDS = 60.0

Held = dict[str, dict[str, int]]
"""The resources of each process of the benchmark: by its name ("main", "worker 0"), then by kind."""


def _parents() -> dict[int, int]:
    """The parent of each process on the machine, including zombies."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # ended meanwhile
            found[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _descendants(pid: int, parents: dict[int, int]) -> set[int]:
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found - {pid}


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):  # ended meanwhile
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return ""


def _resident(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(match[1]) if match else 0


def _groups(pid: int, cgroups: memory.Cgroups | None) -> int:
    """The number of control groups that a worker created and did not remove."""
    parents = {cgroups.memory, cgroups.pids or cgroups.memory} if cgroups else set()
    return sum(len(list(parent.glob(f"discover_jax-{pid}-*"))) for parent in parents)


def _held(workers: dict[str, int], cgroups: memory.Cgroups | None) -> Held:
    parents, found = _parents(), {}
    for name, pid in {"main": os.getpid(), **workers}.items():
        below = _descendants(pid, parents)
        if name == "main":  # those of the workers are counted separately
            below -= set().union(*({worker} | _descendants(worker, parents) for worker in workers.values()))
        found[name] = {
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task")),
            "processes": len(below),
            "control_groups": _groups(pid, cgroups),
            "bytes": _resident(pid),
        }
    return found


def _settled(look: Callable[[], Held], enough: Callable[[Held], bool]) -> Held:
    """The resources once they are `enough`, or after a minute. They vary while a sandbox warms up."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not enough(found := look()) and time.monotonic() < deadline:
        time.sleep(0.25)
    return found


def _growth(before: Held, after: Held, spared_bytes: int) -> dict[str, int]:
    """The increases. Memory counts only if it grew by more than `spared_bytes` in a process."""
    found = {}
    for name, kinds in after.items():
        for kind, number in kinds.items():
            more = number - before[name][kind]
            if more > (spared_bytes if kind == "bytes" else 0):
                found[f"{name} {kind}"] = more
    return found


def _after_close(temporary: Path, mark: str) -> dict[str, int]:
    """Everything that a closed executor could have left behind. `mark` is only in the commands of its sandboxes."""
    commands = {pid: _command(pid) for pid in _parents()}
    below = {
        pid for pid in _descendants(os.getpid(), _parents()) if "resource_tracker" not in commands.get(pid, "")
    }  # multiprocessing's own
    return {
        "processes": len(below),
        "sandboxes": sum(mark in command for command in commands.values()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "temporary_files": len(os.listdir(temporary)),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _workers() -> dict[str, int]:
    return {child.name: child.pid for child in multiprocessing.active_children() if child.name.startswith("execution-") and child.pid}


def _run(pool: Executor, kinds: list[str], first: int, total: int, began: float) -> list[tuple[Outcome, float]]:
    """The outcome and the program's seconds of each. Verdicts are dropped, so that they do not take memory."""
    futures: collections.deque[Future[Verdict]] = collections.deque(
        pool.submit(f"{PROGRAMS[kind][0]}# {first + index}\n") for index, kind in enumerate(kinds)
    )
    found = []
    while futures:
        verdict = futures.popleft().result()
        found.append((verdict.outcome, verdict.execution.seconds))
        if (first + len(found)) % 50 == 0:
            print(f"{first + len(found)}/{total} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0, help="slots; 0: one per core")
    parser.add_argument(
        "--preload", choices=("all", "none"), default="all", help="preloaded imports of a sandbox, besides numpy and pandas"
    )
    parser.add_argument("--growth_mib", type=int, default=16, help="allowed growth of a process's memory")
    arguments = parser.parse_args()
    if arguments.preload == "none":
        sandbox_spec.PRELOAD = ()
    # This limit on a result is on the command line of its sandboxes and unique to this run, so they can be found anywhere.
    limits = ResourceLimits(seconds=30, cores=1, memory_bytes=1024 * MIB, flood_bytes=16 * MIB, result_bytes=8 * MIB + os.getpid())
    mark = f'"result_bytes": {limits.result_bytes}'
    kinds = list(itertools.islice(itertools.cycle(PROGRAMS), arguments.programs))
    tenth = max(1, len(kinds) // 10)
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name) / "temporary"  # its own folder, also for workers, so that files of other processes do not count
        temporary.mkdir()
        os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
        task = prepare_task("digits-parity", raw=None, reward="grade", folder=Path(name) / "task")
        cgroups = memory.find_cgroups()
        with Executor(
            [task], limits, workers=1, cache_dir=Path(name) / "first"
        ) as pool:  # starts processes that stay, such as the resource tracker
            pool.submit(_QUICK).result()
        before, began = _after_close(temporary, mark), time.monotonic()
        with Executor([task], limits, workers=arguments.workers or None, cache_dir=Path(name) / "cache") as pool:
            described, slots = pool.describe(), pool.slots
            ends = _run(pool, kinds[:tenth], 0, len(kinds), began)
            workers = _workers()

            def look() -> Held:
                return _held(_workers(), cgroups)

            # Each worker has one warm sandbox: bubblewrap outside, bubblewrap inside, and the harness.
            early = _settled(look, lambda held: all(held[worker]["processes"] == 3 for worker in workers))
            paused = time.monotonic()
            ends += _run(pool, kinds[tenth:], tenth, len(kinds), began)
            seconds = time.monotonic() - paused
            late = _settled(look, lambda held: not _growth(early, held, 1 << 62))
            retries, replaced = pool.retries, workers != _workers()
        after = _after_close(temporary, mark)
        left = {key: after[key] - before[key] for key in before if after[key] > before[key]}
        if groups := sum(_groups(pid, cgroups) for pid in workers.values()):
            left["control_groups"] = groups
    wrong = collections.Counter(
        f"{kind}: {outcome.value}" for kind, (outcome, _) in zip(kinds, ends, strict=True) if outcome is not PROGRAMS[kind][1]
    )
    timed = len(kinds) - tenth
    own = sum(seconds for _, seconds in ends[tenth:])
    result = {
        **vars(arguments),
        "sandbox": described,
        "limits": dataclasses.asdict(limits),
        "slots": slots,
        "seconds": round(seconds, 1),
        "programs_per_minute": round(60 * timed / seconds, 1),
        "own_s": round(own / timed, 3),
        "overhead_s": round((slots * seconds - own) / timed, 3),
        "retries": retries,
        "held": late,
        "growth_bytes": {name: late[name]["bytes"] - early[name]["bytes"] for name in late},
        "wrong": dict(wrong),
        "grown": {**_growth(early, late, arguments.growth_mib * MIB), **({"workers that were replaced": 1} if replaced else {})},
        "left": left,
    }
    print(json.dumps(result))
    return 1 if result["wrong"] or result["grown"] or result["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
