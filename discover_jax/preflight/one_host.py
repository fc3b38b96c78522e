"""What one host finds out about itself, and the comparison of all hosts."""

import importlib.metadata
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from discover_jax import config as settings
from discover_jax.exceptions import DiscoverError
from discover_jax.execution.cache import packages
from discover_jax.execution.memory import own_folder
from discover_jax.preflight import requirements
from discover_jax.preflight.findings import Finding, Level

_DRIVER = Path("/proc/driver/nvidia/version")
_MAX_NAMED = 8
_CORES_REMEDY = (
    "SLURM: `srun --cpus-per-task=N` (srun ignores that option of sbatch). Kubernetes: raise resources.requests.cpu and limits.cpu. docker:"
    " `--cpus`."
)


def checked(name: str, check: Callable[..., tuple[str, Any]], *arguments: Any) -> tuple[Finding, Any]:
    """The finding of a check and its result; None if it failed, or if it was skipped because an argument is None."""
    if any(argument is None for argument in arguments):
        return Finding(name, Level.SKIPPED, "skipped: an earlier check failed"), None
    try:
        text, result = check(*arguments)
    except DiscoverError as error:
        return Finding(name, Level.FIX, str(error)), None
    return Finding(name, Level.OK, text), result


def facts(config: Any, workdir: Path) -> dict[str, Any]:
    """What this host tells the first: its findings as rows, and what must be equal on all hosts. JSON values."""
    cores = usable_cores()
    found = [judge_cores(*cores, config.execution.cores, runs_programs=config.execution.backend != "ray")]
    found.append(checked("packages", requirements.check_packages)[0])
    weights, sizes = checked("weights", requirements.check_weights, config)
    found += [weights, checked("tokenizer", requirements.check_tokenizer, config, sizes)[0]]
    found.append(checked("disk", requirements.check_disk, config, sizes, workdir)[0])
    return {
        "findings": [finding.row() for finding in found],
        "config": settings.flatten(config),
        "packages": [f"discover_jax=={importlib.metadata.version('discover_jax')}", *packages()],
        "driver": driver(),
    }


def driver() -> str:
    """The version of the NVIDIA driver; empty without one. A TPU's library is a Python package, so it is among the packages."""
    if not _DRIVER.exists():
        return ""
    found = re.search(r"\b\d{3,}\.\d+[.\d]*", _DRIVER.read_text())
    return found[0] if found else "unknown"


def usable_cores() -> tuple[int, int]:
    """The cores that this process may use, and those of the host. A quota of the control group counts as cores, rounded down."""
    cores, of_host = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    own = own_folder("")
    for folder in (own, *own.parents) if own else ():
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                cores = min(cores, max(1, int(quota) // int(period)))
    return cores, of_host


def judge_cores(cores: int, of_host: int, of_program: int, *, runs_programs: bool) -> Finding:
    """Whether a process may use the cores of its host. A scheduler that binds it to one core makes programs and sampling very slow.

    Args:
      cores: that this process may use.
      of_host: cores of the host.
      of_program: config.execution.cores.
      runs_programs: whether programs run on this host.
    """
    cell = f"{cores} of {of_host}"
    if cores == 1 < of_host:
        return Finding("cores", Level.FIX, f"This process is bound to 1 of {of_host} cores. {_CORES_REMEDY}", cell)
    if runs_programs and cores < of_program:
        text = f"This process may use {cores} cores, fewer than the {of_program} of one program (config.execution.cores). {_CORES_REMEDY}"
        return Finding("cores", Level.WARNING, text, cell)
    if 2 * cores < of_host:
        return Finding("cores", Level.WARNING, f"This process may use only {cores} of {of_host} cores. {_CORES_REMEDY}", cell)
    return Finding("cores", Level.OK, f"{cores} of {of_host} cores", cell)


def compare(all_facts: Sequence[dict[str, Any]]) -> list[list[Finding]]:
    """Further findings of each host: what differs from the first host. Runs refuse different packages, since scores depend on them."""
    first = all_facts[0]
    found: list[list[Finding]] = []
    for facts_of_host in all_facts:
        mine = []
        if other := sorted(set(facts_of_host["packages"]) ^ set(first["packages"])):
            here = [name for name in other if name in facts_of_host["packages"]]
            there = [name for name in other if name in first["packages"]]
            text = (
                f"Python or packages differ from process 0: here {_some(here)}; there {_some(there)}. Install the same on all hosts: scores"
                " depend on them."
            )
            mine.append(Finding("packages", Level.FIX, text, "differ"))
        given, wanted = facts_of_host["config"], first["config"]
        if names := [name for name in {**wanted, **given} if given.get(name) != wanted.get(name)]:
            text = "; ".join(f"config.{name} is {given.get(name)!r} here, {wanted.get(name)!r} in process 0" for name in names[:_MAX_NAMED])
            mine.append(Finding("config", Level.FIX, f"{text}. Start all by the same command, except for --process_id.", "differs"))
        else:
            mine.append(Finding("config", Level.OK, "equal on all hosts"))
        mine.append(_judge_driver(facts_of_host["driver"], first["driver"]))
        found.append(mine)
    return found


def _judge_driver(here: str, there: str) -> Finding:
    if here == there:
        return Finding("driver", Level.OK, f"NVIDIA driver {here}" if here else "no NVIDIA driver", here or "none")
    text = f"NVIDIA driver {here or 'missing'}; process 0 has {there or 'none'}. Use nodes with the same driver: NCCL may hang otherwise."
    return Finding("driver", Level.FIX if not (here and there) else Level.WARNING, text, here or "none")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else "") or "none of them"
