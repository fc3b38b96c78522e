"""Runs that end in a given way, for test_exit_codes: `python ending_runs.py < commands`, one JSON object a line.

Each command starts the processes of one run by fork, since importing takes longer than the run, and prints their exit codes. The processes
use `cli.launch`, `Watch` and its watchers as real runs do. Only jax's exchange between the processes is replaced, by files.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax

from discover_jax import cli
from discover_jax.exceptions import ConfigError, TemporaryError
from discover_jax.hosts.processes import Processes
from discover_jax.runs import lock
from discover_jax.runs.workdir import open_shared_workdir


@dataclasses.dataclass(frozen=True)
class ByFiles(Processes):
    """Processes that exchange values by files."""

    folder: Path = Path()
    times: list[int] = dataclasses.field(default_factory=lambda: [0])

    def gather(self, value):
        self.times[0] += 1
        files = [self.folder / f"{self.times[0]}-{index}" for index in range(self.count)]
        part = files[self.index].with_suffix(".part")
        part.write_text(json.dumps(value))
        part.rename(files[self.index])
        while not all(file.exists() for file in files):
            time.sleep(0.05)
        return [json.loads(file.read_text()) for file in files]


def _end(fault: str, folder: Path) -> None:
    match fault:
        case "late config error":
            raise ConfigError("config.no is not a setting")
        case "out of device memory":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "Ctrl-C":
            raise KeyboardInterrupt
        case "unreachable":
            raise TemporaryError("a host cannot be reached")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)


def _be(index: int, count: int, fault: str, victim: int, folder: Path) -> None:
    """Process `index` of the run. Ends this Python process."""

    def run(config, workdir, processes=Processes()):  # noqa: B008
        if fault == "lock held":
            with open_shared_workdir(folder / "run", {}, "train", processes):
                pass
        processes.wait()
        if processes.index == victim:
            _end(fault, folder)
        processes.wait()

    with (folder / f"log-{index}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    lock.PATIENCE_SECONDS = 0.1
    cli.start = lambda coordinator, count, index: ByFiles(index, count, folder)
    sys.argv[1:] = ["--config=configs/quickstart.py"]
    if count > 1:
        sys.argv += ["--coordinator=nowhere:1", f"--num_processes={count}", f"--process_id={index}"]
    if fault == "early config error" and index == victim:
        sys.argv.append("--config.train.steps=0")
    cli.launch(run, lambda *_: True)
    sys.exit()


def _start(number: int, count: int, fault: str, victim: int, folder: str) -> None:
    children = []
    for index in range(count):
        if (child := os.fork()) == 0:
            _be(index, count, fault, victim, Path(folder))
        children.append(child)

    def wait() -> None:
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps({"number": number, "codes": codes}), flush=True)

    threading.Thread(target=wait).start()


if __name__ == "__main__":
    for line in sys.stdin:
        _start(**json.loads(line))
