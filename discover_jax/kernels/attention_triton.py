"""Triton kernels of decoding attention: one query per row against the row's pages of keys and values, split over the context.

The query heads of one key/value head are the rows of one matrix, padded with masked rows to a power of two of at least 16, so groups may
have any size. Tiles [positions, H] of the pages stream through shared memory. One kernel instance computes one share of one row's blocks
for one key/value head. `merge` combines the partial results by their log-sum-exp. Exponentials are base 2, so scores include log2(e).
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.dot_triton import dot

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    q_ptr,  # bf16 [B, K GROUP, H]
    keys_ptr,  # bf16 [L, POOL, K, PAGE, H]
    values_ptr,
    layer_ptr,  # int32: index into L
    pages_ptr,  # int32 [B, M]
    counts_ptr,  # int32 [B]
    sinks_ptr,  # [K GROUP], or [L, K GROUP]
    out_ptr,  # WHOLE: bf16 [B, K GROUP, H]; else float32 [shares, K GROUP, H], the separate result of each share, without the sink
    lse_ptr,  # not WHOLE: float32 [shares, K GROUP], log2 of the share's sum of exponentials
    spans_ptr,  # not WHOLE: int32 [2, B], the first share and the number of shares of each row
    B: tl.constexpr,
    M: tl.constexpr,
    POOL: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one key/value head
    PAGE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # positions per iteration; divides PAGE
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,  # one kernel instance per row and key/value head
    SLOTS: tl.constexpr,  # number of shares that keeps the GPU busy
    MOST: tl.constexpr,  # maximum number of shares, plus one per row
    LEAST: tl.constexpr,  # minimum number of blocks per share, unless that leaves SLOTS empty
    STACKED: tl.constexpr,  # whether sinks are those of all layers
):
    head, share = tl.program_id(0), tl.program_id(1)
    if WHOLE:
        row = share
        count = tl.load(counts_ptr + row)
        begin = 0
        end = tl.cdiv(count, BLOCK)
    else:
        b = tl.arange(0, triton.next_power_of_2(B))
        blocks = tl.cdiv(tl.load(counts_ptr + b, mask=b < B, other=0), BLOCK)
        total = tl.sum(blocks)
        size = tl.maximum(tl.cdiv(total, MOST), tl.minimum(LEAST, tl.cdiv(total, SLOTS)))
        shares = tl.cdiv(blocks, tl.maximum(size, 1))
        ends = tl.cumsum(shares, 0)
        if (share == 0) & (head == 0):
            tl.store(spans_ptr + b, ends - shares, mask=b < B)
            tl.store(spans_ptr + B + b, shares, mask=b < B)  # 0 for an empty row: no instance computes it
        row = tl.sum((ends <= share).to(tl.int32))  # padding has the last row's end
        if row >= B:
            return
        first = tl.sum(tl.where(b == row, ends - shares, 0))
        of_row = tl.sum(tl.where(b == row, shares, 0))
        count = tl.load(counts_ptr + row)
        own = tl.cdiv(count, BLOCK)
        begin = own * (share - first) // of_row  # shares are as equal as possible
        end = own * (share - first + 1) // of_row

    ROWS: tl.constexpr = triton.next_power_of_2(max(GROUP, 16))
    PER_PAGE: tl.constexpr = PAGE // BLOCK
    g, h, s = tl.arange(0, ROWS), tl.arange(0, H), tl.arange(0, BLOCK)
    n = head * GROUP + g
    q = tl.load(q_ptr + (row * K * GROUP + n)[:, None] * H + h[None, :], mask=(g < GROUP)[:, None], other=0.0)
    if STACKED:
        sinks_ptr += tl.load(layer_ptr) * K * GROUP
    if WHOLE:
        highest = tl.load(sinks_ptr + n, mask=g < GROUP, other=0.0).to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, H], tl.float32)
    scale = H**-0.5 * LOG2E

    tile = s[:, None] * H + h[None, :]
    pool = tl.load(layer_ptr).to(tl.int64) * POOL
    pages_at = pages_ptr + row * M
    page = tl.load(pages_at + begin // PER_PAGE)
    for i in tl.range(begin, end, num_stages=STAGES):
        at = ((pool + page) * K + head) * (PAGE * H) + (i % PER_PAGE) * (BLOCK * H)
        # Load the next page number one iteration early, so that no tile waits for it.
        page = tl.load(pages_at + tl.minimum(i + 1, end - 1) // PER_PAGE)
        seen = s < count - i * BLOCK
        k = tl.load(keys_ptr + at + tile)
        # Unused positions may hold NaN, and 0 * NaN is NaN.
        v = tl.load(values_ptr + at + tile, mask=seen[:, None], other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros([ROWS, BLOCK], tl.float32))
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        out = dot(weights.to(tl.bfloat16), v, out * shrink[:, None])
        highest = higher

    out = out / total[:, None]
    if WHOLE:
        tl.store(out_ptr + (row * K * GROUP + n)[:, None] * H + h[None, :], out.to(tl.bfloat16), mask=(g < GROUP)[:, None])
    else:
        tl.store(out_ptr + (share * K * GROUP + n)[:, None] * H + h[None, :], out, mask=(g < GROUP)[:, None])
        tl.store(lse_ptr + share * K * GROUP + n, highest + tl.log2(total), mask=g < GROUP)


@triton.jit
def merge(
    parts_ptr,  # float32 [shares, N, H]
    lse_ptr,  # float32 [shares, N]
    spans_ptr,  # int32 [2, B]
    sinks_ptr,  # [N], or [L, N]
    layer_ptr,  # int32
    out_ptr,  # [B, N, H]
    B: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,  # shares per iteration
    STACKED: tl.constexpr,  # whether sinks are those of all layers
):
    """Shares weighted by their sums of exponentials. The sink counts as one more share, with the value 0."""
    head, row = tl.program_id(0), tl.program_id(1)
    first, shares = tl.load(spans_ptr + row), tl.load(spans_ptr + B + row)
    i, h = tl.arange(0, STEP), tl.arange(0, H)
    if STACKED:
        sinks_ptr += tl.load(layer_ptr) * N
    highest = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
    total = 1.0
    out = tl.zeros([H], tl.float32)
    for begin in range(0, shares, STEP):
        live = begin + i < shares
        at = (first + begin + i) * N + head
        lse = tl.load(lse_ptr + at, mask=live, other=float("-inf"))
        parts = tl.load(parts_ptr + at[:, None] * H + h[None, :], mask=live[:, None], other=0.0)
        higher = tl.maximum(highest, tl.max(lse, axis=0))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(lse - higher)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * parts, axis=0)
        highest = higher
    tl.store(out_ptr + (row * N + head) * H + h, (out / total).to(out_ptr.dtype.element_ty))
