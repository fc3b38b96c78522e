"""The Triton kernel of projections in decoding: few rows times one layer's matrices, which are read in place from the stacks.

Weights are the left operand; rows, padded to at least 16, are the right operand. Up to three projections of the same rows share a launch.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.dot_triton import dot

COLUMNS: tl.constexpr = tl.constexpr(64)


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
    m, n, k = tl.arange(0, M), block * N + tl.arange(0, N), tl.arange(0, COLUMNS)
    live = n < rows
    layer = tl.load(layer_ptr).to(tl.int64)
    out = layer * width + (cut - first) * M + m
    w_at = w_ptr + out[:, None] * K + part * EACH * COLUMNS + k[None, :]
    x_at = x_ptr + n[None, :] * K + part * EACH * COLUMNS + k[:, None]
    if RANK > 0:
        PADDED: tl.constexpr = triton.next_power_of_2(max(RANK, 16))
        r = tl.arange(0, PADDED)
        a_at = a_ptr + (layer * RANK + r)[:, None] * K + part * EACH * COLUMNS + k[None, :]
        low = tl.zeros([PADDED, N], tl.float32)
    sums = tl.zeros([M, N], tl.float32)
    left = part * -EACH + TILES  # not TILES - part * EACH, which Triton 3.7's interpreter takes for a constant
    for _ in tl.range(0, tl.minimum(EACH, left), num_stages=STAGES):
        w = tl.load(w_at, eviction_policy="evict_first")
        x = tl.load(x_at, mask=live[None, :], other=0.0)
        sums = dot(w, x, sums)
        if RANK > 0:
            low = dot(tl.load(a_at, mask=(r < RANK)[:, None], other=0.0), x, low)
            a_at += COLUMNS
        w_at += COLUMNS
        x_at += COLUMNS
    if BIAS and part == 0:
        sums += tl.load(bias_ptr + out).to(tl.float32)[:, None]
    if RANK > 0:
        b = tl.load(b_ptr + out[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0)
        sums = dot(b, (low * SCALE).to(tl.bfloat16), sums)
    total = (part * rows + n)[None, :] * (OUT0 + OUT1 + OUT2) + (cut * M + m)[:, None]
    tl.store(out_ptr + total, sums, mask=live[None, :])
