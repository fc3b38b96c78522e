"""Reading prompts on one GPU: attention's kernels beside the references in plain JAX, and the whole prefill with either of them.

    python benchmarks/kernels_prefill.py [--shapes=qwen2.5-coder-1.5b,gpt-oss-20b,gpt-oss-120b] [--prompts=1024,4096,16384] [--layers=4]
        [--seconds=65] [--launches]

It also takes --json=FILE and --record=PREFIX, and needs a GPU and the extra `cuda`. It starts nothing new after --seconds, and names what
it left out. Prompts are read one at a time in chunks of 512 tokens, as the sampler reads them. All times are the best of three repetitions.

attention: a layer's attention to all chunks of a prompt, to pages for full layers and to rings for sliding ones. Rates count the products
of visible keys only. Errors are relative to the largest output of the last chunk, against float32.

prefill: tokens per second of a model of --layers layers with random weights, and an estimate for all layers, whose time grows with their
number.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
import numpy as np
from measuring import matmul_flops_per_s, seconds

from discover_jax.config import default_config
from discover_jax.engine import build_model
from discover_jax.kernels.attention import prefill_attention_reference, prefill_windowed_attention_reference
from discover_jax.kernels.attention_prefill import (
    PrefillTiling,
    attend_pages,
    attend_window,
    prefill_attention,
    prefill_windowed_attention,
)
from discover_jax.kernels.attention_update import Launch
from discover_jax.kernels.kernel_set import REFERENCE
from discover_jax.machines import take_gpu_memory
from discover_jax.models.config import ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.rounding import EXACT_ROUNDING
from discover_jax.models.synthetic import shape_of
from discover_jax.sampling.sampler import PROMPT_CHUNK
from discover_jax.sampling.schedule import PAGE

WINDOW = 128
LAUNCHES = [Launch(*sizes) for sizes in ((128, 64, 3, 4), (128, 64, 2, 4), (128, 64, 3, 8), (128, 128, 2, 8), (64, 64, 3, 4))]
Keep = Callable[[str, dict[str, float], str], None]
"""Keeps a row: its name, its figures and their units as one line."""


# ---------------------------------------------------------------------- attention


def drawn(sizes: ModelConfig, places: int) -> tuple[jax.Array, ...]:
    """Queries of a chunk, keys and values of one layer in scattered pages, the table, and sinks."""
    pages, keys = places // PAGE, jax.random.split(jax.random.key(0), 4)
    shape = (1, pages, sizes.num_kv_heads, PAGE, sizes.head_size)
    pools = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2]]
    q = jax.random.normal(keys[2], (1, PROMPT_CHUNK, sizes.num_heads, sizes.head_size), jnp.bfloat16)
    sinks = jax.random.normal(keys[3], (sizes.num_heads,), jnp.bfloat16) if sizes.sinks else jnp.full(sizes.num_heads, -1e30, jnp.bfloat16)
    table = jnp.asarray(np.random.default_rng(0).permutation(pages)[None], jnp.int32)
    return q, *pools, table, sinks


def chunks(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function that attends for a number of chunks, one after another; each depends on the one before."""

    @jax.jit
    def run(count: jax.Array, q: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, sinks: jax.Array) -> jax.Array:
        def one(i: jax.Array, q: jax.Array) -> jax.Array:
            lengths = (i * PROMPT_CHUNK).reshape(1)
            return 0.5 * q + attend(q, keys, values, jnp.int32(0), table, lengths, sinks)

        return jax.lax.fori_loop(0, count, one, q)

    return run


def windows(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same for a sliding layer. The ring and the chunk are the first pages."""

    @jax.jit
    def run(count: jax.Array, q: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, sinks: jax.Array) -> jax.Array:
        rings = [x[0, :1] for x in (keys, values)]
        new = [x[0, 1 : 1 + PROMPT_CHUNK // PAGE].swapaxes(1, 2).reshape(1, PROMPT_CHUNK, *x.shape[2::2]) for x in (keys, values)]

        def one(i: jax.Array, q: jax.Array) -> jax.Array:
            return 0.5 * q + attend(q, *rings, *new, (i * PROMPT_CHUNK).reshape(1), jnp.int32(0), sinks)

        return jax.lax.fori_loop(0, count, one, q)

    return run


def error(sizes: ModelConfig, arrays: tuple[jax.Array, ...], length: int) -> float:
    """Of the kernel for pages."""
    q, keys, values, table, sinks = arrays
    lengths = jnp.array([length], jnp.int32)
    got = jax.jit(prefill_attention)(q, keys, values, jnp.int32(0), table, lengths, sinks).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        q, keys, values = (x.astype(jnp.float32) for x in (q, keys, values))
        right = jax.jit(prefill_attention_reference)(q, keys, values, jnp.int32(0), table, lengths, sinks)
    return float(jnp.abs(got - right).max() / jnp.abs(right).max())


def measure_attention(name: str, prompts: list[int], limit: float, most: float, keep: Keep, *, launches: bool) -> None:
    sizes = shape_of(name)
    arrays = drawn(sizes, max(prompts))
    run, reference = chunks(prefill_attention), chunks(prefill_attention_reference)
    tried = {}
    for launch in LAUNCHES if launches else ():
        for shares in (1, 2, 4):
            label = "_".join(map(str, (*dataclasses.astuple(launch), shares)))
            tried[label] = chunks(functools.partial(attend_pages, chosen=PrefillTiling(launch, shares)))
    wrong = error(sizes, arrays, max(prompts) - PROMPT_CHUNK)
    for prompt in prompts:
        if late(limit, f"attention of {name}, prompts from {prompt} tokens"):
            return
        count = jnp.int32(prompt // PROMPT_CHUNK)
        own, plain = (seconds(f, count, *arrays, calls=2, repetitions=3) for f in (run, reference))
        flops = 4 * sizes.num_heads * sizes.head_size * prompt * (prompt + 1) / 2
        row = {"us": 1e6 * own, "reference_us": 1e6 * plain, "tflops": 1e-12 * flops / own, "of_matmul": flops / own / most, "error": wrong}
        told = f"kernel {1e6 * own:9.1f} us {row['tflops']:5.0f} TFLOP/s {row['of_matmul']:4.0%}  reference {1e6 * plain:10.1f} us"
        keep(f"attention_{name}_{prompt}", row, f"{told}  {plain / own:5.1f} x  error {wrong:.1e}")
        for label, function in tried.items():
            spent = seconds(function, count, *arrays, calls=2, repetitions=3)
            keep(f"attention_{name}_{prompt}_{label}", {"us": 1e6 * spent}, f"kernel {1e6 * spent:9.1f} us")
    if not sizes.num_sliding or late(limit, f"sliding attention of {name}"):
        return
    count = jnp.int32(max(prompts) // PROMPT_CHUNK)
    window = {"kernel": windows(prefill_windowed_attention), "reference": windows(prefill_windowed_attention_reference)}
    for launch in LAUNCHES if launches else ():
        label = "_".join(map(str, dataclasses.astuple(launch)))
        window[label] = windows(functools.partial(attend_window, launch=launch))
    for label, function in window.items():
        spent = seconds(function, count, *arrays, calls=2, repetitions=3)
        keep(f"window_{name}_{max(prompts)}_{label}", {"us": 1e6 * spent}, f"{label} {1e6 * spent:9.1f} us")


# ---------------------------------------------------------------------- the whole prefill


def reader(model: Model) -> Callable[..., Any]:
    """Reads one chunk; the cache is donated."""
    return jax.jit(model.prefill, donate_argnums=4, compiler_options=EXACT_ROUNDING)


def read_prompt(read: Callable[..., Any], model: Model, frozen: Any, lora: Any, tokens: jax.Array, places: int) -> float:
    """Seconds for one prompt, without the first allocation of the cache."""
    cache = model.init_cache(1, places, PAGE)
    jax.block_until_ready(cache)
    started = time.perf_counter()
    last = None
    for begin in range(0, tokens.shape[1], PROMPT_CHUNK):
        last, cache, _ = read(frozen, lora, tokens[:, begin : begin + PROMPT_CHUNK], jnp.array([PROMPT_CHUNK], jnp.int32), cache)
    jax.block_until_ready(last)
    return time.perf_counter() - started


def measure_prefill(name: str, prompts: list[int], layers: int, limit: float, keep: Keep) -> None:
    if late(limit, f"prefill of {name}"):
        return
    config, sizes = default_config(), shape_of(name, layers)
    config.model.dtype = "bfloat16"
    model = build_model(config, sizes)
    plain = {operation: getattr(REFERENCE, operation) for operation in ("prefill_attention", "prefill_windowed_attention")}
    models = {"kernel": model, "reference": dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, **plain))}
    frozen, lora = model.init_frozen(jax.random.key(0)), model.cast(model.init_lora(jax.random.key(1)))
    tokens = jax.random.randint(jax.random.key(2), (1, max(prompts)), 0, sizes.vocab_size - 1)
    whole = shape_of(name).num_layers
    for label, one in models.items():
        if late(limit, f"prefill of {name}, {label}"):
            return
        read = reader(one)
        read_prompt(read, one, frozen, lora, tokens[:, :PROMPT_CHUNK], max(prompts))  # compiles
        for prompt in prompts:
            spent = min(read_prompt(read, one, frozen, lora, tokens[:, :prompt], max(prompts)) for _ in range(3))
            row = {"tokens_per_s": prompt / spent, "estimate_tokens_per_s": prompt / spent * layers / whole}
            told = f"{label:9s} {row['tokens_per_s']:9.0f} tokens/s with {layers} layers, about"
            keep(f"prefill_{name}_{prompt}_{label}", row, f"{told} {row['estimate_tokens_per_s']:8.0f} with all {whole}")


# ---------------------------------------------------------------------- the command


STARTED = time.perf_counter()


def late(limit: float, what: str) -> bool:
    """Whether the time is up. If so, says what is left out."""
    if time.perf_counter() - STARTED < limit:
        return False
    print(f"left out after {limit:.0f} s: {what}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", default="qwen2.5-coder-1.5b,gpt-oss-20b,gpt-oss-120b")
    parser.add_argument("--prompts", default="1024,4096,16384", help="multiples of 512")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=65.0, help="nothing new is started after so many seconds")
    parser.add_argument("--launches", action="store_true", help="also try other launch parameters of attention")
    parser.add_argument("--json", type=Path)
    figures.add_record(parser)
    arguments = parser.parse_args()
    shapes, prompts = arguments.shapes.split(","), [int(n) for n in arguments.prompts.split(",")]
    take_gpu_memory()
    most = matmul_flops_per_s()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")}
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, **versions, "matmul_flops_per_s": most, "rows": {}}
    print(", ".join(f"{name} {value}" for name, value in (("device", result["device"]), *versions.items())))
    print(f"matrix product {most / 1e12:.0f} TFLOP/s", flush=True)

    def keep(name: str, row: dict[str, float], told: str) -> None:
        """Called after each row, so that a later failure does not lose it."""
        result["rows"][name] = row
        print(f"{time.perf_counter() - STARTED:5.1f} s  {name:44s} {told}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))
        units = {"us": "us", "reference_us": "us", "of_matmul": "fraction", "tokens_per_s": "tokens/s"}
        tidy = name.replace("-", "_").replace(".", "_")
        figures.record(arguments.record, {f"{tidy}_{key}": (row[key], unit) for key, unit in units.items() if key in row})

    heads = {(s.num_heads, s.num_kv_heads, s.head_size): name for name in shapes for s in (shape_of(name),)}
    for name in heads.values():
        measure_attention(name, prompts, arguments.seconds, most, keep, launches=arguments.launches)
    for name in shapes:
        measure_prefill(name, prompts, arguments.layers, arguments.seconds, keep)


if __name__ == "__main__":
    main()
