"""Triton kernels of the update's attention: packed rows, softmax with sinks, forward and backward.

A query sees an interval of keys. The interval ends at the query's own position and begins at `first`, which never decreases along a row.
So one rule covers both segments and windows, and for a block of queries only the blocks of keys at the two ends need a mask. The forward
pass is an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135) that starts with the sink. The backward
pass recomputes probabilities from the log-sum-exp, which includes the sink, and so is exact. Exponentials are base 2, so scores include
log2(e). The order of every sum is the same in each run.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.dot_triton import dot

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(ptr, places, T, width, at, H: tl.constexpr, MASK: tl.constexpr):
    """[positions, H] of rows of `width` numbers; this head's begin at `at`."""
    h = tl.arange(0, H)
    spots = ptr + places.to(tl.int64)[:, None] * width + at + h[None, :]
    if MASK:
        return tl.load(spots, mask=(places < T)[:, None], other=0.0)
    return tl.load(spots)


@triton.jit
def _put(ptr, tile, places, T, width, at, H: tl.constexpr):
    """Writes what `_tile` reads, rounded to the pointer's dtype."""
    h = tl.arange(0, H)
    spots = ptr + places.to(tl.int64)[:, None] * width + at + h[None, :]
    tl.store(spots, tile.to(ptr.dtype.element_ty), mask=(places < T)[:, None])


@triton.jit
def _attend(
    sums, q, k_ptr, v_ptr, place, first, begin, end, T, kv_width, kv_at,
    H: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The sums of the online softmax after keys `begin` to `end`."""
    out, highest, total = sums
    scale = H**-0.5 * LOG2E
    for at in tl.range(begin, end, BN, num_stages=STAGES):
        key = at + tl.arange(0, BN)
        k = _tile(k_ptr, key, T, kv_width, kv_at, H, MASK)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BN], tl.float32)) * scale
        if MASK:
            seen = (key[None, :] >= first[:, None]) & (key[None, :] <= place[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        v = _tile(v_ptr, key, T, kv_width, kv_at, H, MASK)
        out = dot(weights.to(v.dtype), v, out * shrink[:, None])
        highest = higher
    return out, highest, total


@triton.jit
def _keys(first_ptr, start, T, BM: tl.constexpr, BN: tl.constexpr):
    """For queries from `start`: where their keys begin, where all of them see every key, and where that ends."""
    last = tl.minimum(start + BM, T) - 1
    begin = tl.load(first_ptr + start) // BN * BN
    whole = tl.cdiv(tl.load(first_ptr + last), BN) * BN
    return begin, tl.minimum(whole, start), last + 1


@triton.jit
def forward(
    q_ptr,  # bf16 [B, T, N, H]
    k_ptr,  # bf16 [B, T, K, H]
    v_ptr,
    first_ptr,  # int32 [B, T], the first key that each query sees
    sinks_ptr,  # [N]
    T,
    out_ptr,  # bf16 [B, T, N, H]
    lse_ptr,  # float32 [B, N, T], log2 of the sum of exponentials, sink included
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,  # queries per kernel instance; a multiple of BN
    BN: tl.constexpr,  # keys per iteration
    STAGES: tl.constexpr,
):
    head, block, batch = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    start = block * BM  # longest first
    place = start + tl.arange(0, BM)
    first_ptr += batch * T
    row = batch.to(tl.int64) * T
    first = tl.load(first_ptr + place, mask=place < T, other=0)
    q = _tile(q_ptr + row * (N * H), place, T, N * H, head * H, H, True)
    k_ptr += row * (K * H)
    v_ptr += row * (K * H)
    kv_at = head // (N // K) * H
    sums = (
        tl.zeros([BM, H], tl.float32),
        tl.full([BM], 0.0, tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E,
        tl.full([BM], 1.0, tl.float32),
    )
    begin, whole, end = _keys(first_ptr, start, T, BM, BN)
    sums = _attend(sums, q, k_ptr, v_ptr, place, first, begin, whole, T, K * H, kv_at, H, BN, STAGES, True)
    sums = _attend(sums, q, k_ptr, v_ptr, place, first, whole, start, T, K * H, kv_at, H, BN, STAGES, False)
    sums = _attend(sums, q, k_ptr, v_ptr, place, first, start, end, T, K * H, kv_at, H, BN, STAGES, True)
    out, highest, total = sums
    _put(out_ptr + row * (N * H), out / total[:, None], place, T, N * H, head * H, H)
    tl.store(lse_ptr + (batch * N + head).to(tl.int64) * T + place, highest + tl.log2(total), mask=place < T)


@triton.jit
def _to_queries(
    dq, q, d_out, lse, delta, k_ptr, v_ptr, place, first, begin, end, T, kv_width, kv_at,
    H: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dq / scale plus the contribution of keys `begin` to `end`."""
    scale = H**-0.5 * LOG2E
    zeros = tl.zeros([q.shape[0], BN], tl.float32)
    for at in tl.range(begin, end, BN, num_stages=STAGES):
        key = at + tl.arange(0, BN)
        k = _tile(k_ptr, key, T, kv_width, kv_at, H, MASK)
        v = _tile(v_ptr, key, T, kv_width, kv_at, H, MASK)
        weights = tl.exp2(dot(q, tl.trans(k), zeros) * scale - lse[:, None])
        if MASK:
            weights = tl.where((key[None, :] >= first[:, None]) & (key[None, :] <= place[:, None]), weights, 0.0)
        d_scores = weights * (dot(d_out, tl.trans(v), zeros) - delta[:, None])
        dq = dot(d_scores.to(k.dtype), k, dq)
    return dq


@triton.jit
def backward_queries(
    q_ptr,  # bf16 [B, T, N, H]
    k_ptr,  # bf16 [B, T, K, H]
    v_ptr,
    d_out_ptr,  # bf16 [B, T, N, H]
    lse_ptr,  # float32 [B, N, T]
    delta_ptr,  # float32 [B, N, T], output times its gradient, summed over H
    first_ptr,  # int32 [B, T]
    T,
    dq_ptr,  # bf16 [B, T, N, H]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Loops over keys as the forward pass does."""
    head, block, batch = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    start = block * BM
    place = start + tl.arange(0, BM)
    live = place < T
    first_ptr += batch * T
    row = batch.to(tl.int64) * T
    first = tl.load(first_ptr + place, mask=live, other=0)
    q = _tile(q_ptr + row * (N * H), place, T, N * H, head * H, H, True)
    d_out = _tile(d_out_ptr + row * (N * H), place, T, N * H, head * H, H, True)
    of_head = (batch * N + head).to(tl.int64) * T
    lse = tl.load(lse_ptr + of_head + place, mask=live, other=0.0)
    delta = tl.load(delta_ptr + of_head + place, mask=live, other=0.0)
    k_ptr += row * (K * H)
    v_ptr += row * (K * H)
    kv_at = head // (N // K) * H
    begin, whole, end = _keys(first_ptr, start, T, BM, BN)
    dq = tl.zeros([BM, H], tl.float32)
    dq = _to_queries(dq, q, d_out, lse, delta, k_ptr, v_ptr, place, first, begin, whole, T, K * H, kv_at, H, BN, STAGES, True)
    dq = _to_queries(dq, q, d_out, lse, delta, k_ptr, v_ptr, place, first, whole, start, T, K * H, kv_at, H, BN, STAGES, False)
    dq = _to_queries(dq, q, d_out, lse, delta, k_ptr, v_ptr, place, first, start, end, T, K * H, kv_at, H, BN, STAGES, True)
    _put(dq_ptr + row * (N * H), dq * H**-0.5, place, T, N * H, head * H, H)


@triton.jit
def _to_keys(
    sums, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, key, last, begin, end, T, width, at_head,
    H: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv plus the contribution of queries `begin` to `end` of one head."""
    dk, dv = sums
    scale = H**-0.5 * LOG2E
    zeros = tl.zeros([k.shape[0], BM], tl.float32)
    for at in tl.range(begin, end, BM, num_stages=STAGES):
        place = at + tl.arange(0, BM)
        q = _tile(q_ptr, place, T, width, at_head, H, MASK)
        d_out = _tile(d_out_ptr, place, T, width, at_head, H, MASK)
        if MASK:
            lse = tl.load(lse_ptr + place, mask=place < T, other=0.0)
            delta = tl.load(delta_ptr + place, mask=place < T, other=0.0)
        else:
            lse = tl.load(lse_ptr + place)
            delta = tl.load(delta_ptr + place)
        weights = tl.exp2(dot(k, tl.trans(q), zeros) * scale - lse[None, :])
        if MASK:
            weights = tl.where((place[None, :] >= key[:, None]) & (place[None, :] <= last[:, None]), weights, 0.0)
        dv = dot(weights.to(d_out.dtype), d_out, dv)
        d_scores = weights * (dot(v, tl.trans(d_out), zeros) - delta[None, :])
        dk = dot(d_scores.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def backward_keys(
    q_ptr,  # bf16 [B, T, N, H]
    k_ptr,  # bf16 [B, T, K, H]
    v_ptr,
    d_out_ptr,  # bf16 [B, T, N, H]
    lse_ptr,  # float32 [B, N, T]
    delta_ptr,  # float32 [B, N, T]
    last_ptr,  # int32 [B, T], the last query that sees each key
    T,
    dk_ptr,  # bf16 [B, T, K, H]
    dv_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BN: tl.constexpr,  # keys per kernel instance; a multiple of BM
    BM: tl.constexpr,  # queries per iteration
    STAGES: tl.constexpr,
):
    """Loops over the query heads of one key/value head."""
    kv_head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = block * BN  # longest first
    key = start + tl.arange(0, BN)
    live = key < T
    last_ptr += batch * T
    row = batch.to(tl.int64) * T
    last = tl.load(last_ptr + key, mask=live, other=-1)
    k = _tile(k_ptr + row * (K * H), key, T, K * H, kv_head * H, H, True)
    v = _tile(v_ptr + row * (K * H), key, T, K * H, kv_head * H, H, True)
    q_ptr += row * (N * H)
    d_out_ptr += row * (N * H)
    near = tl.minimum(start + BN, T)
    end = tl.load(last_ptr + near - 1) + 1
    whole = tl.maximum((tl.load(last_ptr + start) + 1) // BM * BM, near)  # every query from the keys' positions up to here sees all keys
    sums = (tl.zeros([BN, H], tl.float32), tl.zeros([BN, H], tl.float32))
    GROUP: tl.constexpr = N // K
    for g in tl.range(GROUP):
        head = kv_head * GROUP + g
        of_head = (batch * N + head).to(tl.int64) * T
        lse, delta, at = lse_ptr + of_head, delta_ptr + of_head, head * H
        sums = _to_keys(sums, k, v, q_ptr, d_out_ptr, lse, delta, key, last, start, near, T, N * H, at, H, BM, STAGES, True)
        sums = _to_keys(sums, k, v, q_ptr, d_out_ptr, lse, delta, key, last, near, whole, T, N * H, at, H, BM, STAGES, False)
        sums = _to_keys(sums, k, v, q_ptr, d_out_ptr, lse, delta, key, last, whole, end, T, N * H, at, H, BM, STAGES, True)
    dk, dv = sums
    _put(dk_ptr + row * (K * H), dk * H**-0.5, key, T, K * H, kv_head * H, H)
    _put(dv_ptr + row * (K * H), dv, key, T, K * H, kv_head * H, H)
