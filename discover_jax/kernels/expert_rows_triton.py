"""A Triton kernel that sorts routed rows by expert: `expert_rows.sort_rows` of few tokens in one launch, by one program.

In plain JAX that is some ten small kernels, which take longer to start than to run.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def sort(
    index_ptr,  # int32 [T, X]: the experts of each token, all different
    layer_ptr,  # int32 [1]: times E is added to the experts of blocks
    tokens,  # T
    most,  # blocks
    slots_ptr,  # int32 [T X]
    blocks_ptr,  # int32 [3, most]
    E: tl.constexpr,
    X: tl.constexpr,
    TOKENS: tl.constexpr,  # powers of two, at least T, E and most
    EXPERTS: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a block
):
    t, e, b = tl.arange(0, TOKENS), tl.arange(0, EXPERTS), tl.arange(0, MOST)
    chosen = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for x in tl.static_range(X):
        index = tl.load(index_ptr + t * X + x, mask=t < tokens, other=EXPERTS)
        chosen += (index[:, None] == e[None, :]).to(tl.int32)
    counts = tl.sum(chosen, axis=0)
    firsts = tl.cumsum(counts, axis=0) - counts
    needed = (counts + BLOCK - 1) // BLOCK
    begins = tl.cumsum(needed, axis=0) - needed
    places = tl.cumsum(chosen, axis=0) - chosen + firsts[None, :]
    for x in tl.static_range(X):
        index = tl.load(index_ptr + t * X + x, mask=t < tokens, other=EXPERTS)
        place = tl.sum(tl.where(index[:, None] == e[None, :], places, 0), axis=1)
        tl.store(slots_ptr + place, t * X + x, mask=t < tokens)
    offset = tl.load(layer_ptr) * E
    for j in range((tokens + BLOCK - 1) // BLOCK):  # an expert has a row of each token at most
        at, begun = blocks_ptr + begins + j, j < needed
        tl.store(at, offset + e, mask=begun)
        tl.store(at + most, firsts + j * BLOCK, mask=begun)
        tl.store(at + 2 * most, tl.minimum(counts - j * BLOCK, BLOCK), mask=begun)
    rest = (b >= tl.sum(needed, axis=0)) & (b < most)
    tl.store(blocks_ptr + b, tl.zeros([MOST], tl.int32) + offset, mask=rest)
    tl.store(blocks_ptr + most + b, tl.zeros([MOST], tl.int32), mask=rest)
    tl.store(blocks_ptr + 2 * most + b, tl.zeros([MOST], tl.int32), mask=rest)
