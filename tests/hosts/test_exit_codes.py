"""Exit codes of runs of 1, 2 and 4 processes on this host: all processes end with the code of the cause (docs/troubleshooting.md)."""

import fcntl
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from discover_jax.hosts.exit_codes import FAILED, INTERRUPTED, LOST, USER_ERROR
from discover_jax.runs import lock

CODES = {
    "none": 0,
    "early config error": USER_ERROR,
    "lock held": USER_ERROR,  # by process 0, which opens the run directory
    "late config error": USER_ERROR,
    "out of device memory": USER_ERROR,
    "unreachable": LOST,
    "killed": LOST,
    "bug": FAILED,
    "Ctrl-C": INTERRUPTED,
}
SAYS = {
    "early config error": r"ConfigError: [^!]*config\.train\.steps must be at least 1; got 0",
    "late config error": r"ConfigError: config\.no is not a setting",
    "out of device memory": r"JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
    "lock held": r"RunError: The run directory \S+ is in use by another process: host node-7, id 4242",
    "unreachable": r"TemporaryError: a host cannot be reached",
    "killed": r"it ended without a message: killed, or out of memory",
    "bug": r"ZeroDivisionError: a bug",
    "Ctrl-C": r"KeyboardInterrupt",
}
"""What the other processes say about the one that failed."""


def _run(cases, folder):
    """The exit codes and the output of each process of each case. All cases run at once: most of their time is waiting."""
    script = str(Path(__file__).with_name("ending_runs.py"))
    orders, held = [], []
    for number, (count, fault, victim) in enumerate(cases):
        place = folder / str(number)
        (place / "run").mkdir(parents=True)
        orders.append({"number": number, "count": count, "fault": fault, "victim": victim, "folder": str(place)})
        if fault == "lock held":
            held.append((place / "run" / lock.NAME).open("w"))
            fcntl.flock(held[-1], fcntl.LOCK_EX)
            print(json.dumps({"host": "node-7", "pid": 4242}), file=held[-1], flush=True)
    text = "".join(json.dumps(order) + "\n" for order in orders)
    done = subprocess.run([sys.executable, script], input=text, capture_output=True, text=True, check=False, timeout=240)
    for file in held:
        file.close()
    assert done.returncode == 0, done.stderr
    codes = {row["number"]: row["codes"] for row in map(json.loads, done.stdout.splitlines())}
    return [
        (codes[number], [(folder / str(number) / f"log-{index}.txt").read_text() for index in range(count)])
        for number, (count, _, _) in enumerate(cases)
    ]


def _check(cases, folder):
    for (count, fault, victim), (codes, logs) in zip(cases, _run(cases, folder), strict=True):
        wanted = [CODES[fault]] * count
        if fault == "killed":
            wanted[victim] = -signal.SIGKILL
        assert codes == wanted, (count, fault, victim, codes, logs)
        for index, log in enumerate(logs):
            if fault in SAYS and index != victim:
                what = "was lost" if CODES[fault] == LOST else "failed"
                assert re.search(rf"error: process {victim} of {count} \(host \S+, id \d+\) {what}: {SAYS[fault]}", log), (fault, log)
                assert re.search(r"(?i)start the same command again on all hosts", log), log
                assert re.search(rf"end with its exit code, {CODES[fault]}\.", log) or CODES[fault] == LOST, log


def test_one_and_two_processes(tmp_path):
    ones = [(1, fault, 0) for fault in CODES]
    twos = [(2, fault, 0 if fault == "lock held" else number % 2) for number, fault in enumerate(CODES)]
    _check([*ones, *twos], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_four_processes(tmp_path, victim):
    _check([(4, fault, 0 if fault == "lock held" else victim) for fault in CODES], tmp_path)
