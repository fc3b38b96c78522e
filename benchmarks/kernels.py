"""The kernels of decoding at gpt-oss-120b's shape, each beside this GPU's own ceilings, measured in the same run.

    python benchmarks/kernels.py [--tokens=1,8,32,128,512] [--rank=8] [--skew=0,1] [--json=FILE]

Ceilings: a plain copy of 4 GiB through XLA (bytes read and written), and a bf16 matrix product. Then the mixture of experts of one layer
on random packed weights, from the chosen experts to the summed output, many layers in one scan. Rates count the packed bytes of the experts
that are hit, each once, and the multiplications of the routed rows; errors are relative, against float32 on the dequantised weights. The
routing is drawn from normal logits; a skew adds a normal preference for each expert, of that standard deviation. Needs a GPU and the extra
`kernels`. Every figure is the best of five repetitions.
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import gated
from discover_jax.kernels.experts_decode import ExpertsTiling, TiledMatrix, choose_tiling, moe_routed, multiply
from discover_jax.kernels.mxfp4_tiles import SLABS, lay_out, restore
from discover_jax.models.mxfp4 import dequantise

EXPERTS, WIDTH, HIDDEN, ACTIVE = 128, 2880, 2880, 4
LIMIT, ALPHA = 7.0, 1.702
LAYERS = 24
"""Layers of one scan. One set of weights serves all: 1.7 GB, far more than a GPU's cache."""


def seconds(function: Callable[..., Any], *arguments: Any, calls: int = 3, repetitions: int = 5) -> float:
    """Of one call: the best mean of `calls` calls in a row, after one that compiles."""
    result = jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)  # the one before is let go, so that its memory serves again
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, and floating-point operations per second of a large bf16 matrix product."""
    words = jax.jit(lambda: jnp.arange(1 << 30, dtype=jnp.uint32))()
    copy = 2 * words.nbytes / seconds(jnp.copy, words, calls=20)
    del words
    return {"copy_bytes_per_s": copy, "matmul_flops_per_s": matmul_flops_per_s()}


def matmul_flops_per_s(size: int = 8192) -> float:
    """Of a bfloat16 product of two square matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), a, b, calls=20)


def matrix(key: jax.Array, out: int, into: int, rank: int, *, paired: bool) -> TiledMatrix:
    """Random tiles; the adapter in bfloat16, as a sampler casts it once."""
    keys = jax.random.split(key, 5)
    blocks = jax.jit(lambda k: jax.random.bits(k, (EXPERTS, out, into // 32, 16), jnp.uint8))(keys[0])
    scales = jax.random.randint(keys[1], (EXPERTS, out, into // 32), 119, 123).astype(jnp.uint8)
    tiles = lay_out(blocks, scales, SLABS["gate_up" if paired else "down"])
    bias = jax.random.normal(keys[2], (EXPERTS, out), jnp.bfloat16)
    a = 0.02 * jax.random.normal(keys[3], (EXPERTS, rank, into), jnp.bfloat16)
    b = 0.02 * jax.random.normal(keys[4], (EXPERTS, out, rank), jnp.bfloat16)
    return TiledMatrix(*tiles, bias, a, b, 4.0) if rank else TiledMatrix(*tiles, bias)


def routing(tokens: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(tokens)
    logits = rng.normal(size=(tokens, EXPERTS)) + skew * rng.normal(size=EXPERTS)
    index = np.argsort(-logits, axis=1)[:, :ACTIVE].astype(np.int32)
    weights = np.exp(np.take_along_axis(logits, index, axis=1))
    return index, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def layer_seconds(x_TD: jax.Array, index: Any, weights: Any, gate_up: TiledMatrix, down: TiledMatrix, chosen: ExpertsTiling) -> float:

    @jax.jit
    def layers(x_TD: jax.Array, index_TX: jax.Array, weights_TX: jax.Array, up: TiledMatrix, low: TiledMatrix) -> jax.Array:
        def layer(x_TD: jax.Array, _: None) -> tuple[jax.Array, None]:
            own_TX = index_TX + jnp.isnan(x_TD[0, 0]).astype(jnp.int32)  # so that the sorting is not moved out of the loop
            out_TD = moe_routed(x_TD, own_TX, weights_TX, up, low, limit=LIMIT, alpha=ALPHA, chosen=chosen)
            return (0.5 * x_TD + 1e-3 * out_TD).astype(x_TD.dtype), None

        return jax.lax.scan(layer, x_TD, length=LAYERS)[0]

    return seconds(layers, x_TD, jnp.asarray(index), jnp.asarray(weights), gate_up, down) / LAYERS


def matmul_seconds(x: jax.Array, index: Any, held: TiledMatrix, chosen: ExpertsTiling, *, paired: bool) -> float:
    """One of the two kernels by itself, with its adapter."""

    @jax.jit
    def calls(x: jax.Array, index_TX: jax.Array, held: TiledMatrix) -> jax.Array:
        rows = sort_rows(index_TX, EXPERTS, chosen.rows)

        def call(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            options = {"block": chosen.rows, "paired": paired, "share": ACTIVE if paired else 1, "limit": LIMIT, "alpha": ALPHA}
            y = multiply(x, held, rows, chosen.gate_up if paired else chosen.down, **options)
            # A trace of the result goes on, so that each call waits for the one before.
            return x + (1e-30 * y.reshape(-1)[0]).astype(x.dtype), None

        return jax.lax.scan(call, x, length=LAYERS)[0]

    return seconds(calls, x, jnp.asarray(index), held) / LAYERS


def relative_error(x_TD: jax.Array, index: Any, weights: Any, gate_up: TiledMatrix, down: TiledMatrix, chosen: ExpertsTiling) -> float:
    """Against float32, expert after expert, adapters merged."""
    weights_TE = np.zeros((len(x_TD), EXPERTS), np.float32)
    np.put_along_axis(weights_TE, index, weights, axis=1)

    def dense(held: TiledMatrix, *, paired: bool) -> jax.Array:
        matrix = dequantise(*restore(held.words[None], held.factors[None], paired=paired), jnp.float32)[0]
        if held.lora_a is None or held.lora_b is None:
            return matrix
        return matrix + held.scale * held.lora_b.astype(jnp.float32) @ held.lora_a.astype(jnp.float32)

    @jax.jit
    def expected(x_TD: jax.Array, weights_TE: jax.Array, up: TiledMatrix, low: TiledMatrix) -> jax.Array:
        def add(total_TD: jax.Array, one: Any) -> tuple[jax.Array, None]:
            weight_T, up, low = one
            h = x_TD.astype(jnp.float32) @ dense(up, paired=True).T + up.bias.astype(jnp.float32)
            y = gated(h, limit=LIMIT, alpha=ALPHA) @ dense(low, paired=False).T + low.bias.astype(jnp.float32)
            return total_TD + weight_T[:, None] * y, None

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add, jnp.zeros(x_TD.shape), (weights_TE.T, up, low))[0]

    @jax.jit
    def got(x_TD: jax.Array, index_TX: jax.Array, weights_TX: jax.Array, up: TiledMatrix, low: TiledMatrix) -> jax.Array:
        return moe_routed(x_TD.astype(jnp.float32), index_TX, weights_TX, up, low, limit=LIMIT, alpha=ALPHA, chosen=chosen)

    right = np.asarray(expected(x_TD, jnp.asarray(weights_TE), gate_up, down), np.float64)
    found = np.asarray(got(x_TD, jnp.asarray(index), jnp.asarray(weights), gate_up, down), np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def measure(tokens: int, skew: float, gate_up: TiledMatrix, down: TiledMatrix, most: dict[str, float]) -> dict[str, Any]:
    """One row of the table."""
    index, weights = routing(tokens, skew)
    counts = np.bincount(index.reshape(-1), minlength=EXPERTS)
    hit, chosen = int((counts > 0).sum()), choose_tiling(tokens * ACTIVE, EXPERTS)
    x_TD = jax.random.normal(jax.random.key(tokens), (tokens, WIDTH)).astype(jnp.bfloat16)
    y_RF = jax.random.normal(jax.random.key(tokens), (tokens * ACTIVE, HIDDEN)).astype(jnp.bfloat16)
    parts = {
        "gate_up": (matmul_seconds(x_TD, index, gate_up, chosen, paired=True), gate_up),
        "down": (matmul_seconds(y_RF, index, down, chosen, paired=False), down),
    }
    whole = layer_seconds(x_TD, index, weights, gate_up, down, chosen)
    packed = {name: (held.words.nbytes + held.factors.nbytes) * hit / EXPERTS for name, (_, held) in parts.items()}
    flops = 2 * tokens * ACTIVE * 3 * WIDTH * HIDDEN
    return {
        "tokens": tokens,
        "skew": skew,
        "rank": 0 if gate_up.lora_a is None else gate_up.lora_a.shape[1],
        "experts_hit": hit,
        "most_rows": int(counts.max()),
        **{f"{name}_us": 1e6 * spent for name, (spent, _) in parts.items()},
        **{f"{name}_of_copy": packed[name] / spent / most["copy_bytes_per_s"] for name, (spent, _) in parts.items()},
        "layer_us": 1e6 * whole,
        "layer_bytes_per_s": sum(packed.values()) / whole,
        "layer_of_copy": sum(packed.values()) / whole / most["copy_bytes_per_s"],
        "layer_of_matmul": flops / whole / most["matmul_flops_per_s"],
        "relative_error": relative_error(x_TD, index, weights, gate_up, down, chosen),
    }


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=_numbers, default=[1, 8, 32, 128, 512])
    parser.add_argument("--rank", type=int, default=8, help="of the experts' adapters in a second pass; 0 leaves it out")
    parser.add_argument("--skew", type=_numbers, default=[0.0, 1.0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    most = ceilings()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")}
    result = {"device": jax.devices()[0].device_kind, **versions, "ceilings": most, "rows": []}
    print(", ".join(f"{name} {value}" for name, value in (("device", result["device"]), *versions.items())))
    print(f"copy {most['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix product {most['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s")
    print("tokens skew rank   hit most | gate_up          down             layer            of copy  of matmul  error")
    for rank in sorted({0, arguments.rank}):
        gate_up = matrix(jax.random.key(1), 2 * HIDDEN, WIDTH, rank, paired=True)
        down = matrix(jax.random.key(2), WIDTH, HIDDEN, rank, paired=False)
        for skew in arguments.skew:
            for tokens in arguments.tokens:
                row = measure(int(tokens), skew, gate_up, down, most)
                result["rows"].append(row)
                print(
                    f"{row['tokens']:6d} {skew:4.1f} {rank:4d} {row['experts_hit']:5d} {row['most_rows']:4d} |"
                    f" {row['gate_up_us']:7.1f} us {row['gate_up_of_copy']:4.0%}  {row['down_us']:7.1f} us {row['down_of_copy']:4.0%} "
                    f" {row['layer_us']:7.1f} us {row['layer_bytes_per_s'] / 1e12:5.2f} TB/s {row['layer_of_copy']:4.0%}"
                    f"  {row['layer_of_matmul']:8.1%}  {row['relative_error']:.1e}",
                    flush=True,
                )
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
