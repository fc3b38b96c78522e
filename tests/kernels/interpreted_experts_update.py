"""Runs the experts' kernels of the update in Triton's interpreter, on the CPU, and prints errors against the float32 reference as JSON.

TRITON_INTERPRET=1 python tests/kernels/interpreted_experts_update.py
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import experts_update
from discover_jax.kernels.experts import moe_reference
from discover_jax.kernels.experts_decode import TiledMatrix
from discover_jax.kernels.experts_update import GroupedTiling, Launch, moe_sorted, unpack
from discover_jax.kernels.mxfp4_tiles import SLABS, lay_out
from discover_jax.models.mxfp4 import dequantise

EXPERTS, WIDTH, HIDDEN, ACTIVE, RANK, SCALE = 4, 128, 64, 2, 4, 0.5
LIMIT, ALPHA = 2.0, 1.702
TILING = GroupedTiling(rows=16, wide=Launch(128), paired=Launch(32), narrow=Launch(16))


class Dense:
    """The same matrix for the reference, in float32."""

    def __init__(self, weight: jax.Array, bias: jax.Array, adapter: tuple[jax.Array, jax.Array] | None):
        self.own = {"weight": weight, "bias": bias} | ({"a": adapter[0], "b": adapter[1]} if adapter is not None else {})

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        return self.own

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        y = x_Ti @ one["weight"].T + one["bias"]
        return y + SCALE * (x_Ti @ one["a"].T) @ one["b"].T if "a" in one else y


def _matrix(rng: np.random.Generator, out: int, into: int, *, paired: bool) -> tuple[TiledMatrix, jax.Array]:
    blocks = jnp.asarray(rng.integers(0, 256, (EXPERTS, out, into // 32, 16), dtype=np.uint8))
    scales = jnp.asarray(rng.integers(121, 124, (EXPERTS, out, into // 32), dtype=np.uint8))
    tiles = lay_out(blocks, scales, SLABS["gate_up" if paired else "down"])
    bias = jax.device_put((0.3 * rng.normal(size=(EXPERTS, out))).astype(jnp.bfloat16).astype(np.float32))
    return TiledMatrix(*tiles, bias, scale=SCALE), dequantise(blocks, scales, jnp.float32)


@jax.jit
def expected(leaves: Any, index: jax.Array, biases: Any, weights: Any, d_out: jax.Array) -> tuple[jax.Array, Any]:
    """The reference's output, and its derivatives by the leaves: activations, routing weights, adapters."""

    def reference(x: jax.Array, routing: jax.Array, adapters: Any) -> jax.Array:
        matrices = (Dense(*matrix) for matrix in zip(weights, biases, adapters or (None, None), strict=True))
        options = {"experts": EXPERTS, "adapted": adapters is not None, "limit": LIMIT, "alpha": ALPHA}
        return moe_reference(x, index, routing, *matrices, **options)

    out, pull = jax.vjp(reference, *leaves)
    return out, pull(d_out)


def errors(tokens: int, skew: float, adapted: bool, dtype: Any, elsewhere: int = 0) -> dict[str, float]:
    """Relative errors of the output and of each derivative. A large skew sends all tokens to the same experts. One choice of every
    `elsewhere`-th token is an expert on another device."""
    rng = np.random.default_rng(tokens)

    def exact(*shape: int, scale: float = 0.3) -> jax.Array:
        return jax.device_put((scale * rng.normal(size=shape)).astype(jnp.bfloat16).astype(np.float32))

    (gate_up, w1), (down, w2) = _matrix(rng, 2 * HIDDEN, WIDTH, paired=True), _matrix(rng, WIDTH, HIDDEN, paired=False)
    same = {
        "unpacked gates and ups": unpack(gate_up, paired=True).astype(jnp.float32) - jnp.concatenate([w1[:, 0::2], w1[:, 1::2]], axis=1),
        "unpacked": unpack(down, paired=False).astype(jnp.float32) - w2,
    }
    x, weights = exact(tokens, WIDTH, scale=0.5), jax.device_put(rng.uniform(0.1, 1, size=(tokens, ACTIVE)).astype(np.float32))
    order = np.argsort(rng.normal(size=(tokens, EXPERTS)) + skew * np.arange(EXPERTS), axis=1)
    if elsewhere:
        order[::elsewhere, 0] = EXPERTS
    index = jnp.asarray(order[:, :ACTIVE].astype(np.int32))
    shapes = ((EXPERTS, RANK, WIDTH), (EXPERTS, 2 * HIDDEN, RANK)), ((EXPERTS, RANK, HIDDEN), (EXPERTS, WIDTH, RANK))
    adapters = jax.tree.map(lambda shape: exact(*shape), shapes, is_leaf=lambda node: isinstance(node[0], int)) if adapted else None
    d_out = exact(tokens, WIDTH)

    want, wanted = expected((x, weights, adapters), index, (gate_up.bias, down.bias), (w1, w2), d_out)

    def kernels(x: jax.Array, weights: jax.Array, adapters: Any) -> jax.Array:
        return moe_sorted(x, weights, adapters, index, gate_up, down, LIMIT, ALPHA, TILING)

    got, pull_got = jax.vjp(kernels, x.astype(dtype), weights, adapters)
    names = ("x", "weights", "a of gate_up", "b of gate_up", "a of down", "b of down")
    pairs = zip(names[: 6 if adapted else 2], jax.tree.leaves(pull_got(d_out)), jax.tree.leaves(wanted), strict=True)

    def relative(got: jax.Array, expected: jax.Array) -> float:
        return float(np.linalg.norm(np.asarray(got.astype(jnp.float32) - expected)) / np.linalg.norm(np.asarray(expected)))

    found = {name: float(jnp.abs(difference).max()) for name, difference in same.items()}
    return found | {"output": relative(got, want)} | {name: relative(ours, theirs) for name, ours, theirs in pairs}


CASES = {
    "bfloat16": (21, 0.0, True, jnp.bfloat16),
    "any routing, experts elsewhere": (21, 0.0, True, jnp.float32, 3),
    "two experts have all rows, two none": (21, 100.0, True, jnp.float32),
    "one token, no adapter: two experts have one row": (1, 0.0, False, jnp.float32),
}

FEW = ("bfloat16", "one token, no adapter: two experts have one row")
"""Cases without --all: the interpreter is slow."""


def main() -> None:
    experts_update.call_kernel = interpret
    print(json.dumps({name: errors(*case) for name, case in CASES.items() if name in FEW or "--all" in sys.argv}))


if __name__ == "__main__":
    main()
