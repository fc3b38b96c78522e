"""Triton kernels of the update's experts. Each expert has many rows, so arithmetic dominates and weights are unpacked beforehand.

Rows are sorted by expert, in blocks that each belong to one expert (see expert_rows). One kernel instance computes one tile [rows of a
block, N] with the matrix of the block's expert. Instances of empty blocks return at once.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.dot_triton import dot
from discover_jax.kernels.experts_triton import UNSHIFT, _unpack

COLUMNS: tl.constexpr = tl.constexpr(64)


@triton.jit
def unpack(
    words_ptr,  # int32 [E, SLABS, K/64, M16, 128]
    factors_ptr,  # int32 [E, SLABS, K/64, M16, 8]
    out_ptr,  # bf16 [E, OUT, K]; if PAIRED, all even rows (gates) come before all odd ones (ups)
    SLABS: tl.constexpr,
    TILES: tl.constexpr,  # K/64
    M16: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Unpacks MXFP4 tiles to bfloat16, exactly."""
    expert, slab, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    M: tl.constexpr = 16 * M16
    tile = ((expert * SLABS + slab) * TILES + k) * M16
    rows = tl.arange(0, M16)[:, None]
    words = tl.load(words_ptr + (tile + rows) * 128 + tl.arange(0, 128)[None, :]).to(tl.uint32, bitcast=True)
    factors = tl.load(factors_ptr + (tile + rows) * 8 + tl.arange(0, 8)[None, :]).to(tl.uint32, bitcast=True)
    weights = _unpack(words, factors, M16).to(tl.float32) * UNSHIFT
    m = tl.arange(0, M)
    if PAIRED:
        HALF: tl.constexpr = M // 2
        out = (m // HALF) * (SLABS * HALF) + slab * HALF + m % HALF
    else:
        out = slab * M + m
    at = (expert * SLABS * M + out)[:, None] * (TILES * COLUMNS) + k * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, weights.to(out_ptr.dtype.element_ty))


@triton.jit
def _adapted(sums, low_ptr, b_ptr, expert, row, live, n, N: tl.constexpr, RANK: tl.constexpr, LEFT: tl.constexpr, dtype: tl.constexpr):
    """sums + low B^T, or sums + low A if LEFT: the second product of an adapter."""
    PADDED: tl.constexpr = triton.next_power_of_2(max(RANK, 16))
    r = tl.arange(0, PADDED)
    low = tl.load(low_ptr + row[:, None] * RANK + r[None, :], mask=live[:, None] & (r < RANK)[None, :], other=0.0)
    if LEFT:
        at = (expert * RANK + r)[:, None] * N + n[None, :]
    else:
        at = (expert * N + n)[None, :] * RANK + r[:, None]
    b = tl.load(b_ptr + at, mask=(r < RANK)[:, None] & (n < N)[None, :], other=0.0)
    return dot(low.to(dtype), b.to(dtype), sums)


@triton.jit
def grouped(
    x_ptr,  # bf16, rows of K
    w_ptr,  # bf16 [E, N, K], or [E, K, N] if LEFT; [E, 2 N, K] if PAIRED
    bias_ptr,  # float32 [E, N], or [E, 2 N]
    low_ptr,  # float32 [R, RANK], of sorted rows
    b_ptr,  # [E, N, RANK], or [E, 2 N, RANK], or [E, RANK, N] if LEFT
    slots_ptr,  # int32 [R]: the index of each sorted row among the tokens' choices
    blocks_ptr,  # int32 [3, blocks]: expert, first row and number of rows of each block of rows
    blocks,
    out_ptr,  # [R, N] bf16 of sorted rows; float32 in the order of the slots if SCATTER; the activation, bf16, if PAIRED
    both_ptr,  # PAIRED: bf16 [R, 2 N], gates and ups before the activation
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,  # rows per block
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    LEFT: tl.constexpr,  # x W instead of x W^T
    SHARE: tl.constexpr,  # slots per token if rows of x are tokens; 0 if rows of x are the sorted rows
    SCATTER: tl.constexpr,
    FLOAT: tl.constexpr,  # write float32 of sorted rows
    BIAS: tl.constexpr,
    RANK: tl.constexpr,  # of the adapter; 0 for none
    PAIRED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """Rows times their expert's matrix, with bias and adapter. If PAIRED, also the activation of both halves of the outputs."""
    cut, block = tl.program_id(0), tl.program_id(1)
    rows = tl.load(blocks_ptr + 2 * blocks + block)
    if rows == 0:
        return
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    m, n, k = tl.arange(0, BM), cut * BN + tl.arange(0, BN), tl.arange(0, COLUMNS)
    live, inside = m < rows, n < N
    row = (tl.load(blocks_ptr + blocks + block) + m).to(tl.int64)
    source = row
    if SHARE > 0:
        source = (tl.load(slots_ptr + row, mask=live, other=0) // SHARE).to(tl.int64)
    x_at = x_ptr + source[:, None] * K + k[None, :]
    if LEFT:
        w_at = w_ptr + expert * K * N + k[:, None] * N + n[None, :]
    else:
        w_at = w_ptr + ((expert * (2 * N if PAIRED else N) + n)[None, :] * K + k[:, None])
    sums = tl.zeros([BM, BN], tl.float32)
    ups = tl.zeros([BM, BN], tl.float32)
    # The adapter comes first: after the loop it would hold registers that a second kernel instance on the same multiprocessor needs.
    if RANK > 0:
        if PAIRED:
            sums = _adapted(sums, low_ptr, b_ptr, 2 * expert, row, live, n, N, RANK, LEFT, x_ptr.dtype.element_ty)
            ups = _adapted(ups, low_ptr, b_ptr, 2 * expert + 1, row, live, n, N, RANK, LEFT, x_ptr.dtype.element_ty)
        else:
            sums = _adapted(sums, low_ptr, b_ptr, expert, row, live, n, N, RANK, LEFT, x_ptr.dtype.element_ty)
    for _ in tl.range(0, K, COLUMNS, num_stages=STAGES):
        x = tl.load(x_at, mask=live[:, None], other=0.0)
        sums = dot(x, tl.load(w_at, mask=inside[None, :], other=0.0), sums)
        if PAIRED:
            ups = dot(x, tl.load(w_at + N * K, mask=inside[None, :], other=0.0), ups)
        x_at += COLUMNS
        w_at += COLUMNS * (N if LEFT else 1)
    WIDE: tl.constexpr = 2 * N if PAIRED else N
    if BIAS:
        sums += tl.load(bias_ptr + expert * WIDE + n, mask=inside, other=0.0)[None, :]
        if PAIRED:
            ups += tl.load(bias_ptr + expert * WIDE + N + n, mask=inside, other=0.0)[None, :]
    kept = live[:, None] & inside[None, :]
    if PAIRED:
        at = row[:, None] * (2 * N) + n[None, :]
        tl.store(both_ptr + at, sums.to(x_ptr.dtype.element_ty), mask=kept)
        tl.store(both_ptr + at + N, ups.to(x_ptr.dtype.element_ty), mask=kept)
        gate = tl.minimum(sums, LIMIT)
        up = tl.minimum(tl.maximum(ups, -LIMIT), LIMIT)
        activated = (up + 1.0) * gate / (1.0 + tl.exp(-ALPHA * gate))
        tl.store(out_ptr + row[:, None] * N + n[None, :], activated.to(x_ptr.dtype.element_ty), mask=kept)
    elif SCATTER:
        target = tl.load(slots_ptr + row, mask=live, other=0).to(tl.int64)
        tl.store(out_ptr + target[:, None] * N + n[None, :], sums, mask=kept)
    elif FLOAT:
        tl.store(out_ptr + row[:, None] * N + n[None, :], sums, mask=kept)
    else:
        tl.store(out_ptr + row[:, None] * N + n[None, :], sums.to(x_ptr.dtype.element_ty), mask=kept)


@triton.jit
def outer(
    u_ptr,  # bf16, rows of N
    v_ptr,  # float32 [R, RANK], of sorted rows
    slots_ptr,  # int32 [R]
    firsts_ptr,  # int32 [E + 1]: the first sorted row of each expert
    out_ptr,  # float32 [E, N, RANK]
    N: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,  # rows per iteration
    STAGES: tl.constexpr,
    SHARE: tl.constexpr,  # as above
    RANK: tl.constexpr,
):
    """For each expert the sum over its rows of u v^T: the gradient of an adapter's matrix. Zero for experts without rows."""
    expert, cut = tl.program_id(0), tl.program_id(1)
    PADDED: tl.constexpr = triton.next_power_of_2(max(RANK, 16))
    n, i, r = cut * BN + tl.arange(0, BN), tl.arange(0, BR), tl.arange(0, PADDED)
    first, last = tl.load(firsts_ptr + expert), tl.load(firsts_ptr + expert + 1)
    sums = tl.zeros([BN, PADDED], tl.float32)
    for begin in tl.range(first, last, BR, num_stages=STAGES):
        row = (begin + i).to(tl.int64)
        live = row < last
        source = row
        if SHARE > 0:
            source = (tl.load(slots_ptr + row, mask=live, other=0) // SHARE).to(tl.int64)
        u = tl.load(u_ptr + source[None, :] * N + n[:, None], mask=live[None, :] & (n < N)[:, None], other=0.0)
        v = tl.load(v_ptr + row[:, None] * RANK + r[None, :], mask=live[:, None] & (r < RANK)[None, :], other=0.0)
        sums = dot(u, v.to(u.dtype), sums)
    at = (expert * N + n).to(tl.int64)[:, None] * RANK + r[None, :]
    tl.store(out_ptr + at, sums, mask=(n < N)[:, None] & (r < RANK)[None, :])
