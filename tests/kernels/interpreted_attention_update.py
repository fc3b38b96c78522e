"""Runs the update's attention in Triton's interpreter and prints errors of outputs and gradients against the float32 reference as JSON.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_attention_update.py

Errors are relative to the norm of what is expected; padding is left out.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import attention_update
from discover_jax.kernels.attention_update import Launch, Plan, attend
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference

PLAN = Plan(Launch(32, 16, 2, 4), Launch(32, 16, 2, 4), Launch(16, 32, 2, 4))


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths of the segments of each row, the rest being padding."""

    rows: tuple[tuple[int, ...], ...]
    tokens: int
    window: int | None = None
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    plan: Plan = PLAN
    dtype: Any = jnp.float32


def errors(case: Case) -> dict[str, float]:
    rng = np.random.default_rng(case.tokens)
    batch, shape = len(case.rows), (case.tokens, case.head_size)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(batch, shape[0], n, shape[1])), case.dtype) for n in heads)
    segments = np.zeros((batch, case.tokens), np.int32)
    for row, lengths in enumerate(case.rows):
        for number, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True), 1):
            segments[row, end - length : end] = number
    real = (segments > 0)[..., None, None]
    d_out = d_out * real
    sinks = jnp.asarray(rng.normal(size=case.heads), case.dtype)
    options = {} if case.window is None else {"window": case.window}
    reference = packed_attention_reference if case.window is None else windowed_attention_reference

    def expected(*arrays: jax.Array) -> jax.Array:
        return reference(*arrays, jnp.asarray(segments), sinks, **options)

    def kernels(*arrays: jax.Array) -> jax.Array:
        return attend(*arrays, jnp.asarray(segments), sinks, window=case.window, plan=case.plan)

    exact, pull_exact = jax.vjp(expected, *(x.astype(jnp.float32) for x in (2 * q, k, v)))
    got, pull = jax.vjp(kernels, 2 * q, k, v)
    pairs = zip(("output", "q", "k", "v"), (got, *pull(d_out)), (exact, *pull_exact(d_out.astype(jnp.float32))), strict=True)

    def relative(got: jax.Array, expected: jax.Array) -> float:
        got, expected = (np.asarray(x.astype(jnp.float32)) * real for x in (got, expected))
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))

    return {name: relative(*pair) for name, *pair in pairs}


CASES = {
    "bfloat16": Case(((1, 1, 17, 30), (40,)), 61, dtype=jnp.bfloat16),
    "one segment, whole blocks": Case(((64,),), 64),
    "segments that begin anywhere, padding": Case(((1, 1, 17, 30), (40,)), 61),
    "as many key heads": Case(((23, 9), (5,) * 8), 40, heads=2),
    "one key head, one token": Case(((1,), (0,)), 1, kv_heads=1),
    "keys and queries of equal blocks": Case(((40, 24),), 64, heads=2, kv_heads=1, plan=Plan(*(Launch(32, 32, 2, 4),) * 3)),
    "a window": Case(((70, 20),), 96, window=20, heads=2, kv_heads=1),
    "a window of a whole block": Case(((75,),), 75, window=32, heads=2, kv_heads=1),
    "a window longer than segments": Case(((30, 20),), 64, window=50, heads=2, kv_heads=1),
}


def main() -> None:
    attention_update.call_kernel = interpret
    print(json.dumps({name: errors(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
