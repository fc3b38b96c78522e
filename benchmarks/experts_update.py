"""The update's kernels of experts beside the GPU's own matrix product, in the same run: forward, and forward with backward.

    python benchmarks/experts_update.py [--shape=gpt-oss-120b] [--tokens=16384,65536] [--skew=0] [--plans=128x256,64x256,128x128]
        [--json=FILE]

One layer of the shape with random weights and rank-8 adapters. The operations counted are those of the routed rows' products with the base
matrices: 2 x 3 x width x expert width a row forward, and as many again backward, where base weights have no gradients. `--skew` makes
routing uneven: 0 is uniform. `--plans` are rows of a block x outputs of a wide product; the paired one takes a quarter as many of both
halves. Errors are relative, against the plain-JAX reference in float32, with routing so uneven that some experts get no rows.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from kernels import ceilings, seconds

from discover_jax.kernels.experts import moe_reference
from discover_jax.kernels.experts_decode import TiledMatrix
from discover_jax.kernels.experts_update import GroupedTiling, Launch, moe_sorted, unpack
from discover_jax.kernels.mxfp4_tiles import SLABS, lay_out, restore
from discover_jax.models.mxfp4 import dequantise
from discover_jax.models.synthetic import shape_of

RANK, LIMIT, ALPHA = 8, 7.0, 1.702


def matrix(key: jax.Array, experts: int, out: int, into: int, name: str) -> TiledMatrix:
    """Random tiles whose products have about the size of their rows."""
    keys = jax.random.split(key, 2)
    blocks = jax.random.bits(keys[0], (experts, out, into // 32, 16), jnp.uint8)
    scales = jnp.full((experts, out, into // 32), 120, jnp.uint8)
    words, factors = lay_out(blocks, scales, SLABS[name])
    return TiledMatrix(words, factors, jax.random.normal(keys[1], (experts, out), jnp.bfloat16), scale=1.0)


class Plain:
    """A matrix for the plain-JAX reference."""

    def __init__(self, weight: jax.Array, bias: jax.Array, adapter: tuple[jax.Array, jax.Array]):
        self.own = {"weight": weight, "bias": bias, "a": adapter[0], "b": adapter[1]}

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        return self.own

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        return x_Ti @ one["weight"].T + one["bias"] + (x_Ti @ one["a"].T) @ one["b"].T


def errors(gate_up: TiledMatrix, down: TiledMatrix, leaves: tuple[Any, Any, Any], index: jax.Array, d_out: jax.Array) -> dict[str, float]:
    """Of the output and of each derivative against the reference in float32, relative to the norm."""

    def reference(x: Any, weights: Any, adapters: Any, index: Any, *matrices: tuple[jax.Array, jax.Array]) -> jax.Array:
        plain = (Plain(*matrix, adapter) for matrix, adapter in zip(matrices, adapters, strict=True))
        options = {"experts": gate_up.words.shape[0], "adapted": True, "limit": LIMIT, "alpha": ALPHA}
        return moe_reference(x, index, weights, *plain, **options)

    def kernels(x: Any, weights: Any, adapters: Any, index: Any, *matrices: TiledMatrix) -> jax.Array:
        return moe_sorted(x, weights, adapters, index, *matrices, LIMIT, ALPHA, GroupedTiling())

    def both(function: Callable[..., jax.Array], *matrices: Any) -> list[jax.Array]:
        def passes(leaves: Any, d_out: Any, *rest: Any) -> Any:
            out, pull = jax.vjp(lambda *own: function(*own, *rest), *leaves)
            return out, pull(d_out)

        return jax.tree.leaves(jax.jit(passes)(leaves, d_out, index, *matrices))

    def plainly(tiles: TiledMatrix, *, paired: bool) -> tuple[jax.Array, jax.Array]:
        return dequantise(*restore(tiles.words, tiles.factors, paired=paired), jnp.float32), tiles.bias.astype(jnp.float32)

    with jax.default_matmul_precision("highest"):
        expected = both(reference, plainly(gate_up, paired=True), plainly(down, paired=False))
    names = ("output", "x", "weights", "a of gate_up", "b of gate_up", "a of down", "b of down")
    pairs = zip(names, both(kernels, gate_up, down), expected, strict=True)
    return {name: float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())) for name, got, want in pairs}


def tiling_of(text: str) -> GroupedTiling:
    rows, outputs = map(int, text.split("x"))
    return GroupedTiling(rows, wide=Launch(outputs), paired=Launch(outputs // 4))


def measured(call: Callable[[], Any], operations: float, ceiling: float) -> dict[str, float]:
    spent = seconds(call)
    return {"ms": 1e3 * spent, "tflop_per_s": operations / spent / 1e12, "of_matmul": operations / spent / ceiling}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-120b")
    parser.add_argument("--tokens", default="16384,65536")
    parser.add_argument("--skew", type=float, default=0.0, help="standard deviation of the experts' own logits beside the tokens' of 1")
    parser.add_argument("--plans", default="128x256,64x256,128x128")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes, ceiling = shape_of(arguments.shape), ceilings()
    experts, share, width, hidden = sizes.num_experts, sizes.experts_per_token, sizes.width, sizes.expert_width
    keys = jax.random.split(jax.random.key(0), 8)
    gate_up, down = matrix(keys[0], experts, 2 * hidden, width, "gate_up"), matrix(keys[1], experts, width, hidden, "down")
    shapes = ((experts, RANK, width), (experts, 2 * hidden, RANK)), ((experts, RANK, hidden), (experts, width, RANK))
    adapters = jax.tree.map(lambda s: 0.02 * jax.random.normal(keys[2], s), shapes, is_leaf=lambda node: isinstance(node[0], int))
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(arguments), **ceiling, "rows": []}
    result["json"] = str(arguments.json)
    both = jax.jit(lambda up, low: (unpack(up, paired=True), unpack(low, paired=False)))
    moved = (17 / 32 + 2) * experts * 3 * hidden * width  # of each weight half a byte and a part of a scale are read, two bytes written
    spent = seconds(lambda: both(gate_up, down))
    result["unpack"] = {"ms": 1e3 * spent, "of_copy": moved / spent / ceiling["copy_bytes_per_s"]}
    print(f"matmul {ceiling['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s; unpacking a layer {1e3 * spent:.2f} ms, {result['unpack']}")

    def routing(tokens: int, skew: float) -> tuple[jax.Array, jax.Array]:
        logits = jax.random.normal(keys[5], (tokens, experts)) + skew * jax.random.normal(keys[6], (experts,))
        top, index = jax.lax.top_k(logits, share)
        return index, jax.nn.softmax(top)

    x, d_out = (jax.random.normal(key, (300, width), jnp.bfloat16).astype(jnp.float32) for key in keys[3:5])
    index, weights = routing(300, 3.0)  # some experts get no rows
    result["errors"] = errors(gate_up, down, (x, weights, adapters), index, d_out)
    print(f"errors against float32: {result['errors']}")
    for tokens in map(int, arguments.tokens.split(",")):
        x, d_out = (jax.random.normal(key, (tokens, width), jnp.float32) for key in keys[3:5])
        index, weights = routing(tokens, arguments.skew)
        operations = 2.0 * tokens * share * 3 * hidden * width
        for text in arguments.plans.split(","):
            tiling = tiling_of(text)

            def moe(x: Any, weights: Any, adapters: Any, index: Any, gate_up: Any, down: Any, tiling: GroupedTiling = tiling) -> jax.Array:
                return moe_sorted(x, weights, adapters, index, gate_up, down, LIMIT, ALPHA, tiling)

            def gradients(d_out: Any, *leaves: Any, moe: Any = moe) -> Any:
                return jax.vjp(lambda *own: moe(*own, *leaves[3:]), *leaves[:3])[1](d_out)

            leaves = (x, weights, adapters, index, gate_up, down)
            forward, backward = jax.jit(moe), jax.jit(gradients)
            row = {"tokens": tokens, "plan": text}
            row["forward"] = measured(lambda f=forward, a=leaves: f(*a), operations, ceiling["matmul_flops_per_s"])
            row["both"] = measured(lambda f=backward, a=leaves, d=d_out: f(d, *a), 2 * operations, ceiling["matmul_flops_per_s"])
            result["rows"].append(row)
            told = "  ".join(f"{name} {row[name]['ms']:7.2f} ms {row[name]['tflop_per_s']:4.0f} TFLOP/s" for name in ("forward", "both"))
            print(f"{tokens:6d} tokens {text:9s} {told}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
