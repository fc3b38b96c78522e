"""`discover_jax.main` as users start it, but for two things: sandboxes preload no more than pandas, which saves each a second of importing,
and each phase of a step is announced by a line `phase NAME`, so that a test can strike in it. In the phase that the environment variable
DISCOVER_TEST_FAIL_IN names the run fails.
"""

import functools
import os

from discover_jax import cli, dry_run, main
from discover_jax.exceptions import RunError
from discover_jax.execution import sandbox
from discover_jax.runs.console import PlainConsole


class Announcing(PlainConsole):
    """Lines without control codes, and one more for each phase."""

    def phase(self, name: str, detail: str = "") -> None:
        super().phase(name, detail)
        print(f"phase {name}", flush=True)
        if name == os.environ.get("DISCOVER_TEST_FAIL_IN"):
            raise RunError("no more")


if __name__ == "__main__":
    sandbox.PRELOAD = ()
    cli.launch(functools.partial(main.run, console=Announcing()), dry_run.run)
