"""`discover_jax.main` as users start it, with two changes. Sandboxes preload only numpy, which saves each a second of importing. A line
`phase NAME` announces each phase of a step, so that a test can inject a fault in it. The run fails in the phase that the environment
variable DISCOVER_TEST_FAIL_IN names.
"""

import functools
import os

from discover_jax import cli, dry_run, main
from discover_jax.exceptions import RunError
from discover_jax.execution import sandbox
from discover_jax.runs.console import PlainConsole


class Announcing(PlainConsole):
    """Adds a line for each phase."""

    def phase(self, name: str, detail: str = "") -> None:
        super().phase(name, detail)
        print(f"phase {name}", flush=True)
        if name == os.environ.get("DISCOVER_TEST_FAIL_IN"):
            raise RunError("no more")


if __name__ == "__main__":
    sandbox.PRELOAD = ()
    cli.launch(functools.partial(main.run, console=Announcing()), dry_run.run)
