"""Settings of execution: limits of a program, workers, and what isolates programs."""

import re
from typing import Any

from discover_jax.config.setting import Rule, Setting

EXECUTION: dict[str, Any] = {
    "seconds": Setting(300.0, "time limit of a program, counted from its own start", unit="s", low=0.1, high=86_400),
    "cores": Setting(2, "CPU cores that a program has for itself", low=1, high=1024),
    "memory_gib": Setting(4.0, "memory limit of a program", unit="GiB", low=0.25, high=1 << 20),
    "result_mib": Setting(
        0,
        "maximum size of a submission as CSV, and of a value that a problem's function returns; 0: derived, 8 MiB or what the competition's"
        " sample submission needs with float64 predictions",
        unit="MiB",
        low=0,
        high=4096,
    ),
    "workers": Setting(
        0,
        "maximum number of programs that run at the same time; 0: derived, as many as the cores of the machine or the ray cluster allow",
        low=0,
        high=4096,
    ),
    "cache": Setting("", "folder of a verdict cache that several runs on one machine can share; empty: `cache/` in the run directory"),
    "backend": Setting(
        "bubblewrap",
        "where programs run, and what isolates them. `bubblewrap`: in bubblewrap on this machine; `ray`: in bubblewrap on the nodes of a"
        " ray cluster (docs/scaling.md); `unsafe-subprocess`: on this machine without isolation, for trusted programs only",
        choices=("bubblewrap", "ray", "unsafe-subprocess"),
        rules=(
            Rule(
                "`unsafe-subprocess` runs the model's programs without isolation and requires `execution.allow_weaker` = True",
                lambda config: config.execution.backend != "unsafe-subprocess" or config.execution.allow_weaker,
                uses=("execution.allow_weaker",),
                fix="Use config.execution.backend = 'bubblewrap'. If you accept the risk, set config.execution.allow_weaker = True.",
            ),
        ),
    ),
    "ray_address": Setting(
        "auto",
        "ray cluster. `auto`: the one that this machine belongs to; HOST:PORT: the one with this head; `local`: a new one on this machine,"
        " for the run",
        rules=(
            Rule(
                "must be `auto`, `local` or HOST:PORT of the head, as `ray start --head` prints it",
                lambda config: re.fullmatch(r"auto|local|[\w.\-]+:\d+|\[[\da-fA-F:.]+\]:\d+", config.execution.ray_address) is not None,
                uses=(),
                fix="ray://... addresses are for clients outside a cluster: join this machine with `ray start --address=HOST:PORT`.",
            ),
        ),
        only_with=("execution.backend", ("ray",)),
    ),
    "allow_weaker": Setting(False, "accept isolation weaker than bubblewrap's; the summary of the run then states it"),
}
