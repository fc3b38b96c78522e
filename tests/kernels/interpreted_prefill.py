"""Runs the kernels of attention over prompts in Triton's interpreter and prints their errors against float64 as JSON.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_prefill.py [--all]

Errors are relative to the largest output. Unused places hold NaN. Unused table entries are not valid pages, so reading them fails or gives
NaN.
"""

import dataclasses
import json
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import attention_prefill
from discover_jax.kernels.attention_prefill import PrefillTiling, attend_pages, attend_window
from discover_jax.kernels.attention_update import Launch

LAYERS, LAYER, NO_PAGE = 2, 1, 2**30
SMALL = Launch(32, 16, 2, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of each row before the new ones, number of new ones, and shapes. `spare`: columns of the table that no row needs.

    A negative `spare` makes the last tokens padding that has no pages; their outputs are not compared. `no_sinks`: sinks of -1e30, with
    which attention must equal a softmax without sinks. With a `window`, the tokens are those from `first` of a chunk of `chunk`.
    """

    lengths: tuple[int, ...]
    tokens: int
    chosen: PrefillTiling = PrefillTiling(SMALL)  # noqa: RUF009 - frozen
    page: int = 32
    heads: int = 6
    kv_heads: int = 2
    head_size: int = 16
    spare: int = 1
    dtype: Any = jnp.float32
    no_sinks: bool = False
    window: int = 0
    first: int = 0
    chunk: int = 0


def softmax(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, of_sinks: np.ndarray) -> np.ndarray:
    """Attention [T, N, H] of q [T, N, H] to the keys k, v [S, K, H] for which seen [T, S] is true."""
    group = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.where(seen[:, None], np.einsum("tnh,snh->tns", q, keys) * q.shape[2] ** -0.5, -np.inf)
    weights = np.exp(scores)
    return np.einsum("tns,snh->tnh", weights, values) / (weights.sum(axis=-1, keepdims=True) + of_sinks[:, None])


def error(case: Case) -> float:
    rng = np.random.default_rng(sum(case.lengths))

    def exact(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(case.dtype).astype(np.float32)

    q = 2 * exact(len(case.lengths), case.tokens, case.heads, case.head_size)
    sinks = np.full(case.heads, -1e30, np.float32) if case.no_sinks else exact(case.heads)
    got, places, keys, values = (over_ring if case.window else over_pages)(case, q, sinks, exact)
    differences, largest = [], 0.0
    for b, length in enumerate(case.lengths):
        place = length + case.first + np.arange(case.tokens)
        seen = (places[b] <= place[:, None]) & (places[b] > place[:, None] - (case.window or np.inf))
        real = place < case.page * columns(case) if not case.window else place >= 0
        expected = softmax(q[b].astype(np.float64), keys[b].astype(np.float64), values[b].astype(np.float64), seen, np.exp(sinks))
        largest = max(largest, np.abs(expected[real]).max())
        differences.append(np.abs(np.asarray(got[b], np.float64) - expected)[real].max())
    return float(np.max(differences) / largest)  # NaN if any is


def columns(case: Case) -> int:
    return -(-(max(case.lengths) + case.tokens) // case.page) + case.spare


Kept = tuple[Any, list[np.ndarray], list[np.ndarray], list[np.ndarray]]
"""The kernel's output; and of each row the positions, keys and values of its tokens."""


def over_pages(case: Case, q: np.ndarray, sinks: np.ndarray, exact: Any) -> Kept:
    used = [min(-(-(length + case.tokens) // case.page), columns(case)) for length in case.lengths]
    rng = np.random.default_rng(1)
    table = np.full((len(used), columns(case)), NO_PAGE, np.int32)
    shape = (LAYERS, sum(used) + 2, case.kv_heads, case.page, case.head_size)
    pools = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    kept: list[list[np.ndarray]] = [[], []]
    own = np.split(rng.permutation(sum(used) + 2), np.cumsum(used))
    for b, length in enumerate(case.lengths):
        table[b, : used[b]] = own[b]
        for pool, rows in zip(pools, kept, strict=True):
            row = exact(length + case.tokens, case.kv_heads, case.head_size)
            rows.append(row)
            for j, page in enumerate(own[b]):
                here = row[j * case.page : (j + 1) * case.page]
                pool[LAYER, page, :, : len(here)] = here.transpose(1, 0, 2)
    low = [jnp.asarray(x, case.dtype) for x in (q, *pools)]
    numbers = (jnp.int32(LAYER), jnp.asarray(table), jnp.array(case.lengths, jnp.int32))
    got = attend_pages(*low, *numbers, jnp.asarray(sinks, case.dtype), chosen=case.chosen)
    return got, [np.arange(len(row)) for row in kept[0]], *kept


def over_ring(case: Case, q: np.ndarray, sinks: np.ndarray, exact: Any) -> Kept:
    shape = (len(case.lengths), case.kv_heads, case.window, case.head_size)
    rings = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    kept: list[list[np.ndarray]] = [[], []]
    for b, length in enumerate(case.lengths):
        for ring, rows in zip(rings, kept, strict=True):
            row = exact(length + case.chunk, case.kv_heads, case.head_size)
            rows.append(row)
            for place in range(max(0, length - case.window), length):
                ring[b, :, place % case.window] = row[place]
    chunks = [np.stack([row[length:] for row, length in zip(rows, case.lengths, strict=True)]) for rows in kept]
    low = [jnp.asarray(x, case.dtype) for x in (q, *rings, *chunks)]
    numbers = (jnp.array(case.lengths, jnp.int32), jnp.int32(case.first))
    got = attend_window(*low, *numbers, jnp.asarray(sinks, case.dtype), launch=case.chosen.launch)
    return got, [np.arange(len(row)) for row in kept[0]], *kept


FEW = {
    "rows of any lengths": Case((0, 37, 70), 13),
    "one-token rows in shares": Case((15, 0, 16, 64), 1, PrefillTiling(SMALL, 3), heads=7, kv_heads=1),
    "padding without pages, bfloat16, no sinks": Case((50, 3), 20, spare=-1, heads=10, no_sinks=True, dtype=jnp.bfloat16),
    "ring": Case((0, 5, 24, 61), 11, window=24, chunk=40),
    "ring, inner tokens of a chunk, bfloat16": Case((30, 7), 9, window=16, chunk=30, first=13, heads=7, kv_heads=1, dtype=jnp.bfloat16),
}
"""Cases without --all: the interpreter is slow."""
LARGE = PrefillTiling(Launch(128, 64, 2, 4))
CASES = FEW | {
    "tiles across tokens": Case((33,), 40, heads=10),
    "tiles of several pages' edges in shares": Case((100, 31, 0), 40, PrefillTiling(Launch(64, 32, 2, 4), 4), page=32, spare=3),
    "keys that do not divide the page": Case((20, 47), 9, PrefillTiling(LARGE.launch, 2), page=48, heads=4, kv_heads=4),
    "more shares than tiles": Case((3, 90), 2, PrefillTiling(SMALL, 16), heads=16),
    "shares, bfloat16, large heads, no sinks": Case(
        (200, 64), 33, PrefillTiling(Launch(64, 64, 2, 4), 2), 64, 5, 1, 128, dtype=jnp.bfloat16, no_sinks=True
    ),
    "heads of 64, bfloat16": Case((300, 129), 20, LARGE, 128, 16, 2, 64, dtype=jnp.bfloat16),
    "ring, shorter chunk": Case((100, 9, 0), 6, window=32, chunk=6, heads=3, kv_heads=3),
    "ring of one place": Case((2, 0), 20, window=1, chunk=20),
    "ring, one token": Case((31, 32, 33), 1, window=32, chunk=1, no_sinks=True),
    "ring, window across edges of tiles": Case((47,), 50, PrefillTiling(Launch(16, 32, 2, 4)), window=33, chunk=50, heads=5, kv_heads=1),
    "ring, heads of 64, bfloat16": Case((130, 3), 70, LARGE, window=128, chunk=80, first=10, heads=16, head_size=64, dtype=jnp.bfloat16),
}


def main() -> None:
    attention_prefill.call_kernel = interpret
    print(json.dumps({name: error(case) for name, case in (CASES if "--all" in sys.argv else FEW).items()}))


if __name__ == "__main__":
    main()
