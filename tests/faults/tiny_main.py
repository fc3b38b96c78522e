"""`discover_jax.main` as users start it, with three changes. Sandboxes preload only numpy, which saves each a second of importing. A line
`phase NAME` announces each phase of a step, so that a test can inject a fault in it. The run fails in the phase that the environment
variable DISCOVER_TEST_FAIL_IN names, and kills itself in the n-th phase of a name, which DISCOVER_TEST_KILL_IN gives as NAME:N.
DISCOVER_TEST_SLOW_DISK makes checkpoints slow: before one is written and before it is committed, the
background pauses for so many seconds, which are announced as the phases "writing" and "committing".
"""

import functools
import os
import signal
import sys
import time
from collections import Counter

from discover_jax import cli, dry_run, main
from discover_jax.exceptions import RunError
from discover_jax.execution import sandbox_spec
from discover_jax.runs.console import PlainConsole


class Announcing(PlainConsole):
    """Adds a line for each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: Counter[str] = Counter()

    def phase(self, name: str, detail: str = "") -> None:
        super().phase(name, detail)
        print(f"phase {name}", flush=True)
        self.entered[name] += 1
        if name == os.environ.get("DISCOVER_TEST_FAIL_IN"):
            raise RunError("no more")
        if f"{name}:{self.entered[name]}" == os.environ.get("DISCOVER_TEST_KILL_IN"):
            os.kill(os.getpid(), signal.SIGKILL)


def slow_disk(seconds: float, event: str, arguments: tuple) -> None:
    """An audit hook: pauses before a checkpoint's folder is created, and before it gets its final name."""
    if event in ("os.mkdir", "os.rename"):
        folder, name = os.path.split(os.fsdecode(arguments[event == "os.rename"]))
        if os.path.basename(folder) == "checkpoints" and (event == "os.rename" or "tmp" in name):
            print("phase writing" if event == "os.mkdir" else "phase committing", flush=True)
            time.sleep(seconds)


if __name__ == "__main__":
    if seconds := float(os.environ.get("DISCOVER_TEST_SLOW_DISK", "0")):
        sys.addaudithook(functools.partial(slow_disk, seconds))
    sandbox_spec.PRELOAD = ()
    cli.launch(functools.partial(main.run, console=Announcing()), dry_run.run)
