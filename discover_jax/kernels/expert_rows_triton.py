"""A Triton kernel that sorts routed rows by expert: `expert_rows.sort_rows` for few tokens in one launch.

Plain JAX needs about ten small kernels for this, which take longer to start than to run. Each kernel instance counts the rows of every
expert itself, which is cheaper than a second launch. It then places some rows and describes some blocks.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def at_index(values, index, e):
    """values[index], where e holds the index of each value."""
    return tl.sum(tl.where(index[:, None] == e[None, :], values[None, :], 0), axis=1)


@triton.jit
def sort(
    index_ptr,  # int32 [R]: the experts of each token, all different, token by token; rows with the number E get no slot
    layer_ptr,  # int32 [1]: E times this is added to the experts of blocks
    routed,  # R
    most,  # number of blocks; at most R
    slots_ptr,  # int32 [R]
    blocks_ptr,  # int32 [3, most]
    E: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least E
    BLOCK: tl.constexpr,  # rows per block
    OWN: tl.constexpr,  # rows, and blocks, per kernel instance
    STEP: tl.constexpr,  # rows compared at once
):
    e, s, own = tl.arange(0, EXPERTS), tl.arange(0, STEP), tl.program_id(0) * OWN + tl.arange(0, OWN)
    mine = tl.load(index_ptr + own, mask=own < routed, other=0)
    hits = tl.zeros([STEP, EXPERTS], tl.int32)
    earlier = tl.zeros([OWN, STEP], tl.int32)
    for begin in range(0, routed, STEP):
        row = begin + s
        index = tl.load(index_ptr + row, mask=row < routed, other=EXPERTS)
        hits += ((index[:, None] == e[None, :]) & (e < E)[None, :]).to(tl.int32)
        earlier += ((index[None, :] == mine[:, None]) & (row[None, :] < own[:, None])).to(tl.int32)
    counts = tl.sum(hits, axis=0)
    firsts = tl.cumsum(counts, axis=0) - counts
    tl.store(slots_ptr + at_index(firsts, mine, e) + tl.sum(earlier, axis=1), own, mask=(own < routed) & (mine < E))

    needed = (counts + BLOCK - 1) // BLOCK
    ends = tl.cumsum(needed, axis=0)
    expert = tl.minimum(tl.sum((ends[None, :] <= own[:, None]).to(tl.int32), axis=1), E - 1)
    before = (own - at_index(ends - needed, expert, e)) * BLOCK  # rows of the expert's blocks before this one
    rows = tl.minimum(tl.maximum(at_index(counts, expert, e) - before, 0), BLOCK)
    tl.store(blocks_ptr + own, tl.load(layer_ptr) * E + expert, mask=own < most)
    tl.store(blocks_ptr + most + own, at_index(firsts, expert, e) + before, mask=own < most)
    tl.store(blocks_ptr + 2 * most + own, rows, mask=own < most)
