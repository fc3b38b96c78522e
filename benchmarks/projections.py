"""Projections of decoding at gpt-oss-120b's shape, a layer after another out of their stacks, beside a large copy and XLA's own products.

    python benchmarks/projections.py [--rows=1,32,128] [--rank=32] [--plans] [--json=FILE]

Queries, keys and values (2880 to 4096 + 512 + 512) and the output (4096 to 2880) of 18 layers in one scan, 36 products of weights that no
cache holds. Rates count the bytes of the weights. `--plans` also tries other ways to cut the kernel. Needs a GPU and the extra `kernels`.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels.projections import Stack, project_reference
from discover_jax.kernels.projections_decode import Launch, choose_launch, project

LAYERS = 18
SHAPES = {"qkv": (2880, (4096, 512, 512)), "o": (4096, (2880,))}


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Of one call: the best of five, after one that compiles."""
    result = jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(3):
            result = function(*arguments)  # the one before is let go, so that its memory serves again
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - started) / 3)
    return best


def stacks(width: int, outs: tuple[int, ...], rank: int) -> list[Stack]:
    def draw(key: int, *shape: int) -> jax.Array:
        return jax.jit(lambda: shape[-1] ** -0.5 * jax.random.normal(jax.random.key(key), shape, jnp.bfloat16))()

    return [
        Stack(
            draw(i, LAYERS, out, width),
            draw(10 + i, LAYERS, out),
            *((draw(20 + i, LAYERS, rank, width), draw(30 + i, LAYERS, out, rank)) if rank else ()),
        )
        for i, out in enumerate(outs)
    ]


def layer_seconds(multiply: Callable[..., list[jax.Array]], x: jax.Array, held: list[Stack]) -> float:
    @jax.jit
    def layers(x: jax.Array, held: list[Stack]) -> jax.Array:
        def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            ys = multiply(x, held, i, 0.5)
            return x + (1e-3 * sum(y.sum(axis=1, keepdims=True) for y in ys)).astype(x.dtype), None

        return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0]

    return seconds(layers, x, held) / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32, 128])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    words = jax.jit(lambda: jnp.arange(1 << 30, dtype=jnp.uint32))()
    copy = 2 * words.nbytes / seconds(jnp.copy, words)
    del words
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "copy_bytes_per_s": copy, "rows": []}
    print(f"{found['device']}, copy {copy / 1e12:.2f} TB/s")
    for (name, (width, outs)), rows in itertools.product(SHAPES.items(), arguments.rows):
        held = stacks(width, outs, arguments.rank)
        x = jax.random.normal(jax.random.key(0), (rows, width), jnp.bfloat16)
        size = 2 * width * sum(outs)
        right = project_reference(x, held, jnp.int32(1), 0.5)
        error = max(
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(project(x, held, jnp.int32(1), 0.5), right, strict=True)
        )
        tried: dict[str, Callable[..., list[jax.Array]]] = {"XLA": project_reference, f"plan {choose_launch(rows, sum(outs))}": project}
        if arguments.plans:
            for outputs, parts, stages, warps in itertools.product((64, 128), (1, 2, 3, 4), (3, 5), (4, 8)):
                launch = Launch(outputs, parts, stages, warps)
                if (outputs, warps) != (64, 8) and (rows > 16 or outputs == 64):
                    tried[str(launch)] = lambda *a, launch=launch: project(*a, chosen=launch)
        for label, multiply in tried.items():
            spent = layer_seconds(multiply, x, held)
            row = {"what": name, "rows": rows, "how": label, "us": 1e6 * spent, "of_copy": size / spent / copy, "error": error}
            found["rows"].append(row)
            print(f"{name:4s} {rows:4d} {row['us']:7.1f} us {row['of_copy']:5.0%}  {error:.1e} {label}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
