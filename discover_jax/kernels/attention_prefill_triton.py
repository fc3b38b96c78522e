"""Triton kernels of attention over prompts: several queries per row against pages of keys and values, or against a ring and a chunk.

The queries of one key/value head are the rows of one matrix, token by token, so groups may have any size, and a few tokens fill a tile.
Both kernels are an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135) that reads only tiles of keys
which some query of the instance sees. Exponentials are base 2, so scores include log2(e).
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.dot_triton import dot

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below all scores; finite, so that a tile without a visible key adds 0 and not NaN


@triton.jit
def _add(sums, q, k, v, seen, MASK: tl.constexpr):
    """The sums after one tile of keys."""
    out, highest, total = sums
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * (q.shape[1] ** -0.5 * LOG2E)
    if MASK:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    shrink = tl.exp2(highest - higher)
    weights = tl.exp2(scores - higher[:, None])
    return dot(weights.to(v.dtype), v, out * shrink[:, None]), higher, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def _queries(row, start, head, T, K: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, BM: tl.constexpr):
    """For rows of the matrix from `start`: their tokens, heads, offsets in [B, T, N, H] without the last axis, and which rows exist."""
    r = start + tl.arange(0, BM)
    t, n = r // GROUP, head * GROUP + r % GROUP
    return t, n, (row.to(tl.int64) * T + t) * (K * GROUP) + n, r < T * GROUP


@triton.jit
def _pages(
    sums, q, keys_ptr, values_ptr, pages_ptr, pool, head, place, written, begin, end,
    POOL: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The sums after tiles `begin` to `end` of a row's pages."""
    PER_PAGE: tl.constexpr = PAGE // BN
    s, h = tl.arange(0, BN), tl.arange(0, H)
    tile = s[:, None] * H + h[None, :]
    page = tl.load(pages_ptr + tl.maximum(tl.minimum(begin, end - 1), 0) // PER_PAGE)
    for i in tl.range(begin, end, num_stages=STAGES):
        # Padding of a chunk may be in pages that do not exist.
        at = ((pool + tl.minimum(tl.maximum(page, 0), POOL - 1)) * K + head) * (PAGE * H) + (i % PER_PAGE) * (BN * H)
        # Load the next page number one iteration early, so that no tile waits for it.
        page = tl.load(pages_ptr + tl.minimum(i + 1, end - 1) // PER_PAGE)
        key = i * BN + s
        k = tl.load(keys_ptr + at + tile)
        if MASK:  # unused positions may hold NaN, and 0 * NaN is NaN
            v = tl.load(values_ptr + at + tile, mask=(key < written)[:, None], other=0.0)
        else:
            v = tl.load(values_ptr + at + tile)
        sums = _add(sums, q, k, v, key[None, :] <= place[:, None], MASK)
    return sums


@triton.jit
def attend_chunk(
    q_ptr,  # [B, T, N, H]
    keys_ptr,  # [L, POOL, K, PAGE, H]
    values_ptr,
    layer_ptr,  # int32: index into L
    pages_ptr,  # int32 [B, M]
    lengths_ptr,  # int32 [B], tokens before the T new ones
    sinks_ptr,  # [N]
    T,
    M,
    out_ptr,  # SHARES = 1: [B, T, N, H] in the values' type; else float32 [B, T, SHARES, N, H], the shares' results without the sink
    lse_ptr,  # SHARES > 1: float32 [B, T, SHARES, N], log2 of the share's sum of exponentials
    POOL: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one key/value head
    PAGE: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,  # rows of the matrix of queries per kernel instance
    BN: tl.constexpr,  # keys per iteration; divides PAGE
    SHARES: tl.constexpr,  # parts of the context
    STAGES: tl.constexpr,
):
    start, head = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM, tl.program_id(1)  # longest first
    row, share = tl.program_id(2) // SHARES, tl.program_id(2) % SHARES
    t, n, at, live = _queries(row, start, head, T, K, GROUP, H, BM)
    h = tl.arange(0, H)
    q = tl.load(q_ptr + at[:, None] * H + h[None, :], mask=live[:, None], other=0.0)
    length = tl.load(lengths_ptr + row)
    nearest = length + start // GROUP  # position of the instance's first token
    last = length + (tl.minimum(start + BM, T * GROUP) - 1) // GROUP
    blocks = tl.cdiv(tl.minimum(last + 1, M * PAGE), BN)  # the padding of a chunk may exceed the row
    each = tl.cdiv(blocks, SHARES)
    begin = tl.minimum(share * each, blocks)
    end = tl.minimum(begin + each, blocks)
    whole = tl.minimum(tl.maximum((nearest + 1) // BN, begin), end)  # up to here, every query sees every key
    if SHARES == 1:
        sums = (
            tl.zeros([BM, H], tl.float32),
            tl.load(sinks_ptr + n, mask=live, other=0.0).to(tl.float32) * LOG2E,
            tl.full([BM], 1.0, tl.float32),
        )
    else:
        sums = (tl.zeros([BM, H], tl.float32), tl.full([BM], LOWEST, tl.float32), tl.zeros([BM], tl.float32))
    pool = tl.load(layer_ptr).to(tl.int64) * POOL
    pages_ptr += row * M
    sums = _pages(sums, q, keys_ptr, values_ptr, pages_ptr, pool, head, length + t, length + T, begin, whole,
                  POOL, K, PAGE, H, BN, STAGES, False)  # fmt: skip
    sums = _pages(sums, q, keys_ptr, values_ptr, pages_ptr, pool, head, length + t, length + T, whole, end,
                  POOL, K, PAGE, H, BN, STAGES, True)  # fmt: skip
    out, highest, total = sums
    if SHARES == 1:
        tl.store(out_ptr + at[:, None] * H + h[None, :], (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        part = ((row.to(tl.int64) * T + t) * SHARES + share) * (K * GROUP) + n
        out = out / tl.where(total > 0.0, total, 1.0)[:, None]  # a token may see no key of a share
        tl.store(out_ptr + part[:, None] * H + h[None, :], out, mask=live[:, None])
        tl.store(lse_ptr + part, tl.where(total > 0.0, highest + tl.log2(total), float("-inf")), mask=live)


@triton.jit
def attend_window(
    q_ptr,  # [B, T, N, H]
    ring_k_ptr,  # [B, K, W, H]
    ring_v_ptr,
    k_ptr,  # [B, C, K, H]
    v_ptr,
    lengths_ptr,  # int32 [B], tokens before the chunk
    first_ptr,  # int32: index in the chunk of the first of the T tokens
    sinks_ptr,  # [N]
    T,
    C,
    out_ptr,  # [B, T, N, H]
    K: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    start, head, row = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    t, n, at, live = _queries(row, start, head, T, K, GROUP, H, BM)
    h, s = tl.arange(0, H), tl.arange(0, BN)
    q = tl.load(q_ptr + at[:, None] * H + h[None, :], mask=live[:, None], other=0.0)
    sums = (
        tl.zeros([BM, H], tl.float32),
        tl.load(sinks_ptr + n, mask=live, other=0.0).to(tl.float32) * LOG2E,
        tl.full([BM], 1.0, tl.float32),
    )
    length, first = tl.load(lengths_ptr + row), tl.load(first_ptr)
    place = first + t  # all places are relative to the chunk's first token
    nearest, last = first + start // GROUP, first + (tl.minimum(start + BM, T * GROUP) - 1) // GROUP

    ring = (row.to(tl.int64) * K + head) * (W * H)
    in_ring = tl.where((nearest < W - 1) & (length > 0), W, 0)  # 0 if no query sees the ring
    for begin in tl.range(0, in_ring, BN, num_stages=STAGES):
        w = begin + s
        key = -1 - (length - 1 + W - w) % W
        held = (w < W) & (length + key >= 0)
        spots = ring + w[:, None] * H + h[None, :]
        k = tl.load(ring_k_ptr + spots, mask=held[:, None], other=0.0)
        v = tl.load(ring_v_ptr + spots, mask=held[:, None], other=0.0)
        sums = _add(sums, q, k, v, held[None, :] & (place[:, None] - key[None, :] < W), True)

    for begin in tl.range(tl.maximum(nearest - W + 1, 0) // BN * BN, last + 1, BN, num_stages=STAGES):
        key = begin + s
        spots = ((row.to(tl.int64) * C + key)[:, None] * K + head) * H + h[None, :]
        k = tl.load(k_ptr + spots, mask=(key < C)[:, None], other=0.0)
        v = tl.load(v_ptr + spots, mask=(key < C)[:, None], other=0.0)
        distance = place[:, None] - key[None, :]
        sums = _add(sums, q, k, v, (distance >= 0) & (distance < W), True)

    out, _, total = sums
    tl.store(out_ptr + at[:, None] * H + h[None, :], (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
