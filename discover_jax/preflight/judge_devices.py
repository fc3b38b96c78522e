"""What the results of all hosts' `devices.look` mean."""

from collections.abc import Sequence
from typing import Any

from discover_jax.preflight.devices import TCP_GB, Mode
from discover_jax.preflight.findings import Finding, Level

Results = dict[str, Any]
"""Of one host, by name: see `devices.look` and `devices.Child.results`."""


def findings_of(results: Results, seconds: float) -> list[Finding]:
    """The findings of one host about its own devices and the dry run."""
    if (devices := results.get("devices")) is None:
        return [Finding("devices", *_missing(results, "jax found no devices", seconds))]
    cell = f"{devices['count']} x {devices['kind']}"
    found = [Finding("devices", Level.OK, cell, cell)]
    if "dry_run" in results:
        found.append(_dry_run(results["dry_run"]))
    elif "error" in results and "all_reduce" in results:
        found.append(Finding("dry_run", Level.FIX, results["error"]))
    elif "compiling" in results:
        text = f"not finished within {seconds:.0f} s ({results['compiling']}). Run --dry_run, which has no time limit."
        found.append(Finding("dry_run", Level.WARNING, text, "unfinished"))
    else:
        found.append(Finding("dry_run", Level.SKIPPED, "skipped: an earlier check failed"))
    return found


def _dry_run(result: dict[str, Any]) -> Finding:
    used = f"{result['total'] / 1e9:.1f} of {result['memory'] / 1e9:.1f} GB"
    peak = f"{used} of each device in {result['phase']}, {result['function']}"
    if result["fits"]:
        return Finding("dry_run", Level.OK, f"it fits: at most {peak}", "fits")
    said = f" The compiler says: {result['complaint']}" if result["complaint"] else ""
    return Finding("dry_run", Level.FIX, f"It does not fit: {peak}.{said} --dry_run names the settings that lower it.", "too large")


def judge_mesh(shape: Sequence[int], all_results: Sequence[Results], names: Sequence[str]) -> Finding:
    """The number of devices of all hosts against the mesh.

    Args:
      shape: data, expert, tensor.
      all_results: of each process.
      names: of the processes.
    """
    counts = [each["devices"]["count"] for each in all_results if "devices" in each]
    if len(counts) < len(names):
        return Finding("mesh", Level.SKIPPED, "skipped: the devices of some hosts are unknown")
    data, expert, tensor = shape
    needed, available = data * expert * tensor, sum(counts)
    asked = f"config.mesh is {data} x {expert} x {tensor} = {needed} devices (data x expert x tensor)"
    each = f"{len(names)} x {counts[0]}" if len(set(counts)) == 1 else " + ".join(map(str, counts))
    have = f"{len(names)} processes have {each} = {available}" if len(names) > 1 else f"this host has {available}"
    kinds = sorted({each["devices"]["kind"] for each in all_results})
    if needed > available or (len(names) > 1 and needed != available):
        rule = f"Set config.mesh so that the product is {available}, or start {_processes(needed, counts)}."
        few = " Under SLURM and Open MPI, --distributed takes one GPU a process: see docs/scaling.md." if set(counts) == {1} else ""
        return Finding("mesh", Level.FIX, f"{asked}, but {have}. {rule}{few}")
    if len(set(counts)) > 1 or len(kinds) > 1:
        return Finding("mesh", Level.FIX, f"Hosts have different devices: {each} devices of kind {', '.join(kinds)}. Use equal hosts.")
    return Finding("mesh", Level.OK, f"{asked}; {have}")


def _processes(needed: int, counts: Sequence[int]) -> str:
    if len(set(counts)) == 1 and needed % counts[0] == 0:
        hosts = needed // counts[0]
        return f"{hosts} process{'es' * (hosts > 1)} with {counts[0]} device{'s' * (counts[0] > 1)} each"
    return f"processes with {needed} devices"


def judge_bandwidth(all_results: Sequence[Results], seconds: float) -> Finding:
    """The slowest host's bandwidth of the all-reduce."""
    known = [each["all_reduce"] for each in all_results if "all_reduce" in each]
    if len(known) < len(all_results):
        bad = next(each for each in all_results if "all_reduce" not in each)
        if bad["mode"] == Mode.APART.name:
            return Finding("all-reduce", Level.SKIPPED, "skipped: the hosts do not reach each other")
        return Finding("all-reduce", *_missing(bad, "the devices of all hosts did not exchange values", seconds))
    if None in known:
        return Finding("all-reduce", Level.SKIPPED, "one device needs none")
    speed, platform = min(known), all_results[0]["devices"]["platform"]
    text = f"{speed:.2f} GB/s over all devices (bus bandwidth of an all-reduce)"
    if platform == "cpu":
        return Finding("all-reduce", Level.OK, f"{text}; between CPUs it goes over TCP")
    if len(all_results) > 1 and speed < TCP_GB:
        return Finding(
            "all-reduce",
            Level.WARNING,
            f"{text}, less than {TCP_GB:g}: between hosts it probably goes over TCP instead of RDMA. `NCCL_DEBUG=INFO` names the network:"
            " look for `NET/IB` or the vendor's plugin instead of `NET/Socket`. On Google Cloud, use the machine's GPUDirect manifest"
            " (launch/).",
        )
    return Finding("all-reduce", Level.OK, f"{text}; a warning below {TCP_GB:g} between hosts")


def _missing(results: Results, what: str, seconds: float) -> tuple[Level, str]:
    """The level and the text for a result that did not come."""
    if "error" in results:
        return Level.FIX, f"{what}: {results['error']}"
    if (code := results.get("ended")) not in (None, 0):
        return Level.TEMPORARY, f"{what}: jax ended with code {code}; see its messages above"
    return Level.TEMPORARY, f"{what} within {seconds:.0f} s: a host or the network hangs"
