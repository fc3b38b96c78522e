"""Tokens a second of sampling on random weights of a published shape, beside what the device's own bandwidth allows in the same run.

    python benchmarks/decode.py --shape=gpt-oss-120b [--batch=128,1] [--prompt=128] [--unread] [--new=256] [--data=1] [--expert=1]
        [--no_adapter] [--profile] [--json=FILE]

One prompt, as many rollouts of it as the batch has rows, through the sampler as a run uses it. With `--unread` there is a prompt for each
row, and none is read, so that long contexts cost nothing to reach: their keys and values are zeros, each row's on pages of its own.

The speed is that of whole launches after those that compile, with every row live. The floor of a step is the time in which a plain large
copy moves the bytes that it must read: all weights but the experts' matrices; those of the experts that a uniform routing would choose; the
adapter likewise, in the model's type; and keys and values up to the mean context. On a mesh it is that of one device, without a time for
what devices exchange. `--profile` also says in which functions the device's time of a launch went.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mesh import add_mesh, mesh_of, set_mesh

from discover_jax.config import default_config
from discover_jax.engine import build_model, build_sampler
from discover_jax.kernels.spread import row_devices
from discover_jax.machines import take_gpu_memory
from discover_jax.models.cache import Cache
from discover_jax.models.gpt_oss import Model
from discover_jax.models.sharding import local_bytes
from discover_jax.models.synthetic import shape_of
from discover_jax.sampling.sampler import Sampler
from discover_jax.sampling.schedule import Progress
from discover_jax.types import Prompt

MATRICES = ("gate_up", "down")
SHOWN, DEPTH = 30, 3
"""Rows of a profile, and functions that a row names, the innermost first."""


def copy_bytes_per_s(size: int) -> float:
    """Bytes read and written by a copy of an array of that size: the best of five times twenty in a row."""
    words = jax.block_until_ready(jax.jit(lambda: jnp.arange(size // 4, dtype=jnp.uint32))())
    result = jax.block_until_ready(jnp.copy(words))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20):
            result = jnp.copy(words)  # the one before is let go, so that its memory serves again
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - started) / 20)
    return 2 * size / best


def bytes_of_a_step(model: Model, frozen: Any, lora: Any, rows: int, context: float) -> dict[str, float]:
    """What one step must read at least on a device, bytes by what they are."""
    c, data = model.config, 1 if model.mesh is None else model.mesh.shape["data"]
    hit = 1 - (1 - c.experts_per_token / c.num_experts) ** (rows / data)
    rows = rows // row_devices(model.mesh)

    def split(tree: Any) -> tuple[int, int]:
        """Elements' bytes of the experts' matrices, and of all else."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        inside = [leaf for path, leaf in leaves if any(getattr(key, "key", None) in MATRICES for key in path)]
        return local_bytes(inside), local_bytes(tree) - local_bytes(inside)

    experts, rest = split(frozen)
    experts_lora, rest_lora = (size * model.dtype.itemsize // 4 for size in split(lora)) if lora is not None else (0, 0)
    of_place = 2 * c.num_pairs * c.num_kv_heads * c.head_size * model.dtype.itemsize
    return {
        "experts": hit * experts,
        "other_weights": rest - (c.vocab_size - rows) * c.width * model.dtype.itemsize,  # of the embedding a row for each token
        "adapter": hit * experts_lora + rest_lora,
        "keys_and_values": rows * of_place * (context + min(context, c.sliding_window)),
    }


class _Compilations:
    """Seconds that jax spends on tracing, lowering and compiling."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


class _EnoughError(Exception):
    pass


def sample(
    sampler: Sampler, frozen: Any, lora: Any, prompts: list[Prompt], rows: int, step: int, launches: float = float("inf")
) -> list[tuple[float, int]]:
    """The time and the tokens so far after each launch, up to so many launches, of a group of so many rows for each prompt."""
    seen: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        seen.append((time.perf_counter(), progress.tokens))
        if len(seen) >= launches:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        for _ in sampler.sample(frozen, lora, prompts, rows, seed=0, step=step, on_progress=note):
            pass
    return seen


def leave_prompts_unread(sampler: Any, model: Model) -> None:
    """Rows begin as if their prompts had been read, with what the cache holds, and zeros for the stream."""
    hidden_1D = jnp.zeros((1, model.config.width), model.dtype)

    def unread(frozen: Any, lora: Any, tokens_1C: Any, counts_1: Any, cache: Cache) -> tuple[jax.Array, Cache, np.ndarray]:
        routes = np.zeros((*tokens_1C.shape, *model.routes.shape), model.routes.dtype)
        return hidden_1D, dataclasses.replace(cache, lengths_B=cache.lengths_B + counts_1), routes

    sampler._prefill = unread


def measure(arguments: argparse.Namespace, rows: int, frozen: Any, lora: Any, spent: _Compilations, copy: float) -> dict[str, Any]:
    """One row of the table."""
    config = configured(arguments, rows)
    sizes = shape_of(arguments.shape, arguments.layers)
    model = build_model(config, sizes, mesh_of(config))
    # The last id stops, so that almost every rollout spends its budget.
    sampler = build_sampler(config, model, stop_ids=(sizes.vocab_size - 1,))
    if arguments.unread:
        leave_prompts_unread(sampler, model)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(group, "seed", "", rng.integers(0, sizes.vocab_size - 1, arguments.prompt).astype(np.int32))
        for group in range(config.groups)
    ]
    before = spent.seconds
    sample(sampler, frozen, lora, prompts, config.group_size, step=0, launches=2)
    compiling = spent.seconds - before
    launches = sample(sampler, frozen, lora, prompts, config.group_size, step=1)
    seen = [(when, tokens) for when, tokens in launches if tokens < rows * arguments.new * 0.98]
    if len(seen) < 2:
        sys.exit(f"--new={arguments.new} is too short: there are no two launches to measure.")
    (started, first), (ended, last) = seen[0], seen[-1]
    steps = (last - first) / rows
    seconds = (ended - started) / steps
    context = arguments.prompt + (first + last) / rows / 2
    needed = bytes_of_a_step(model, frozen, lora, rows, context)
    floor = sum(needed.values()) / copy
    result = {
        "batch": rows,
        "mean_context": round(context),
        "compile_s": round(compiling, 1),
        "launches_ms_a_step": [round(1e3 * (b - a) * rows / (n - m), 2) for (a, m), (b, n) in itertools.pairwise(seen)],
        "step_ms": 1e3 * seconds,
        "floor_ms": 1e3 * floor,
        "bytes_a_step": {name: round(size) for name, size in needed.items()},
        "tokens_per_s": rows / seconds,
        "floor_tokens_per_s": rows / floor,
        "of_floor": floor / seconds,
        "compilations": sampler.compilations,
    }
    if arguments.profile:
        result["profile"] = profile(sampler, frozen, lora, prompts, config.group_size, arguments.keep_trace)
    return result


# ---------------------------------------------------------------------- where the time goes


def _functions(text: str) -> dict[str, str]:
    """For each instruction of a compiled program, also by the name that its kernel has, the project's functions that it comes from."""
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


def _events(folder: str, module: str) -> Iterator[tuple[str, str, float, float]]:
    """(instruction, kernel, start, nanoseconds) of what a program ran on the device, or in the CPU's threads."""
    (path,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith(("/device:", "/host:CPU")):
            continue
        for line in plane.lines:
            if plane.name.startswith("/device:") and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == module and not str(stats["hlo_op"]).startswith("while"):
                    yield str(stats["hlo_op"]), event.name, event.start_ns, event.duration_ns


def profile(sampler: Sampler, frozen: Any, lora: Any, prompts: list[Prompt], rows: int, keep: str) -> dict[str, Any]:
    """Microseconds a step of decoding by function and by kernel, their number, and how long the device had nothing to do."""
    shapes, shapes_lora = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (frozen, lora))
    (decoding,) = (function for function in sampler.lowered_functions(shapes, shapes_lora, 1, rows) if function.name == "decode")
    text = decoding.lowered.compile().as_text()
    functions, module = _functions(text), text.split(",")[0].removeprefix("HloModule ")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seen = sample(sampler, frozen, lora, prompts, rows, step=2, launches=2)
        events = list(_events(folder, module))
        if keep:
            (path,) = Path(folder).rglob("*.xplane.pb")
            Path(keep).mkdir(parents=True, exist_ok=True)
            for name, content in ((f"decode.{rows}.xplane.pb.gz", path.read_bytes()), (f"decode.{rows}.hlo.txt.gz", text.encode())):
                (Path(keep) / name).write_bytes(gzip.compress(content))
    steps = seen[-1][1] / rows
    by_function: dict[str, float] = collections.defaultdict(float)
    by_kernel: dict[str, float] = collections.defaultdict(float)
    counts = collections.Counter[str]()
    busy, end = 0.0, 0.0
    for instruction, kernel, start, duration in sorted(events, key=lambda event: event[2]):
        label = functions.get(instruction) or functions.get(kernel) or f"({kernel[:60]})"
        by_function[label] += duration
        by_kernel[f"{kernel[:70]} [{label}]"] += duration
        counts[label] += 1
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    whole = (end - min(event[2] for event in events)) / steps / 1e3

    def table(spent: dict[str, float]) -> dict[str, float]:
        return {name: round(spent[name] / steps / 1e3, 1) for name in sorted(spent, key=lambda name: -spent[name])[:SHOWN]}

    return {
        "us_a_step": round(whole, 1),
        "idle_us_a_step": round(whole - busy / steps / 1e3, 1),
        "kernels_a_step": round(sum(counts.values()) / steps, 1),
        "by_function": table(by_function),
        "kernels_by_function": {name: round(count / steps, 1) for name, count in counts.items()},
        "by_kernel": table(by_kernel),
    }


# ---------------------------------------------------------------------- the command


def configured(arguments: argparse.Namespace, rows: int) -> Any:
    config = default_config()
    config.model.dtype = arguments.dtype
    config.groups, config.group_size = (rows, 1) if arguments.unread else (1, rows)
    config.sampling.slots = rows
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = arguments.prompt, arguments.new
    set_mesh(config, arguments)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", default="128,1", help="rows, one after another")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--unread", action="store_true", help="a prompt for each row, none of which is read")
    parser.add_argument("--new", type=int, default=256, help="tokens of a rollout")
    add_mesh(parser)
    parser.add_argument("--no_adapter", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--keep_trace", default="", help="folder for the trace and the compiled program")
    parser.add_argument("--copy_bytes", type=int, default=1 << 32, help="size of the array that is copied")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    take_gpu_memory()
    spent = _Compilations()
    copy = copy_bytes_per_s(arguments.copy_bytes)
    started = time.perf_counter()
    config = configured(arguments, 1)
    model = build_model(config, shape_of(arguments.shape, arguments.layers), mesh_of(config))
    frozen = model.init_frozen(jax.random.key(0))
    lora = None if arguments.no_adapter else model.init_lora(jax.random.key(1))
    jax.block_until_ready((frozen, lora))
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "mesh": None if model.mesh is None else dict(model.mesh.shape),
        "jax": jax.__version__,
        "experts": model.experts,
        "copy_bytes_per_s": copy,
        "weights_bytes": local_bytes(frozen),
        "adapter_bytes": local_bytes(lora),
        "init_s": round(time.perf_counter() - started, 1),
        "rows": [],
    }
    print(f"{result['device']}, jax {result['jax']}: copy {copy / 1e12:.2f} TB/s, {arguments.shape} {model.experts}", flush=True)
    print(f"weights {result['weights_bytes'] / 1e9:.2f} GB, adapter {result['adapter_bytes'] / 1e9:.2f} GB, {result['init_s']} s")
    print("batch context |  step       floor    tokens/s    floor      | of floor  compile")
    for rows in map(int, arguments.batch.split(",")):
        row = measure(arguments, rows, frozen, lora, spent, copy)
        result["rows"].append(row)
        print(
            f"{rows:5d} {row['mean_context']:7d} | {row['step_ms']:7.2f} ms {row['floor_ms']:6.2f} ms {row['tokens_per_s']:9.1f}"
            f" {row['floor_tokens_per_s']:9.1f}     | {row['of_floor']:6.1%} {row['compile_s']:8.1f} s",
            flush=True,
        )
        if arguments.profile:
            _show(row["profile"])
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))


def _show(found: dict[str, Any]) -> None:
    print(f"  a step of {found['us_a_step']:.0f} us, {found['idle_us_a_step']:.0f} us idle, {found['kernels_a_step']:.0f} kernels")
    for name, spent in found["by_function"].items():
        print(f"  {spent:9.1f} us {found['kernels_by_function'][name]:7.1f}  {name}")


if __name__ == "__main__":
    main()
