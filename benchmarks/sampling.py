"""The sampler on random weights of a published shape: decoding steps compared with the device's bandwidth, or a whole call.

    python benchmarks/sampling.py steps --shape=gpt-oss-120b [--batch=128,1] [--prompt=128] [--unread] [--new=256] [--profile]
        [--separate_routing] [--fuse='norm,rotation;norm,rotation,router']
    python benchmarks/sampling.py call --shape=gpt-oss-120b [--groups=128] [--group_size=1] [--prompt=1024] [--new=8192] [--slots=128]
        [--cache_tokens=0] [--stop_every=0] [--contexts=4096,8192] [--temperature=1] [--measure=0]

Both also take --layers, --dtype, --data, --expert, --no_adapter, --json=FILE and --record=PREFIX.

steps: one prompt with a rollout for each row of the batch, through the sampler as a run uses it. With `--unread`, each row has its own
prompt and prefill is skipped, so that long contexts cost nothing: keys and values are zeros, on each row's own pages. The speed is that of
whole launches after those that compile, with every row live. The floor of a step is the time that a large plain copy takes for the bytes
that the step must read: all weights except the experts' matrices; the matrices of the experts that uniform routing would choose; the
adapter likewise, in the model's dtype; and keys and values up to the mean context. On a mesh, it is the floor of one device, without
communication. `--profile` also prints a launch's device time by function. With `--fuse`, it measures a layer's separate kernels and, beside
them, these sets of fusions (FUSIONS in `kernels/layer_decode.py`) instead of the kernels that a run would use; semicolons separate sets.
`--separate_routing` uses a layer's separate kernels, but chooses experts by plain JAX.

call: the time that a run waits, with prefill. All prompts differ. A rollout ends at its budget, unless `--stop_every` sets a mean length:
then lengths differ, slots are refilled, and with a small `--cache_tokens` rollouts wait. `--contexts` also prints speed and floor at these
contexts. With `--measure=N`, the trainer computes the log-probabilities of N rollouts, with the sampler's expert routing and with its own,
and compares them with the sampler's.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
import numpy as np
from measuring import SHOWN, add_mesh, copy_bytes_per_s, mesh_of, set_mesh, trace

from discover_jax.config import default_config
from discover_jax.engine import build_model, build_sampler
from discover_jax.exceptions import ConfigError
from discover_jax.kernels.kernel_set import REFERENCE
from discover_jax.kernels.spread import row_devices
from discover_jax.learning.logprobs import token_logprobs
from discover_jax.learning.packing import pack
from discover_jax.machines import device_memory, take_gpu_memory
from discover_jax.models.cache import Cache
from discover_jax.models.decoder import Model
from discover_jax.models.rounding import EXACT_ROUNDING
from discover_jax.models.sharding import local_bytes
from discover_jax.models.synthetic import shape_of
from discover_jax.sampling.sampler import LAUNCH_STEPS, Sampler
from discover_jax.sampling.schedule import PAGE, Progress
from discover_jax.types import Prompt, Rollout

MATRICES = ("gate_up", "down")
LAUNCHES = 2
"""Launches after which time and tokens are compared."""
LIVE = 0.98
"""Fraction of the tokens of all rollouts before which every rollout is live."""


def bytes_of_a_step(model: Model, frozen: Any, lora: Any, rows: int, context: float) -> dict[str, float]:
    """The bytes that one step must read on a device, by kind."""
    c, data = model.config, 1 if model.mesh is None else model.mesh.shape["data"]
    hit = 1 - (1 - c.experts_per_token / c.num_experts) ** (rows / data) if c.num_experts else 1.0
    rows = rows // row_devices(model.mesh)

    def split(tree: Any) -> tuple[int, int]:
        """Bytes of the experts' matrices, and of everything else."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        inside = [leaf for path, leaf in leaves if any(getattr(key, "key", None) in MATRICES for key in path)]
        return local_bytes(inside), local_bytes(tree) - local_bytes(inside)

    experts, rest = split(frozen)
    experts_lora, rest_lora = (size * model.dtype.itemsize // 4 for size in split(lora)) if lora is not None else (0, 0)
    of_place = 2 * c.num_kv_heads * c.head_size * model.dtype.itemsize
    unread = 0 if c.tied else c.vocab_size - rows  # of an embedding that is not the head, one row per token is read
    return {
        "experts": hit * experts,
        "other_weights": rest - unread * c.width * model.dtype.itemsize,
        "adapter": hit * experts_lora + rest_lora,
        "keys_and_values": rows * of_place * (c.num_full * context + c.num_sliding * min(context, c.sliding_window)),
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
    """Time and tokens so far after each launch, for up to `launches` launches, with one group per prompt."""
    seen: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        seen.append((time.perf_counter(), progress.tokens))
        if len(seen) >= launches:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        for _ in sampler.sample(frozen, lora, prompts, rows, seed=0, step=step, on_progress=note):
            pass
    return seen


# ---------------------------------------------------------------------- steps


def leave_prompts_unread(sampler: Any, model: Model) -> None:
    """Rows start as if their prompts had been prefilled, with the cache as it is and zero activations."""
    hidden_1D = jnp.zeros((1, model.config.width), model.dtype)

    def unread(frozen: Any, lora: Any, tokens_1C: Any, counts_1: Any, cache: Cache) -> tuple[jax.Array, Cache, np.ndarray]:
        routes = np.zeros((*tokens_1C.shape, *model.routes.shape), model.routes.dtype)
        return hidden_1D, dataclasses.replace(cache, lengths_B=cache.lengths_B + counts_1), routes

    unread.lower = sampler._prefill.lower  # pyright: ignore[reportFunctionMemberAccess] - for `profile`
    sampler._prefill = unread


def layer_of(fusions: str) -> Any:
    """Kernels of a layer with these fusions; None if there are none of them: the separate kernels.

    Raises:
      ConfigError: a name is unknown.
    """
    from discover_jax.kernels.layer_decode import fused  # needs the extra `cuda`

    return fused(fusions.split(",")) if fusions else None


def problem_of_steps(arguments: argparse.Namespace) -> str:
    """What is wrong with the arguments of `steps`, before anything is loaded or compiled; empty if nothing is."""
    least = math.floor(LAUNCHES * LAUNCH_STEPS / LIVE) + 1
    if arguments.new < least:
        return (
            f"--new={arguments.new} is too short: the speed is that of the steps between {LAUNCHES} launches of {LAUNCH_STEPS} tokens,"
            f" before rollouts end. Use --new={least} or more."
        )
    if arguments.fuse and arguments.separate_routing:
        return "--fuse and --separate_routing exclude each other: both choose a layer's kernels."
    try:
        for fusions in arguments.fuse.split(";"):
            if arguments.fuse:
                layer_of(fusions)
    except ConfigError as error:
        return f"--fuse={arguments.fuse}: {error}"
    return ""


def measured_steps(
    arguments: argparse.Namespace, rows: int, fusions: str | None, frozen: Any, lora: Any, spent: _Compilations, copy: float
) -> dict[str, Any]:
    """One row of the table. `fusions`: names, separated by commas; empty for the separate kernels; None for those of a run."""
    config = config_of_steps(arguments, rows)
    sizes = shape_of(arguments.shape, arguments.layers)
    model = build_model(config, sizes, mesh_of(config))
    changes: dict[str, Any] = {}
    if arguments.separate_routing:
        changes = {"layer": None, "decode_routing": REFERENCE.decode_routing}
    elif fusions is not None:
        changes = {"layer": layer_of(fusions)}
    model = dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, **changes))
    # Only the last id stops, so almost every rollout spends its budget.
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
    seen = [(when, tokens) for when, tokens in launches if tokens < rows * arguments.new * LIVE]
    (started, first), (ended, last) = seen[0], seen[-1]
    steps = (last - first) / rows
    seconds = (ended - started) / steps
    context = arguments.prompt + (first + last) / rows / 2
    needed = bytes_of_a_step(model, frozen, lora, rows, context)
    floor = sum(needed.values()) / copy
    result = {
        "batch": rows,
        "fusions": fusions,
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


def profile(sampler: Sampler, frozen: Any, lora: Any, prompts: list[Prompt], group_size: int, keep: str) -> dict[str, Any]:
    """Microseconds per decoding step by function and by kernel, the number of kernels, and the device's idle time."""
    shapes, shapes_lora = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (frozen, lora))
    groups, rows = len(prompts), len(prompts) * group_size
    (decoding,) = (function for function in sampler.lowered_functions(shapes, shapes_lora, groups, rows) if function.name == "decode")
    seen: list[tuple[float, int]] = []

    def launches() -> None:
        seen.extend(sample(sampler, frozen, lora, prompts, group_size, step=2, launches=2))

    found = trace(launches, decoding.lowered.compile().as_text(), Path(keep) if keep else None, f"decode.{rows}")
    steps = seen[-1][1] / rows

    def us(nanoseconds: float) -> float:
        return round(nanoseconds / steps / 1e3, 1)

    return {
        "us_a_step": us(found.whole_ns),
        "idle_us_a_step": us(found.idle_ns),
        "kernels_a_step": round(found.events / steps, 1),
        "by_function": {name: us(spent) for name, (spent, _) in itertools.islice(found.by_function.items(), SHOWN)},
        "kernels_by_function": {name: round(count / steps, 1) for name, (_, count) in found.by_function.items()},
        "by_kernel": {name: us(spent) for name, (spent, _) in itertools.islice(found.by_kernel.items(), SHOWN)},
    }


def config_of_steps(arguments: argparse.Namespace, rows: int) -> Any:
    config = default_config()
    config.model.dtype = arguments.dtype
    config.groups, config.group_size = (rows, 1) if arguments.unread else (1, rows)
    config.sampling.slots = rows
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = arguments.prompt, arguments.new
    set_mesh(config, arguments)
    return config


def measure_steps(arguments: argparse.Namespace) -> None:
    spent = _Compilations()
    copy = copy_bytes_per_s(arguments.copy_bytes)
    started = time.perf_counter()
    config = config_of_steps(arguments, 1)
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
    labels = {None: "", "": "separate"} | {fusions: f"fused_{fusions}" for fusions in filter(None, arguments.fuse.split(";"))}
    variants = ["", *filter(None, arguments.fuse.split(";"))] if arguments.fuse else [None]
    for rows, fusions in itertools.product(map(int, arguments.batch.split(",")), variants):
        row = measured_steps(arguments, rows, fusions, frozen, lora, spent, copy)
        result["rows"].append(row)
        print(
            f"{rows:5d} {row['mean_context']:7d} | {row['step_ms']:7.2f} ms {row['floor_ms']:6.2f} ms {row['tokens_per_s']:9.1f}"
            f" {row['floor_tokens_per_s']:9.1f}     | {row['of_floor']:6.1%} {row['compile_s']:8.1f} s {labels[fusions]}",
            flush=True,
        )
        if arguments.profile:
            _show(row["profile"])
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))
        name = f"b{rows}_ctx{row['mean_context']}" + (f"_{labels[fusions].replace(',', '_')}" if fusions is not None else "")
        values = {
            "tokens_per_s": (row["tokens_per_s"], "tokens/s"),
            "step": (row["step_ms"], "ms"),
            "fraction_of_floor": (row["of_floor"], "fraction"),
        }
        figures.record(
            arguments.record, {f"{name}_{key}": value for key, value in values.items()}, devices=arguments.data * arguments.expert
        )


def _show(found: dict[str, Any]) -> None:
    print(f"  a step of {found['us_a_step']:.0f} us, {found['idle_us_a_step']:.0f} us idle, {found['kernels_a_step']:.0f} kernels")
    for name, spent in found["by_function"].items():
        print(f"  {spent:9.1f} us {found['kernels_by_function'][name]:7.1f}  {name}")


# ---------------------------------------------------------------------- call


def config_of_call(arguments: argparse.Namespace) -> Any:
    """The config of a run with these arguments."""
    config = default_config()
    config.model.dtype = arguments.dtype
    config.groups, config.group_size = arguments.groups, arguments.group_size
    config.sampling.slots, config.sampling.cache_tokens = arguments.slots, arguments.cache_tokens
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = arguments.prompt, arguments.new
    config.sampling.temperature = arguments.temperature
    set_mesh(config, arguments)
    return config


def speeds(seen: list[Progress], contexts: list[int], prompt: int, rollouts: int, floor: Any) -> list[dict[str, Any]]:
    """Tokens per second near each context, from launches in which every rollout was live."""
    found = []
    for context in contexts:
        near = [p for p in seen if abs(prompt + p.tokens / rollouts - context) <= max(128, context // 16) and p.finished == 0]
        if len(near) > 1:
            tokens, seconds = near[-1].tokens - near[0].tokens, near[-1].seconds - near[0].seconds
            mean = prompt + (near[-1].tokens + near[0].tokens) / rollouts / 2
            found.append({"context": round(mean), "tokens_per_s": tokens / seconds, "floor_tokens_per_s": rollouts / floor(mean)})
    return found


def gap(model: Any, frozen: Any, lora: Any, rollouts: list[Rollout]) -> dict[str, Any]:
    """The gap between trainer's and sampler's log-probabilities, with the sampler's routing and the trainer's; and the entropy."""
    longest = max(len(r.prompt_tokens_P) + len(r.tokens_T) for r in rollouts)
    batches = pack(rollouts, np.ones(len(rollouts)), row_tokens=-(-longest // PAGE) * PAGE, rows=1)
    alone = [dataclasses.replace(batch, routes_BTLX=None) for batch in batches]
    logprobs = jax.jit(functools.partial(token_logprobs, model, chunk_tokens=1024), compiler_options=EXACT_ROUNDING)
    found: dict[str, Any] = {}
    for name, chosen in (("sampler_routes", batches), ("own_routes", alone)):
        results = [jax.device_get(logprobs(frozen, lora, batch)) for batch in chosen]
        pairs = list(zip(results, chosen, strict=True))
        found["entropy_nats"] = float(np.concatenate([entropy_BT[batch.mask_BT] for (_, entropy_BT), batch in pairs]).mean())
        found[name] = distribution(np.concatenate([(ours_BT - batch.sampler_logprobs_BT)[batch.mask_BT] for (ours_BT, _), batch in pairs]))
    return found


def distribution(gaps: np.ndarray) -> dict[str, Any]:
    """The distribution of trainer - sampler, in nats per token, and of their ratio."""
    gaps = gaps.astype(np.float64)
    far = np.abs(np.expm1(gaps))
    return {
        "tokens": gaps.size,
        "mean": float(np.abs(gaps).mean()),
        "mean_signed": float(gaps.mean()),
        "quantiles": {str(q): float(np.quantile(np.abs(gaps), q)) for q in (0.5, 0.9, 0.99, 0.999, 1)},
        "ratio_further_from_1_than": {str(limit): float((far > limit).mean()) for limit in (0.01, 0.05, 0.2)},
        "ratio_min_max": [float(np.exp(gaps.min())), float(np.exp(gaps.max()))],
    }


def measure_call(arguments: argparse.Namespace) -> None:
    copy = copy_bytes_per_s(arguments.copy_bytes)
    config, sizes = config_of_call(arguments), shape_of(arguments.shape, arguments.layers)
    model = build_model(config, sizes, mesh_of(config))
    frozen = model.init_frozen(jax.random.key(0))
    lora = None if arguments.no_adapter else model.init_lora(jax.random.key(1))
    # With random weights, about one token in `vocab_size / stops` is a stop. Without stops, use an id that is not a token.
    stops = round(sizes.vocab_size / arguments.stop_every) if arguments.stop_every else 0
    stop_ids = tuple(range(sizes.vocab_size - stops, sizes.vocab_size)) or (sizes.vocab_size,)
    sampler = build_sampler(config, model, stop_ids, memory=device_memory(), learn=not arguments.no_adapter)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(group, "seed", "", rng.integers(0, sizes.vocab_size - stops, arguments.prompt).astype(np.int32))
        for group in range(arguments.groups)
    ]
    started = time.perf_counter()
    sample(sampler, frozen, lora, prompts[:1], arguments.groups * arguments.group_size, step=0, launches=2)  # compiles
    compiling = time.perf_counter() - started
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: copy {copy / 1e12:.2f} TB/s, compiled in {compiling:.0f} s", flush=True)

    seen: list[Progress] = []
    shown = 0.0

    def follow(progress: Progress) -> None:
        nonlocal shown
        seen.append(progress)
        if progress.seconds - shown > 10:
            shown = progress.seconds
            print(f"{progress.seconds:6.1f} s {progress.tokens:9,} tokens, {progress.finished} of {progress.total} done", flush=True)

    rollouts = list(sampler.sample(frozen, lora, prompts, arguments.group_size, seed=0, step=1, on_progress=follow))
    last, total = seen[-1], len(rollouts)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "mesh": None if model.mesh is None else dict(model.mesh.shape),
        "jax": jax.__version__,
        "experts": model.experts,
        "copy_bytes_per_s": copy,
        "compile_s": compiling,
        "temperature": arguments.temperature,
        "rollouts": total,
        "tokens": last.tokens,
        "tokens_mean": last.tokens / total,
        "seconds": last.seconds,
        "tokens_per_s": last.tokens / last.seconds,
        "until_first_launch_s": seen[0].seconds,
        "utilisation": last.utilisation,
        "set_aside": last.set_aside,
        "cache_tokens_used": last.pages * PAGE,
        "compilations": sampler.compilations,
        "contexts": [],
    }
    if not arguments.stop_every and total <= arguments.slots:

        def floor(context: float) -> float:
            return sum(bytes_of_a_step(model, frozen, lora, total, context).values()) / copy

        result["contexts"] = speeds(seen, [int(c) for c in arguments.contexts.split(",")], arguments.prompt, total, floor)
    if arguments.measure:
        result["gap"] = gap(model, frozen, lora, rollouts[: arguments.measure])
    print(json.dumps(result, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    values = {
        "tokens_per_s": (result["tokens_per_s"], "tokens/s"),
        "seconds": (result["seconds"], "s"),
        "tokens": (result["tokens"], "tokens"),
    }
    values |= {f"ctx{row['context']}_tokens_per_s": (row["tokens_per_s"], "tokens/s") for row in result["contexts"]}
    for name in ("sampler_routes", "own_routes") if arguments.measure else ():
        found = result["gap"][name]
        values[f"gap_{name}_mean"] = found["mean"], "nats"
        for label, quantile in (("median", "0.5"), ("p99", "0.99"), ("max", "1")):
            values[f"gap_{name}_{label}"] = found["quantiles"][quantile], "nats"
    figures.record(arguments.record, values, devices=arguments.data * arguments.expert)


# ---------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    steps, call = (commands.add_parser(name) for name in ("steps", "call"))
    steps.add_argument("--batch", default="128,1", help="batch sizes, measured one after another")
    steps.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    steps.add_argument("--unread", action="store_true", help="give each row its own prompt and skip prefill")
    steps.add_argument("--new", type=int, default=256, help="tokens of a rollout")
    steps.add_argument("--profile", action="store_true")
    steps.add_argument(
        "--separate_routing", action="store_true", help="a layer's separate kernels, experts chosen by plain JAX; one device"
    )
    steps.add_argument("--fuse", default="", help="sets of fusions to measure beside a layer's separate kernels, separated by semicolons")
    steps.add_argument("--keep_trace", default="", help="folder for the trace and the compiled function")
    call.add_argument("--groups", type=int, default=128)
    call.add_argument("--group_size", type=int, default=1)
    call.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    call.add_argument("--new", type=int, default=8192, help="tokens of a rollout")
    call.add_argument("--slots", type=int, default=128)
    call.add_argument("--cache_tokens", type=int, default=0)
    call.add_argument("--stop_every", type=int, default=0, help="mean tokens of a rollout; 0: all end at their budget")
    call.add_argument("--temperature", type=float, default=1.0)
    call.add_argument("--contexts", default="4096,8192")
    call.add_argument("--measure", type=int, default=0, help="rollouts whose log-probabilities the trainer also computes")
    for command in (steps, call):
        command.add_argument("--shape", default="gpt-oss-20b")
        command.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
        command.add_argument("--dtype", default="bfloat16")
        command.add_argument("--no_adapter", action="store_true")
        command.add_argument("--copy_bytes", type=int, default=1 << 32, help="size of the array that is copied")
        command.add_argument("--json", type=Path)
        add_mesh(command)
        figures.add_record(command)
    arguments = parser.parse_args()
    if arguments.what == "steps" and (problem := problem_of_steps(arguments)):
        parser.error(problem)
    take_gpu_memory()
    (measure_steps if arguments.what == "steps" else measure_call)(arguments)


if __name__ == "__main__":
    main()
