"""The Triton kernel of projections in decoding: few rows times one layer's matrices, which are read in place from the stacks.

Up to three projections of the same rows share a launch. The weights are the left operand if there are few rows, which are padded to at
least 16. Otherwise the rows are.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.dot_triton import dot

COLUMNS: tl.constexpr = tl.constexpr(64)


@triton.jit
def _along(x, axis: tl.constexpr):
    """A vector as a matrix that varies along this axis."""
    return x[:, None] if axis == 0 else x[None, :]


@triton.jit
def _product(weights, rows, sums, ROWS_LEFT: tl.constexpr):
    if ROWS_LEFT:
        sums = dot(rows, weights, sums)
    else:
        sums = dot(weights, rows, sums)
    return sums


@triton.jit
def project(
    x_ptr,  # bf16 [T, K]
    w0_ptr,  # bf16 [L, OUT, K], one per projection
    w1_ptr,
    w2_ptr,
    bias0_ptr,  # [L, OUT]; not read without BIAS
    bias1_ptr,
    bias2_ptr,
    a0_ptr,  # bf16 [L, RANK, K]; not read if RANK is 0
    a1_ptr,
    a2_ptr,
    b0_ptr,  # bf16 [L, OUT, RANK]
    b1_ptr,
    b2_ptr,
    layer_ptr,  # int32 [1]
    rows,  # T
    out_ptr,  # float32 [PARTS, T, OUT0 + OUT1 + OUT2]; the caller adds the parts
    K: tl.constexpr,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    M: tl.constexpr,  # outputs per kernel instance; divides OUT0, OUT1 and OUT2
    N: tl.constexpr,  # rows per block
    ROWS_LEFT: tl.constexpr,  # whether the rows are the left operand
    PARTS: tl.constexpr,  # parts into which the columns are divided among instances
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,  # whether there are biases
    RANK: tl.constexpr,  # of the adapter; 0 for none
    SCALE: tl.constexpr,
):
    """x W^T + b + SCALE (x A^T) B^T, in parts to be summed by the caller. A part rounds its own x A^T to bfloat16."""
    cut, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w_ptr, bias_ptr, a_ptr, b_ptr, width, first = w0_ptr, bias0_ptr, a0_ptr, b0_ptr, OUT0, 0
    if cut >= OUT0 // M:
        w_ptr, bias_ptr, a_ptr, b_ptr, width, first = w1_ptr, bias1_ptr, a1_ptr, b1_ptr, OUT1, OUT0 // M
    if cut >= (OUT0 + OUT1) // M:
        w_ptr, bias_ptr, a_ptr, b_ptr, width, first = w2_ptr, bias2_ptr, a2_ptr, b2_ptr, OUT2, (OUT0 + OUT1) // M
    TILES: tl.constexpr = K // COLUMNS
    EACH: tl.constexpr = (TILES + PARTS - 1) // PARTS
    # Axes of outputs (and of the adapter's rank) and of rows in the result.
    OUT: tl.constexpr = 1 if ROWS_LEFT else 0
    ROW: tl.constexpr = 0 if ROWS_LEFT else 1
    n, k = block * N + tl.arange(0, N), tl.arange(0, COLUMNS)
    live = n < rows
    layer = tl.load(layer_ptr).to(tl.int64)
    out = layer * width + (cut - first) * M + tl.arange(0, M)
    start = part * EACH * COLUMNS
    w_at = w_ptr + _along(out * K, OUT) + _along(start + k, ROW)
    x_at = x_ptr + _along(n * K, ROW) + _along(start + k, OUT)
    sums = tl.zeros([N, M] if ROWS_LEFT else [M, N], tl.float32)
    if RANK > 0:
        PADDED: tl.constexpr = triton.next_power_of_2(max(RANK, 16))
        r = tl.arange(0, PADDED)
        a_at = a_ptr + _along((layer * RANK + r) * K, OUT) + _along(start + k, ROW)
        low = tl.zeros([N, PADDED] if ROWS_LEFT else [PADDED, N], tl.float32)
    left = part * -EACH + TILES  # not TILES - part * EACH, which Triton 3.7's interpreter takes for a constant
    for _ in tl.range(0, tl.minimum(EACH, left), num_stages=STAGES):
        w = tl.load(w_at, eviction_policy="evict_first")
        x = tl.load(x_at, mask=_along(live, ROW), other=0.0)
        sums = _product(w, x, sums, ROWS_LEFT)
        if RANK > 0:
            low = _product(tl.load(a_at, mask=_along(r < RANK, OUT), other=0.0), x, low, ROWS_LEFT)
            a_at += COLUMNS
        w_at += COLUMNS
        x_at += COLUMNS
    if BIAS and part == 0:
        sums += _along(tl.load(bias_ptr + out).to(tl.float32), OUT)
    if RANK > 0:
        b = tl.load(b_ptr + _along(out * RANK, OUT) + _along(r, ROW), mask=_along(r < RANK, ROW), other=0.0)
        sums = _product(b, (low * SCALE).to(tl.bfloat16), sums, ROWS_LEFT)
    total = _along((part * rows + n) * (OUT0 + OUT1 + OUT2), ROW) + _along(cut * M + tl.arange(0, M), OUT)
    tl.store(out_ptr + total, sums, mask=_along(live, ROW))
