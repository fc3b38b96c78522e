"""Runs the kernels of paged attention in Triton's interpreter and prints their errors against float64 as JSON.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_attention.py

Errors are relative to the largest output. Unused places hold NaN. Unused table entries are not valid pages, so reading them fails.
"""

import dataclasses
import json
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import attention_decode
from discover_jax.kernels.attention_decode import PagedTiling, attend_pages

LAYERS, LAYER, NO_PAGE = 2, 1, 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """Token counts of the rows, and shapes. The table has `spare` more pages per row than the longest row needs.

    `no_sinks` is the dtype of sinks of -1e30, with which attention must equal a softmax without sinks. None: random sinks.
    `stacked`: the kernel gets the sinks of all layers.
    """

    counts: tuple[int, ...]
    chosen: PagedTiling
    page: int = 128
    heads: int = 16
    kv_heads: int = 2
    head_size: int = 64
    spare: int = 0
    no_sinks: Any = None
    stacked: bool = False


def error(case: Case) -> float:
    rng = np.random.default_rng(sum(case.counts))

    def exact(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(jnp.bfloat16).astype(np.float32)

    used = [-(-count // case.page) for count in case.counts]
    pages = np.full((len(used), max(used) + case.spare), NO_PAGE, np.int32)
    own = np.split(rng.permutation(sum(used) + 2), np.cumsum(used))
    shape = (LAYERS, sum(used) + 2, case.kv_heads, case.page, case.head_size)
    keys, values = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    q, sinks = 3 * exact(len(used), case.heads, case.head_size), jnp.asarray(exact(case.heads))
    of_sinks = np.exp(np.asarray(sinks, np.float64))
    if case.no_sinks is not None:
        sinks, of_sinks = jnp.full(case.heads, -1e30, case.no_sinks), np.zeros(case.heads)
    expected = np.zeros(q.shape)
    for b, count in enumerate(case.counts):
        pages[b, : used[b]] = own[b]
        k, v = exact(case.kv_heads, count, case.head_size), exact(case.kv_heads, count, case.head_size)
        for j, page in enumerate(own[b]):
            here = slice(j * case.page, min(count, (j + 1) * case.page))
            keys[LAYER, page, :, : here.stop - here.start], values[LAYER, page, :, : here.stop - here.start] = k[:, here], v[:, here]
        for n in range(case.heads if count else 0):  # a row without tokens gets 0
            kv = n // (case.heads // case.kv_heads)
            weights = np.exp(k[kv].astype(np.float64) @ q[b, n] / np.sqrt(case.head_size))
            expected[b, n] = weights @ v[kv] / (weights.sum() + of_sinks[n])
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values)]
    numbers = (jnp.int32(LAYER), jnp.asarray(pages), jnp.array(case.counts, jnp.int32))
    if case.stacked:
        sinks = jnp.stack([sinks + 3.0] * LAYER + [sinks] + [sinks - 3.0] * (LAYERS - LAYER - 1))
    got = attend_pages(*low, *numbers, sinks, chosen=case.chosen)
    return float(np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max())


# With 132 processors, `resident` and `waves` of 1 give 66 slots for two kv heads and 132 for one.
CASES = {
    "rings, sinks of all layers": Case((16, 1), PagedTiling(16, 1, 1), page=16, stacked=True),
    "shares, sinks of all layers": Case((70, 17), PagedTiling(16, 1, 2, resident=1, waves=1, least=1), page=16, stacked=True),
    "rings": Case((128, 1, 77), PagedTiling(128, 1, 1)),
    "a row in many shares": Case((700, 1, 129), PagedTiling(32, 1, 2, resident=1, waves=1, least=2), spare=1),
    "more places than slots": Case((2080, 33, 64), PagedTiling(16, 1, 2, resident=1, waves=1, least=1), page=32, heads=2),
    "fewer shares than rows' blocks": Case((300, 290, 1, 40, 16), PagedTiling(64, 1, 2, resident=1, waves=1, least=4), page=48, heads=6),
    "one row, large heads": Case((200,), PagedTiling(64, 1, 2, resident=1, waves=2, least=1), page=64, heads=4, kv_heads=1, head_size=128),
    "a group of one": Case((90, 17), PagedTiling(16, 1, 2), page=16, heads=2),
    "a group of 7, no sinks": Case((0, 70, 1), PagedTiling(32, 1, 2, least=1), page=32, heads=14, no_sinks=jnp.bfloat16),
    "a group of 6, large heads, no sinks": Case(
        (80, 0, 33), PagedTiling(32, 1, 2, least=1), page=32, heads=6, kv_heads=1, head_size=128, no_sinks=jnp.float32
    ),
    "rings, a group of 5, large heads, no sinks": Case(
        (32, 0, 3), PagedTiling(32, 1, 1), page=32, heads=5, kv_heads=1, head_size=128, no_sinks=jnp.bfloat16
    ),
}

FEW = ("rings", "a row in many shares", "one row, large heads", "a group of 7, no sinks")
"""Cases without --all: the interpreter is slow."""


def main() -> None:
    attention_decode.call_kernel = interpret
    print(json.dumps({name: error(case) for name, case in CASES.items() if name in FEW or "--all" in sys.argv}))


if __name__ == "__main__":
    main()
