"""Runs the decoding kernels in Triton's interpreter, on the CPU, and prints the relative errors against float64 as JSON.

TRITON_INTERPRET=1 python tests/kernels/interpreted_experts.py
"""

import json

import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import experts_decode
from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts_decode import ExpertsTiling, Launch, TiledMatrix, moe_routed
from discover_jax.kernels.mxfp4_tiles import SLABS, lay_out
from discover_jax.models.mxfp4 import dequantise

EXPERTS, WIDTH, HIDDEN, ACTIVE, RANK, SCALE = 4, 128, 64, 2, 8, 0.5
LIMIT, ALPHA = 7.0, 1.702


def _matrix(rng: np.random.Generator, out: int, into: int, *, paired: bool, adapted: bool) -> tuple[TiledMatrix, np.ndarray, np.ndarray]:
    """Tiles, and the same matrix in float64 with the adapter merged, and its bias. All values are exact in bfloat16."""

    def exact(*shape: int) -> np.ndarray:
        return (0.3 * rng.normal(size=shape)).astype(jnp.bfloat16).astype(np.float32)

    blocks = jnp.asarray(rng.integers(0, 256, (EXPERTS, out, into // 32, 16), dtype=np.uint8))
    scales = jnp.asarray(rng.integers(120, 126, (EXPERTS, out, into // 32), dtype=np.uint8))
    tiles = lay_out(blocks, scales, SLABS["gate_up" if paired else "down"])
    bias, dense = exact(EXPERTS, out), np.array(dequantise(blocks, scales, jnp.float32), np.float64)
    if not adapted:
        return TiledMatrix(*tiles, jnp.asarray(bias)), dense, bias
    a, b = exact(EXPERTS, RANK, into), exact(EXPERTS, out, RANK)
    return TiledMatrix(*tiles, *(jnp.asarray(x) for x in (bias, a, b)), SCALE), dense + SCALE * b.astype(np.float64) @ a, bias


def error(tokens: int, skew: float, adapted: bool, tiling: ExpertsTiling | None, elsewhere: int = 0) -> float:
    """The error of one case. A large skew sends all tokens to the same experts."""
    rng = np.random.default_rng(tokens)
    gate_up, w1, b1 = _matrix(rng, 2 * HIDDEN, WIDTH, paired=True, adapted=adapted)
    down, w2, b2 = _matrix(rng, WIDTH, HIDDEN, paired=False, adapted=adapted)
    x = rng.normal(size=(tokens, WIDTH)).astype(jnp.bfloat16).astype(np.float32)
    order = np.argsort(rng.normal(size=(tokens, EXPERTS + elsewhere)) + skew * np.arange(EXPERTS + elsewhere), axis=1)
    index = np.minimum(order[:, :ACTIVE], EXPERTS).astype(np.int32)
    weights = rng.uniform(0.1, 1, size=(tokens, ACTIVE)).astype(np.float32)
    options = {"limit": LIMIT, "alpha": ALPHA, "chosen": tiling, "elsewhere": elsewhere}
    got = moe_routed(jnp.asarray(x), jnp.asarray(index), jnp.asarray(weights), gate_up, down, **options)
    expected = np.zeros((tokens, WIDTH))
    for t, j in np.ndindex(tokens, ACTIVE):
        e = index[t, j]
        if e == EXPERTS:
            continue
        h = w1[e] @ x[t] + b1[e]
        gate, up = np.minimum(h[0::2], LIMIT), np.clip(h[1::2], -LIMIT, LIMIT)
        expected[t] += weights[t, j] * (w2[e] @ ((up + 1) * gate / (1 + np.exp(-ALPHA * gate))) + b2[e])
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


CASES = {
    "one token": (1, 0.0, False, None),
    "several blocks of an expert": (21, 100.0, True, None),
    "any routing, parts": (9, 0.0, True, ExpertsTiling(8, Launch(1, 2, 2, 2), Launch(2, 1, 2, 2))),
    "most experts elsewhere": (9, 0.0, True, None, 8),
    "wide blocks, along the columns": (9, 0.0, True, ExpertsTiling(16, Launch(1, 1, 2, 2, depth=2), Launch(1, 1, 2, 2))),
}


def main() -> None:
    experts_decode.call_kernel = interpret
    experts_decode.sort_rows_of_layer = lambda index, experts, block, _: sort_rows(index, experts, block)  # tested separately
    print(json.dumps({name: error(*case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
