"""One line for a run's summaries: isolation, limits, and anything weaker than the best setup."""

from collections.abc import Sequence

from discover_jax.execution.admission import memory_limit
from discover_jax.execution.limits import GIB, ResourceLimits
from discover_jax.execution.sandbox_spec import SandboxSpec


def describe(specs: Sequence[SandboxSpec], limits: ResourceLimits, runs: int, cpus: int) -> str:
    """The line for an executor with these slots. `runs`: maximum number of runs per program; `cpus`: CPUs available to this process."""
    cores = f"{len(specs)} x {len(specs[0].cores)} cores"
    if len(specs[0].cores) < limits.cores:
        cores += f" (fewer than the {limits.cores} asked for: this machine has {cpus})"
    if len(specs) * len(specs[0].cores) > cpus:
        cores += f" (shared: this machine has {cpus})"
    return "; ".join(
        [*_isolation(specs[0]), _memory(specs, limits), cores, f"{limits.seconds:g} s" + (f" each of {runs} runs" if runs > 1 else "")]
    )


def _isolation(spec: SandboxSpec) -> list[str]:
    if spec.host is None:
        return ["unsafe-subprocess: NO ISOLATION, programs can read the answers and use the network"]
    return [spec.host.version + (", under this user's uid" if spec.uid is None else ", one unprivileged uid a slot")]


def _memory(specs: Sequence[SandboxSpec], limits: ResourceLimits) -> str:
    bound, all_there_is = f"{limits.memory_bytes / GIB:g} GiB", memory_limit()
    short = len(specs) * limits.memory_bytes > all_there_is
    together = f"all {len(specs)} together could want more than this machine's {all_there_is / GIB:.0f} GiB"
    if (cgroups := specs[0].cgroups) is not None:
        return f"memory: {bound} by {cgroups.describe()}" + (f" ({together})" if short else "")
    return (
        f"memory: best effort ({bound} a process, and the sum looked at 10 times a second; no writable control group; a program starts once"
        f" the memory for it is free{', since ' + together if short else ''})"
    )
