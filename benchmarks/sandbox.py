"""Many programs through the executor: how many a minute, what the sandbox adds to each, and whether anything is left behind.

    python benchmarks/sandbox.py                        # 1,000 programs: quick, slow, crashing, flooding, invalid
    python benchmarks/sandbox.py --programs=100 --preload=none

Prints one JSON object. `overhead_s` is a slot's time beyond the program's own: a fresh sandbox, what it imports ahead, the kill, and
grading. What is counted before and after must be equal in the end (`left` is empty); `growth_bytes` is what main process and workers hold
more at the end than after a tenth of the programs. The exit code is 1 if something is left or a program ended otherwise than it should.
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
from concurrent.futures import Future
from pathlib import Path

from discover_jax.execution import Executor, Limits, memory, sandbox
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


def _processes() -> set[int]:
    """Living descendants of this process."""
    parents = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # ended meanwhile
            continue
        if state not in "ZX":
            parents[pid] = int(parent)
    found, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found - {os.getpid()}


def _held() -> dict[str, int]:
    """What this process holds that a sandbox could leave behind."""
    return {
        "processes": len(_processes() - _trackers()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "temporary_files": len(os.listdir(tempfile.gettempdir())),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _groups(workers: set[int]) -> int:
    """Control groups that workers have made and not removed."""
    cgroups = memory.find_cgroups()
    return sum(len(list(cgroups.memory.glob(f"discover_jax-{pid}-*"))) for pid in workers) if cgroups else 0


def _workers() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid}


def _trackers() -> set[int]:
    """multiprocessing's own helper, which stays as long as this process."""
    found = set()
    for pid in _processes():
        with contextlib.suppress(OSError):  # ended meanwhile
            if "resource_tracker" in Path(f"/proc/{pid}/cmdline").read_text():
                found.add(pid)
    return found


def _resident() -> int:
    """Bytes that this process and the workers hold."""
    pids = [os.getpid(), *_workers()]
    found = (re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids)
    return sum(1024 * int(match[1]) for match in found if match)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0, help="slots; 0: as many as there are cores")
    parser.add_argument("--preload", choices=("all", "none"), default="all", help="what a sandbox imports ahead, besides numpy and pandas")
    arguments = parser.parse_args()
    if arguments.preload == "none":
        sandbox.PRELOAD = ()
    limits = Limits(seconds=30, cores=1, memory_bytes=1024 * MIB, flood_bytes=16 * MIB)
    kinds = list(itertools.islice(itertools.cycle(PROGRAMS), arguments.programs))
    with tempfile.TemporaryDirectory() as name:
        tempfile.tempdir = str(Path(name) / "temporary")  # its own, so that what others put beside it does not count
        os.mkdir(tempfile.tempdir)
        task = prepare_task("digits-parity", raw=None, reward="grade", folder=Path(name) / "task")
        with Executor([task], limits, workers=1, cache_dir=Path(name) / "first") as pool:  # starts what stays, such as the tracker
            pool.submit(_QUICK).result()
        before, began, resident = _held() | {"control_groups": 0}, time.monotonic(), 0
        with Executor([task], limits, workers=arguments.workers or None, cache_dir=Path(name) / "cache") as pool:
            described = pool.describe()
            futures: list[Future[Verdict]] = [pool.submit(f"{PROGRAMS[kind][0]}# {index}\n") for index, kind in enumerate(kinds)]
            verdicts = []
            for index, future in enumerate(futures):
                verdicts.append(future.result())
                if index == len(futures) // 10:
                    resident = _resident()
                if index % 50 == 49:
                    print(f"{index + 1}/{len(futures)} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            seconds, growth, workers = time.monotonic() - began, _resident() - resident, _workers()
        after = _held() | {"control_groups": _groups(workers)}
    wrong = collections.Counter(
        f"{kind}: {verdict.outcome.value}"
        for kind, verdict in zip(kinds, verdicts, strict=True)
        if verdict.outcome is not PROGRAMS[kind][1]
    )
    own = sum(verdict.execution.seconds for verdict in verdicts)
    result = {
        **vars(arguments),
        "sandbox": described,
        "limits": dataclasses.asdict(limits),
        "slots": len(workers),
        "seconds": round(seconds, 1),
        "programs_per_minute": round(60 * len(kinds) / seconds, 1),
        "own_s": round(own / len(kinds), 3),
        "overhead_s": round((len(workers) * seconds - own) / len(kinds), 3),
        "growth_bytes": growth,
        "wrong": dict(wrong),
        "left": {key: after[key] - before[key] for key in before if after[key] > before[key]},
    }
    print(json.dumps(result))
    return 1 if result["wrong"] or result["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
