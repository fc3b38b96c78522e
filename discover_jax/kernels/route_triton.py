"""Triton kernels that choose the experts of a few tokens.

`route` also sorts the choices by expert, in one launch and one kernel instance. `choose` only chooses, in many instances. In plain JAX this
takes about ten small kernels, which take longer to start than to run. The choice is that of `jax.lax.top_k`: logits in the total order of
their bits, the lower expert first among equal ones. Both add the logits' parts, see `projections_triton`.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.expert_rows_triton import at_index

NONE: tl.constexpr = tl.constexpr(-(2**63))  # below all ranks


@triton.jit
def _ordered(bits):
    """Swaps a float32's bits and an integer of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load(logits_ptr, t, e, tokens, E: tl.constexpr, PARTS: tl.constexpr):
    """The sum of the parts for these tokens and experts, and which of them are real."""
    real = (e < E)[None, :] & (t < tokens)[:, None]
    at = logits_ptr + t[:, None] * E + e[None, :]
    logits = tl.load(at, mask=real, other=0.0)
    for part in tl.static_range(1, PARTS):
        logits += tl.load(at + part * tokens * E, mask=real, other=0.0)
    return logits, real


@triton.jit
def _best(logits, real, e, EXPERTS: tl.constexpr, X: tl.constexpr):
    """The experts of each token and their logits, largest first, and a matrix with 1 where a token chose an expert."""
    # A rank is the logit's order in the upper half, and in the lower half a number that is larger for lower experts: no two are equal.
    ranks = (_ordered(logits.to(tl.int32, bitcast=True)).to(tl.int64) << 32) + (EXPERTS - e)[None, :]
    ranks = tl.where(real, ranks, NONE)
    taken = real.to(tl.int32) * 0
    chosen, values = (), ()
    for _ in tl.static_range(X):
        best = tl.max(ranks, axis=1)
        here = (ranks == best[:, None]) & real
        taken += here.to(tl.int32)
        ranks = tl.where(here, NONE, ranks)
        chosen = chosen + (EXPERTS - (best & 0xFFFFFFFF).to(tl.int32),)  # noqa: RUF005 - Triton has no unpacking
        values = values + (_ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True),)  # noqa: RUF005
    return chosen, values, taken


@triton.jit
def choose(
    logits_ptr,  # float32 [PARTS, T, E]
    tokens,  # T
    index_ptr,  # int32 [T, X]: the experts of each token, the largest logit first
    weights_ptr,  # float32 [T, X]: the softmax of their logits
    E: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least E
    X: tl.constexpr,
    TOKENS: tl.constexpr,  # per kernel instance
    PARTS: tl.constexpr,
):
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    logits, real = _load(logits_ptr, t, e, tokens, E, PARTS)
    chosen, values, _ = _best(logits, real, e, EXPERTS, X)
    total = tl.zeros([TOKENS], tl.float32)
    for x in tl.static_range(X):
        total += tl.exp(values[x] - values[0])
    for x in tl.static_range(X):
        tl.store(index_ptr + t * X + x, chosen[x], mask=t < tokens)
        tl.store(weights_ptr + t * X + x, tl.exp(values[x] - values[0]) / total, mask=t < tokens)


@triton.jit
def route(
    logits_ptr,  # float32 [PARTS, T, E]
    layer_ptr,  # int32 [1]: E times this is added to the experts of blocks
    tokens,  # T
    most,  # number of blocks
    index_ptr,  # int32 [T, X]: the experts of each token, the largest logit first
    weights_ptr,  # float32 [T, X]: the softmax of their logits
    slots_ptr,  # int32 [T X]; this and the next: see expert_rows.Blocks
    blocks_ptr,  # int32 [3, most]
    E: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least E
    X: tl.constexpr,
    TOKENS: tl.constexpr,  # a power of two, at least T
    BLOCK: tl.constexpr,  # rows per block
    STEP: tl.constexpr,  # blocks described at once
    PARTS: tl.constexpr,
):
    t, e = tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    live = t < tokens
    logits, real = _load(logits_ptr, t, e, tokens, E, PARTS)
    chosen, values, taken = _best(logits, real, e, EXPERTS, X)
    total = tl.zeros([TOKENS], tl.float32)
    for x in tl.static_range(X):
        total += tl.exp(values[x] - values[0])
    counts = tl.sum(taken, axis=0)
    firsts = tl.cumsum(counts, axis=0) - counts
    places = firsts[None, :] + tl.cumsum(taken, axis=0) - taken  # the sorted row of each token's choice of each expert
    for x in tl.static_range(X):
        place = tl.sum(tl.where(e[None, :] == chosen[x][:, None], places, 0), axis=1)
        tl.store(slots_ptr + place, t * X + x, mask=live)
        tl.store(index_ptr + t * X + x, chosen[x], mask=live)
        tl.store(weights_ptr + t * X + x, tl.exp(values[x] - values[0]) / total, mask=live)

    needed = (counts + BLOCK - 1) // BLOCK
    ends = tl.cumsum(needed, axis=0)
    layer = tl.load(layer_ptr)
    for begin in range(0, most, STEP):
        own = begin + tl.arange(0, STEP)
        expert = tl.minimum(tl.sum((ends[None, :] <= own[:, None]).to(tl.int32), axis=1), E - 1)
        before = (own - at_index(ends - needed, expert, e)) * BLOCK  # rows of the expert's blocks before this one
        rows = tl.minimum(tl.maximum(at_index(counts, expert, e) - before, 0), BLOCK)
        tl.store(blocks_ptr + own, layer * E + expert, mask=own < most)
        tl.store(blocks_ptr + most + own, at_index(firsts, expert, e) + before, mask=own < most)
        tl.store(blocks_ptr + 2 * most + own, rows, mask=own < most)
