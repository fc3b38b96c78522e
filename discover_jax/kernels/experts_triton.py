"""Triton kernels of decoding experts: rows of one expert times its MXFP4 tiles (see mxfp4_tiles), unpacked in registers.

Weights are the left operand of the tensor cores. Rows of activations, padded to at least 8, are the right operand: in decoding an expert
has few rows, and reading weights takes most of the time. One kernel instance computes some slabs of outputs for one block of rows. Each
block belongs to one expert. Instances past the last used block return at once.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from discover_jax.kernels.dot_triton import INTERPRETED, dot

COLUMNS: tl.constexpr = tl.constexpr(64)
UNSHIFT: tl.constexpr = tl.constexpr(float(2**32))  # 2^mxfp4_tiles.SHIFT


@triton.jit
def _halves(pair):
    """The two bfloat16 of each word as float32, lower half first, along a new last axis."""
    if INTERPRETED:  # the interpreter flushes subnormal bfloat16 to zero; this form is right there but needs more instructions on a GPU
        return tl.join((pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True))
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).to(tl.float32)


@triton.jit
def _times(pair, factor):
    """The product of both halves with those of the factor. It is exact, so the compiler emits one packed bfloat16 multiplication."""
    return (_halves(pair) * _halves(factor)).to(tl.bfloat16)


@triton.jit
def _word(word, factor):
    """The eight weights of each word: [..., half, j, i]."""
    factor = (factor & 0xFF) * 0x00800080  # the exponent field, in both halves
    factor = tl.broadcast_to(factor, word.shape)
    pair0 = _times((word << 6) & 0x81C081C0, factor)
    pair1 = _times((word << 2) & 0x81C081C0, factor)
    pair2 = _times(((word >> 4) | (word << 28)) & 0x81C081C0, factor)
    pair3 = _times((word & 0x81808180) | ((word >> 8) & 0x00400040), factor)
    return tl.join(tl.join(pair0, pair1), tl.join(pair2, pair3))


@triton.jit
def _unpack(words, factors, M16: tl.constexpr):
    """[M16, 128] words and [M16, 8] factors (uint32) to [16 M16, 64] bfloat16.

    All reshaping keeps each value in the lane that loaded it, so the result has the layout of the tensor cores' left operand.
    """
    by_row0, by_row1 = tl.split(words.reshape(M16, 8, 4, 2, 2))  # g q block h
    word00, word01 = tl.split(by_row0)
    word10, word11 = tl.split(by_row1)
    factors = factors[:, :, None]
    row0 = tl.join(_word(word00, factors), _word(word01, factors >> 16))
    row1 = tl.join(_word(word10, factors >> 8), _word(word11, factors >> 24))
    both = tl.join(row0, row1)  # m16 g q half j i block h
    return both.permute(0, 7, 1, 6, 5, 2, 4, 3).reshape(M16 * 16, 64)


@triton.jit
def matmul(
    x_ptr,  # bf16 [rows of x, K]
    words_ptr,  # int32 [E, slabs, K/64, M16, 128]
    factors_ptr,  # int32 [E, slabs, K/64, M16, 8]
    bias_ptr,  # [E, OUT]
    slots_ptr,  # int32 [R]: the index of each sorted row among the tokens' choices; row slot // SHARE of x, row slot of everything else
    low_ptr,  # float32 [SPLIT, R, RANK]: parts of rows times the adapter's A, with its scale
    lora_b_ptr,  # [E, OUT, RANK]
    blocks_ptr,  # int32 [3, blocks]: expert, first row and number of rows of each block of rows
    blocks,  # number of blocks
    routed,  # R
    out_ptr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    M16: tl.constexpr,  # tiles of 16 rows in a slab
    PARTS: tl.constexpr,  # slabs per kernel instance
    N: tl.constexpr,  # rows per block
    STEP: tl.constexpr,  # tiles of 64 columns per iteration; divides K/64
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,  # the first half of a slab holds even outputs (gates), the second half odd ones (ups)
    GATED: tl.constexpr,  # write the activation, bf16 [R, OUT/2]; else the sums, float32 [DEPTH, R, OUT], to be summed by the caller
    DEPTH: tl.constexpr,  # parts into which columns are divided among instances; divides K/64; 1 if GATED
    SHARE: tl.constexpr,  # routed rows per row of x
    RANK: tl.constexpr,  # of the adapter; 0 for none
    SPLIT: tl.constexpr,  # parts of low
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    cut, block, deep = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.load(blocks_ptr + 2 * blocks + block)
    if rows == 0:
        return
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    n = tl.arange(0, N)
    live = n < rows
    row = tl.load(blocks_ptr + blocks + block) + n
    M: tl.constexpr = 16 * M16
    KT: tl.constexpr = K // COLUMNS
    SLAB: tl.constexpr = KT * M16  # tiles
    HERE: tl.constexpr = KT // DEPTH

    first = (expert * (OUT // M) + cut * PARTS) * SLAB + deep * HERE * M16
    words_at = words_ptr + first * 128 + tl.arange(0, M16)[:, None] * 128 + tl.arange(0, 128)[None, :]
    factors_at = factors_ptr + first * 8 + tl.arange(0, M16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    slot = tl.load(slots_ptr + row, mask=live, other=0)
    x_at = x_ptr + (slot // SHARE).to(tl.int64)[None, :] * K + deep * HERE * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros([M, N], tl.float32),)  # noqa: RUF005 - Triton has no unpacking
    for _ in tl.range(0, HERE, STEP, num_stages=STAGES):
        for j in tl.static_range(STEP):
            x = tl.load(x_at + j * COLUMNS)
            added = ()
            for part in tl.static_range(PARTS):
                tile = part * SLAB + j * M16
                words = tl.load(words_at + tile * 128, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
                factors = tl.load(factors_at + tile * 8, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
                added = added + (dot(_unpack(words, factors, M16), x, sums[part]),)  # noqa: RUF005
            sums = added
        words_at += STEP * M16 * 128
        factors_at += STEP * M16 * 8
        x_at += STEP * COLUMNS

    target = slot.to(tl.int64)
    m = tl.arange(0, M)
    PADDED: tl.constexpr = triton.next_power_of_2(max(RANK, 16))
    r = tl.arange(0, PADDED)
    low = tl.zeros([PADDED, N], tl.float32)
    if RANK > 0:
        for i in tl.static_range(SPLIT):
            low += tl.load(low_ptr + (i * routed + slot)[None, :] * RANK + r[:, None], mask=live[None, :] & (r < RANK)[:, None], other=0.0)
    for part in tl.static_range(PARTS):
        slab = cut * PARTS + part
        if PAIRED:
            out = slab * M + 2 * (m % (M // 2)) + m // (M // 2)
        else:
            out = slab * M + m
        full = sums[part] * UNSHIFT
        if deep == 0:
            full += tl.load(bias_ptr + expert * OUT + out).to(tl.float32)[:, None]
        if RANK > 0 and deep == 0:
            b = tl.load(lora_b_ptr + (expert * OUT + out)[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0)
            full = dot(b.to(tl.bfloat16), low.to(tl.bfloat16), full)
        if GATED:
            gate, up = tl.split(full.reshape(2, M // 2, N).permute(1, 2, 0))
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
            activated = (up + 1.0) * gate / (1.0 + tl.exp(-ALPHA * gate))
            half = slab * (M // 2) + tl.arange(0, M // 2)
            tl.store(out_ptr + target[None, :] * (OUT // 2) + half[:, None], activated.to(tl.bfloat16), mask=live[None, :])
        else:
            tl.store(out_ptr + (deep * routed + target)[None, :] * OUT + out[:, None], full, mask=live[None, :])


@triton.jit
def times_a(
    x_ptr,  # bf16 [rows of x, K]
    lora_a_ptr,  # [E, RANK, K]
    slots_ptr,  # int32 [R], as above
    blocks_ptr,  # int32 [3, blocks]
    blocks,
    routed,
    low_ptr,  # float32 [SPLIT, R, RANK]
    K: tl.constexpr,
    N: tl.constexpr,
    SHARE: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,  # parts of the columns; divides K/64
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """SCALE * x A^T of each routed row with its expert's adapter, in SPLIT parts to be summed by the reader."""
    part, block = tl.program_id(0), tl.program_id(1)
    rows = tl.load(blocks_ptr + 2 * blocks + block)
    if rows == 0:
        return
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    PADDED: tl.constexpr = triton.next_power_of_2(max(RANK, 16))
    WIDTH: tl.constexpr = K // SPLIT
    n, r, k = tl.arange(0, N), tl.arange(0, PADDED), tl.arange(0, COLUMNS)
    live = n < rows
    slot = tl.load(slots_ptr + tl.load(blocks_ptr + blocks + block) + n, mask=live, other=0)
    a_at = lora_a_ptr + (expert * RANK + r)[:, None] * K + part * WIDTH + k[None, :]
    x_at = x_ptr + (slot // SHARE).to(tl.int64)[None, :] * K + part * WIDTH + k[:, None]
    sums = tl.zeros([PADDED, N], tl.float32)
    for _ in tl.range(0, WIDTH, COLUMNS, num_stages=STAGES):
        a = tl.load(a_at, mask=(r < RANK)[:, None], other=0.0)
        sums = dot(a.to(tl.bfloat16), tl.load(x_at), sums)
        a_at += COLUMNS
        x_at += COLUMNS
    tl.store(low_ptr + (part * routed + slot)[None, :] * RANK + r[:, None], sums * SCALE, mask=live[None, :] & (r < RANK)[:, None])
