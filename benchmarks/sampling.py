"""A whole call of the sampler on random weights of a published shape: prompts, decoding, slots, pages, and the gap to the trainer.

    python benchmarks/sampling.py --shape=gpt-oss-120b [--groups=128] [--group_size=1] [--prompt=1024] [--new=8192] [--slots=128]
        [--cache_tokens=0] [--stop_every=0] [--contexts=4096,8192] [--measure=0] [--data=1] [--expert=1] [--json=FILE]

`decode.py` measures steps; this measures what a run waits for. Every prompt is another one. Nothing stops a rollout but its budget, unless
`--stop_every` says after how many tokens on average: then lengths differ, slots are refilled, and a small `--cache_tokens` makes rollouts
wait. `--contexts` tells the speed, and the floor of decode.py, at contexts passed on the way. `--measure=N` gives N of the rollouts to the
trainer and tells how far its log-probabilities are from the sampler's, along the sampler's routes and on its own.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from decode import bytes_of_a_step, copy_bytes_per_s, sample
from mesh import add_mesh, mesh_of, set_mesh

from discover_jax.config import default_config
from discover_jax.engine import build_model, build_sampler
from discover_jax.learning.logprobs import token_logprobs
from discover_jax.learning.packing import pack
from discover_jax.machines import device_memory, take_gpu_memory
from discover_jax.models.rounding import EXACT_ROUNDING
from discover_jax.models.synthetic import shape_of
from discover_jax.sampling.schedule import PAGE, Progress
from discover_jax.types import Prompt, Rollout


def configured(arguments: argparse.Namespace) -> Any:
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
    """Tokens a second around each context, of launches in which every rollout was live."""
    found = []
    for context in contexts:
        near = [p for p in seen if abs(prompt + p.tokens / rollouts - context) <= max(128, context // 16) and p.finished == 0]
        if len(near) > 1:
            tokens, seconds = near[-1].tokens - near[0].tokens, near[-1].seconds - near[0].seconds
            mean = prompt + (near[-1].tokens + near[0].tokens) / rollouts / 2
            found.append({"context": round(mean), "tokens_per_s": tokens / seconds, "floor_tokens_per_s": rollouts / floor(mean)})
    return found


def gap(model: Any, frozen: Any, lora: Any, rollouts: list[Rollout]) -> dict[str, Any]:
    """How far the trainer's log-probabilities are from the sampler's, along its routes and on the trainer's own; and the entropy."""
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
    """Of trainer - sampler, in nats a token, and of their ratio."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=8192, help="tokens of a rollout")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--cache_tokens", type=int, default=0)
    parser.add_argument("--stop_every", type=int, default=0, help="a rollout ends after so many tokens on average; 0: at its budget")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--contexts", default="4096,8192")
    parser.add_argument("--measure", type=int, default=0, help="rollouts that the trainer looks at")
    add_mesh(parser)
    parser.add_argument("--no_adapter", action="store_true")
    parser.add_argument("--copy_bytes", type=int, default=1 << 32, help="size of the array that is copied")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    take_gpu_memory()
    copy = copy_bytes_per_s(arguments.copy_bytes)
    config, sizes = configured(arguments), shape_of(arguments.shape, arguments.layers)
    model = build_model(config, sizes, mesh_of(config))
    frozen = model.init_frozen(jax.random.key(0))
    lora = None if arguments.no_adapter else model.init_lora(jax.random.key(1))
    # With random weights about one token in `vocab_size / stops` is a stop; without any, a number that is no token stands for it.
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


if __name__ == "__main__":
    main()
