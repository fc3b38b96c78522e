"""Shared parts of the benchmarks: clocks, the device's ceilings, traces by function, and the flags of a mesh."""

import argparse
import collections
import dataclasses
import gzip
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from discover_jax.models.sharding import mesh_of_run

SHOWN, DEPTH = 30, 3
"""Rows of a profile, and the functions that each row covers, innermost first."""


# ---------------------------------------------------------------------- clocks and ceilings


def seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3, repetitions: int = 5) -> float:
    """Seconds of one call: the best mean of `calls` calls in a row, after one call that compiles."""
    result = jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)  # frees the previous result, so that its memory is reused
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def copy_bytes_per_s(size: int = 1 << 32) -> float:
    """Bytes read and written per second by a copy of an array of `size` bytes."""
    words = jax.jit(lambda: jnp.arange(size // 4, dtype=jnp.uint32))()
    return 2 * words.nbytes / seconds(jnp.copy, words, calls=20)


def matmul_flops_per_s(size: int = 8192) -> float:
    """Floating-point operations per second of a bfloat16 product of two square matrices of that width."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), a, b, calls=20)


def ceilings(copy_bytes: int = 1 << 32, matmul: int = 8192) -> dict[str, float]:
    """Both ceilings, measured in this run: bounds from a data sheet or another run would not be comparable."""
    return {"copy_bytes_per_s": copy_bytes_per_s(copy_bytes), "matmul_flops_per_s": matmul_flops_per_s(matmul)}


def peak_bytes() -> int | None:
    """Peak memory of the first local device so far; None if the backend does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# ---------------------------------------------------------------------- traces


@dataclasses.dataclass(frozen=True)
class Trace:
    """Device time of one executable within a call.

    Attributes:
      whole_ns: from the first kernel's start to the last one's end.
      idle_ns: the part of it in which no kernel ran.
      events: number of kernels.
      by_function: nanoseconds and number of kernels by the project's function.
      by_kernel: the same by kernel.
    """

    whole_ns: float
    idle_ns: float
    events: int
    by_function: dict[str, tuple[float, int]]
    by_kernel: dict[str, tuple[float, int]]


def trace(call: Callable[[], Any], text: str, keep: Path | None = None, name: str = "") -> Trace:
    """Traces a call.

    Args:
      call: runs the executable and returns when the device has finished.
      text: the executable's compiled text; other executables' kernels are ignored.
      keep: a folder for the trace and the text, as NAME.xplane.pb.gz and NAME.hlo.txt.gz.
      name: NAME of those files.

    Raises:
      RuntimeError: the trace has no kernel of the executable.
    """
    functions, module = _functions(text), text.split(",")[0].removeprefix("HloModule ")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        events = sorted(_events(path, module), key=lambda event: event[2])
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for suffix, content in (("xplane.pb.gz", path.read_bytes()), ("hlo.txt.gz", text.encode())):
                (keep / f"{name}.{suffix}").write_bytes(gzip.compress(content))
    if not events:
        raise RuntimeError(f"The trace has no kernel of the executable {module}.")
    spent: dict[str, dict[str, tuple[float, int]]] = {kind: collections.defaultdict(lambda: (0.0, 0)) for kind in ("function", "kernel")}
    busy, end = 0.0, events[0][2]
    for instruction, kernel, start, duration in events:
        label = functions.get(instruction) or functions.get(kernel) or f"({kernel[:60]})"
        for kind, key in (("function", label), ("kernel", f"{kernel[:70]} [{label}]")):
            total, count = spent[kind][key]
            spent[kind][key] = total + duration, count + 1
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    whole = end - events[0][2]
    by_function, by_kernel = (dict(sorted(rows.items(), key=lambda row: -row[1][0])) for rows in spent.values())
    return Trace(whole, whole - busy, len(events), by_function, by_kernel)


def kernel_seconds(call: Callable[[], Any], names: tuple[str, ...]) -> dict[str, float]:
    """Mean device time of each of the named kernels within a call."""
    found = collections.defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        for event in _stream_events(path):
            if event.name in names:
                found[event.name].append(event.duration_ns)
    return {name: 1e-9 * sum(durations) / len(durations) for name, durations in found.items()}


def _stream_events(path: Path) -> Iterator[Any]:
    """What ran in a GPU's streams, or in the CPU's threads if the trace has no device.

    With a GPU, the host's threads have events of the same names: the launches.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    on_device = any(plane.name.startswith("/device:") for plane in planes)
    for plane in planes:
        for line in plane.lines if plane.name.startswith("/device:" if on_device else "/host:CPU") else ():
            if not on_device or line.name.startswith("Stream"):
                yield from line.events


def _events(path: Path, module: str) -> Iterator[tuple[str, str, float, float]]:
    """(instruction, kernel, start, nanoseconds) of everything that an executable ran on the device, or in the CPU's threads."""
    for event in _stream_events(path):
        stats = dict(event.stats)
        if stats.get("hlo_module") == module and not str(stats["hlo_op"]).startswith("while"):
            yield str(stats["hlo_op"]), event.name, event.start_ns, event.duration_ns


def _functions(text: str) -> dict[str, str]:
    """The project's function of each instruction in a compiled text, also by the name of its kernel."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] | None = None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables[line] = {}
        elif current is not None and (match := re.match(r"(\d+) (.*)", line)):
            current[int(match[1])] = match[2]
        else:
            current = None

    def number(line: str, name: str) -> int:
        match = re.search(rf"{name}=(\d+)", line)
        return int(match[1]) if match else 0

    def name(frame: int) -> str:
        names: list[str] = []
        while len(names) < DEPTH:
            line = tables["StackFrames"][frame]
            location = tables["FileLocations"][number(line, "file_location_id")]
            function = tables["FunctionNames"][number(location, "function_name_id")].strip('"').replace(".<locals>", "")
            if function not in names:
                names.append(function)
            parent = number(line, "parent_frame_id")
            if parent == frame or parent not in tables["StackFrames"]:
                break
            frame = parent
        return " < ".join(names)

    found = {}
    for match in re.finditer(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*stack_frame_id=(\d+)", text, re.MULTILINE):
        found[match[1]] = found[match[1].replace(".", "_").replace("-", "_")] = name(int(match[2]))
    return found


# ---------------------------------------------------------------------- the mesh


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds --data and --expert."""
    parser.add_argument("--data", type=int, default=1, help="axis of the mesh: parts of the batch")
    parser.add_argument("--expert", type=int, default=1, help="axis of the mesh: parts of the experts, and of the batch")


def set_mesh(config: Any, arguments: argparse.Namespace) -> None:
    """Sets both in a run's config."""
    config.mesh.data, config.mesh.expert = arguments.data, arguments.expert


def mesh_of(config: Any) -> Mesh | None:
    """The mesh of a config on this machine's devices; None for a single device."""
    return mesh_of_run(config.mesh.data, config.mesh.expert, config.mesh.tensor)
