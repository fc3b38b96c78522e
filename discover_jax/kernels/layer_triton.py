"""Triton kernels of the small operations between a decoding layer's large kernels, see `layer_parts`."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def add_and_norm(
    x_ptr,  # float32 [T, D]
    parts_ptr,  # float32 [PARTS, T, X, D]
    weights_ptr,  # float32 [T, X]; not read without WEIGHTED
    scale_ptr,  # [L, D]
    layer_ptr,  # int32 [1]
    tokens,  # T
    sum_ptr,  # float32 [T, D]
    normed_ptr,  # [T, D]
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least D
    PARTS: tl.constexpr,
    X: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EPS: tl.constexpr,
):
    """One token per kernel instance."""
    t, d = tl.program_id(0), tl.arange(0, BLOCK)
    real = d < D
    added = tl.zeros([BLOCK], tl.float32)
    for x in tl.static_range(X):
        one = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            one += tl.load(parts_ptr + ((part * tokens + t) * X + x) * D + d, mask=real, other=0.0)
        if WEIGHTED:
            one *= tl.load(weights_ptr + t * X + x)
        added += one
    total = tl.load(x_ptr + t * D + d, mask=real, other=0.0) + added
    tl.store(sum_ptr + t * D + d, total, mask=real)
    scale = tl.load(scale_ptr + tl.load(layer_ptr) * D + d, mask=real, other=0.0).to(tl.float32)
    normed = total * tl.rsqrt(tl.sum(total * total, axis=0) / D + EPS) * scale
    tl.store(normed_ptr + t * D + d, normed.to(normed_ptr.dtype.element_ty), mask=real)


@triton.jit
def _half(parts_ptr, at, stride, PARTS: tl.constexpr):
    """The sum of the parts, rounded to bfloat16 before the rotation, as in the update."""
    half = tl.load(parts_ptr + at)
    for part in tl.static_range(1, PARTS):
        half += tl.load(parts_ptr + part * stride + at)
    return half.to(tl.bfloat16).to(tl.float32)


@triton.jit
def rotate_and_write(
    parts_ptr,  # float32 [PARTS, T, (N + 2 K) H]
    cos_ptr,  # float32 [T, H/2]
    sin_ptr,
    keys_ptr,  # bf16 [L, POOL, K, PAGE, H], the memory of keys_out
    values_ptr,
    layer_ptr,  # int32 [1]
    pages_ptr,  # int32 [T]; POOL and above: not written
    places_ptr,  # int32 [T]
    tokens,  # T
    q_ptr,  # bf16 [T, N, H]
    keys_out_ptr,
    values_out_ptr,
    N: tl.constexpr,  # query heads
    K: tl.constexpr,  # key/value heads
    H: tl.constexpr,
    HEADS: tl.constexpr,  # per kernel instance; a power of two that divides N and K
    PARTS: tl.constexpr,
    POOL: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One token and some heads per kernel instance."""
    t, cut = tl.program_id(0), tl.program_id(1)
    head, h = cut * HEADS + tl.arange(0, HEADS), tl.arange(0, H // 2)
    WIDTH: tl.constexpr = (N + 2 * K) * H
    at = t * WIDTH + head[:, None] * H + h[None, :]
    first, second = _half(parts_ptr, at, tokens * WIDTH, PARTS), _half(parts_ptr, at + H // 2, tokens * WIDTH, PARTS)
    if cut < (N + K) // HEADS:
        cos, sin = tl.load(cos_ptr + t * (H // 2) + h)[None, :], tl.load(sin_ptr + t * (H // 2) + h)[None, :]
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if cut < N // HEADS:
        q_at = q_ptr + (t * N + head)[:, None] * H + h[None, :]
        tl.store(q_at, first.to(tl.bfloat16))
        tl.store(q_at + H // 2, second.to(tl.bfloat16))
    else:
        page = tl.load(pages_ptr + t)
        written = page + tl.zeros_like(h)[None, :] < POOL
        page = tl.load(layer_ptr).to(tl.int64) * POOL + page
        if cut < (N + K) // HEADS:
            key_at = keys_out_ptr + ((page * K + head - N)[:, None] * PAGE + tl.load(places_ptr + t)) * H + h[None, :]
            tl.store(key_at, first.to(tl.bfloat16), mask=written)
            tl.store(key_at + H // 2, second.to(tl.bfloat16), mask=written)
        else:
            value_at = values_out_ptr + ((page * K + head - N - K)[:, None] * PAGE + tl.load(places_ptr + t)) * H + h[None, :]
            tl.store(value_at, first.to(tl.bfloat16), mask=written)
            tl.store(value_at + H // 2, second.to(tl.bfloat16), mask=written)
