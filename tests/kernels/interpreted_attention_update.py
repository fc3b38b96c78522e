"""Runs the update's attention in Triton's interpreter and prints errors of outputs and gradients against float64 formulas as JSON.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_attention_update.py

Errors are relative to the norm of the expected values, without padding. Most cases share their shapes, so that jax compiles little.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import attention_update
from discover_jax.kernels.attention_update import AttentionTiling, Launch, attend

TILING = AttentionTiling(Launch(32, 16, 2, 4), Launch(32, 16, 2, 4), Launch(16, 32, 2, 4))
LARGE = AttentionTiling(*(Launch(32, 32, 2, 4),) * 3)
TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths of the segments of two rows; the rest is padding. `no_sinks`: sinks of -1e30, which must equal a softmax without sinks."""

    rows: tuple[tuple[int, ...], tuple[int, ...]]
    window: int | None = None
    heads: int = 2
    kv_heads: int = 1
    tokens: int = TOKENS
    tiling: AttentionTiling = TILING
    dtype: Any = jnp.float32
    head_size: int = 16
    no_sinks: bool = False


def expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, of_sinks: np.ndarray, d_out: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Output and gradients by the explicit softmax: dS = P (dP - sum(P dP)). The sink is a column without a value.

    `of_sinks` are the sinks' exponentials, 0 for a softmax without sinks. Rows that see no key get 0.
    """
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    keys, values = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.where(seen[:, None], np.einsum("btnh,bsnh->bnts", q, keys) * scale, -np.inf)
    exponentials = np.exp(scores)
    p = exponentials / np.maximum(exponentials.sum(axis=-1, keepdims=True) + of_sinks[:, None, None], 1e-300)
    d_p = np.einsum("btnh,bsnh->bnts", d_out, values)
    d_scores = p * (d_p - (p * d_p).sum(axis=-1, keepdims=True)) * scale

    def of_groups(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3)

    d_keys, d_values = np.einsum("bnts,btnh->bsnh", d_scores, q), np.einsum("bnts,btnh->bsnh", p, d_out)
    return np.einsum("bnts,bsnh->btnh", p, values), np.einsum("bnts,bsnh->btnh", d_scores, keys), of_groups(d_keys), of_groups(d_values)


def errors(case: Case) -> dict[str, float]:
    rng = np.random.default_rng(0)
    segments = np.zeros((2, case.tokens), np.int32)
    for row, lengths in enumerate(case.rows):
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    distance = np.arange(case.tokens)[:, None] - np.arange(case.tokens)
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0) & (distance >= 0) & (distance < (case.window or np.inf))
    real = (segments > 0)[..., None, None]

    def draw(heads: int, scale: float = 1.0) -> jax.Array:
        return jax.device_put((scale * rng.normal(size=(2, case.tokens, heads, case.head_size)) * real).astype(case.dtype))

    q, k, v, d_out = draw(case.heads, 2.0), draw(case.kv_heads), draw(case.kv_heads), draw(case.heads)
    sinks = jnp.full(case.heads, -1e30, case.dtype) if case.no_sinks else jax.device_put(rng.normal(size=case.heads).astype(case.dtype))
    out, pull = jax.vjp(lambda *x: attend(*x, jnp.asarray(segments), sinks, window=case.window, tiling=case.tiling), q, k, v)
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, sinks, d_out)]
    of_sinks = np.zeros(case.heads) if case.no_sinks else np.exp(exact[3])
    wanted = expected(*exact[:3], seen, of_sinks, exact[4])

    def relative(got: jax.Array, want: np.ndarray) -> float:
        return float(np.linalg.norm((np.asarray(got.astype(jnp.float32)) - want) * real) / np.linalg.norm(want * real))

    return {name: relative(*pair) for name, *pair in zip(("output", "q", "k", "v"), (out, *pull(d_out)), wanted, strict=True)}


CASES = {
    "bfloat16": Case(((1, 1, 17, 30), (40,)), dtype=jnp.bfloat16),
    "whole blocks": Case(((64,), (32, 32))),
    "unaligned segments, padding": Case(((1, 1, 17, 30), (40,))),
    "short segments": Case(((5,) * 12, (23, 9))),
    "a row of padding": Case(((1,), ())),
    "several key heads, rows that do not fill their blocks": Case(((30, 10), (41,)), heads=4, kv_heads=2, tokens=41),
    "keys and queries of equal blocks": Case(((40, 24), (64,)), tiling=LARGE),
    "a window": Case(((50, 10), (64,)), window=20),
    "a window of a whole block": Case(((64,), (3, 60)), window=32),
    "a window longer than segments": Case(((30, 20), (64,)), window=50),
    "bfloat16, a group of 6, large heads, no sinks": Case(
        ((20, 17), ()), heads=6, tokens=37, tiling=LARGE, dtype=jnp.bfloat16, head_size=128, no_sinks=True
    ),
    "a group of 7, no sinks": Case(((37,), (3, 20)), heads=7, tokens=37, tiling=LARGE, head_size=64, no_sinks=True),
    "a window, a group of 5, large heads, no sinks": Case(
        ((30, 7), ()), window=20, heads=5, tokens=37, tiling=LARGE, head_size=128, no_sinks=True
    ),
}

FEW = (
    "bfloat16",
    "unaligned segments, padding",
    "a row of padding",
    "several key heads, rows that do not fill their blocks",
    "a window",
    "bfloat16, a group of 6, large heads, no sinks",
    "a group of 7, no sinks",
)
"""Cases without --all: the interpreter is slow."""


def main() -> None:
    attention_update.call_kernel = interpret
    print(json.dumps({name: errors(case) for name, case in CASES.items() if name in FEW or "--all" in sys.argv}))


if __name__ == "__main__":
    main()
