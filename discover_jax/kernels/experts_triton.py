"""Triton kernels of decoding experts: rows of one expert times its MXFP4 tiles (see mxfp4_tiles), unpacked in registers.

Weights are the tensor cores' left operand and rows of activations, padded to 8 at least, the right one: decoding has few rows an expert, and
the time goes to reading weights. One program computes one slab of outputs for one block of rows; blocks never mix experts, and those
beyond the last used one end at once.
"""

import triton
import triton.language as tl

COLUMNS: tl.constexpr = tl.constexpr(64)
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
UNSHIFT: tl.constexpr = tl.constexpr(float(2**32))  # 2^mxfp4_tiles.SHIFT


@triton.jit
def _halves(pair):
    """Two bfloat16 of a word as float32, lower half first, as a last axis."""
    if INTERPRETED:  # the interpreter makes subnormal bfloat16 zero; the other way it gets them right, with more instructions on a GPU
        return tl.join((pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True))
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).to(tl.float32)


@triton.jit
def _times(pair, factor):
    """Both halves times those of the factor. Exact, so the compiler turns it into one multiplication of packed bfloat16."""
    return (_halves(pair) * _halves(factor)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, sums):
    """sums + a b of bfloat16, summed in float32."""
    if INTERPRETED:  # it takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def _word(word, factor):
    """The eight weights of each word: [..., half, j, i]."""
    factor = (factor & 0xFF) * 0x00800080  # the exponent's field, in both halves
    factor = tl.broadcast_to(factor, word.shape)
    pair0 = _times((word << 6) & 0x81C081C0, factor)
    pair1 = _times((word << 2) & 0x81C081C0, factor)
    pair2 = _times(((word >> 4) | (word << 28)) & 0x81C081C0, factor)
    pair3 = _times((word & 0x81808180) | ((word >> 8) & 0x00400040), factor)
    return tl.join(tl.join(pair0, pair1), tl.join(pair2, pair3))


@triton.jit
def _unpack(words, factors, M16: tl.constexpr):
    """[M16, 128] words and [M16, 8] factors (uint32) to [16 M16, 64] bfloat16.

    All reshaping keeps each value in the lane that loaded it: the result has the layout of the tensor cores' left operand.
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
    source_ptr,  # int32 [R]: the row of x of each routed row, these being sorted by expert
    target_ptr,  # int32 [R]: the row of the output
    weight_ptr,  # float32 [R], if not GATED
    low_ptr,  # float32 [R, RANK]: rows times the adapter's A, with its scale
    lora_b_ptr,  # [E, OUT, RANK]
    blocks_ptr,  # int32 [3, blocks]: expert, first row and number of rows of each block of rows
    blocks,
    out_ptr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    M16: tl.constexpr,  # tiles of 16 rows in a slab
    N: tl.constexpr,  # rows of a block
    STEP: tl.constexpr,  # tiles of 64 columns an iteration; divides K/64
    STAGES: tl.constexpr,
    GATED: tl.constexpr,  # rows of a slab are gates and ups: write act [R, OUT/2]; else write weight * result [R, OUT]
    RANK: tl.constexpr,  # of the adapter, 0 for none
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    slab, block = tl.program_id(0), tl.program_id(1)
    rows = tl.load(blocks_ptr + 2 * blocks + block)
    if rows == 0:
        return
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    n = tl.arange(0, N)
    live = n < rows
    row = tl.load(blocks_ptr + blocks + block) + n
    M: tl.constexpr = 16 * M16
    KT: tl.constexpr = K // COLUMNS

    first = (expert * (OUT // M) + slab) * KT * M16
    words_at = words_ptr + first * 128 + tl.arange(0, M16)[:, None] * 128 + tl.arange(0, 128)[None, :]
    factors_at = factors_ptr + first * 8 + tl.arange(0, M16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    source = tl.load(source_ptr + row, mask=live, other=0)
    x_at = x_ptr + source.to(tl.int64)[None, :] * K + tl.arange(0, COLUMNS)[:, None]
    sums = tl.zeros([M, N], tl.float32)
    for _ in tl.range(0, KT, STEP, num_stages=STAGES):
        for j in tl.static_range(STEP):
            words = tl.load(words_at + j * M16 * 128, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
            factors = tl.load(factors_at + j * M16 * 8, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
            x = tl.load(x_at + j * COLUMNS)
            sums = _dot(_unpack(words, factors, M16), x, sums)
        words_at += STEP * M16 * 128
        factors_at += STEP * M16 * 8
        x_at += STEP * COLUMNS

    m = tl.arange(0, M)
    if GATED:
        out = slab * M + 2 * (m % (M // 2)) + m // (M // 2)
    else:
        out = slab * M + m
    sums = sums * UNSHIFT + tl.load(bias_ptr + expert * OUT + out).to(tl.float32)[:, None]
    if RANK > 0:
        PADDED: tl.constexpr = RANK if RANK > 16 else 16
        r = tl.arange(0, PADDED)
        b = tl.load(lora_b_ptr + (expert * OUT + out)[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0)
        low = tl.load(low_ptr + row[None, :] * RANK + r[:, None], mask=live[None, :] & (r < RANK)[:, None], other=0.0)
        sums = _dot(b.to(tl.bfloat16), low.to(tl.bfloat16), sums)
    target = tl.load(target_ptr + row, mask=live, other=0).to(tl.int64)
    if GATED:
        gate, up = tl.split(sums.reshape(2, M // 2, N).permute(1, 2, 0))
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        activated = (up + 1.0) * gate / (1.0 + tl.exp(-ALPHA * gate))
        half = slab * (M // 2) + tl.arange(0, M // 2)
        tl.store(out_ptr + target[None, :] * (OUT // 2) + half[:, None], activated.to(tl.bfloat16), mask=live[None, :])
    else:
        weight = tl.load(weight_ptr + row, mask=live, other=0.0)
        tl.store(out_ptr + target[None, :] * OUT + out[:, None], sums * weight[None, :], mask=live[None, :])


@triton.jit
def times_a(
    x_ptr,  # bf16 [rows of x, K]
    lora_a_ptr,  # [E, RANK, K]
    source_ptr,  # int32 [R]
    blocks_ptr,  # int32 [3, blocks]
    blocks,
    low_ptr,  # float32 [R, RANK]
    K: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,  # columns an iteration, a power of two
    STAGES: tl.constexpr,
    RANK: tl.constexpr,
    SCALE: tl.constexpr,
):
    """SCALE * x A^T of each routed row with its expert's adapter."""
    block = tl.program_id(0)
    rows = tl.load(blocks_ptr + 2 * blocks + block)
    if rows == 0:
        return
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    PADDED: tl.constexpr = RANK if RANK > 16 else 16
    n, r, k = tl.arange(0, N), tl.arange(0, PADDED), tl.arange(0, STEP)
    live = n < rows
    row = tl.load(blocks_ptr + blocks + block) + n
    source = tl.load(source_ptr + row, mask=live, other=0).to(tl.int64)
    sums = tl.zeros([PADDED, N], tl.float32)
    for start in tl.range(0, K, STEP, num_stages=STAGES):
        inside = start + k < K
        a = tl.load(
            lora_a_ptr + (expert * RANK + r)[:, None] * K + (start + k)[None, :], mask=(r < RANK)[:, None] & inside[None, :], other=0.0
        )
        x = tl.load(x_ptr + source[None, :] * K + (start + k)[:, None], mask=live[None, :] & inside[:, None], other=0.0)
        sums = _dot(a.to(tl.bfloat16), x, sums)
    tl.store(low_ptr + row[None, :] * RANK + r[:, None], sums * SCALE, mask=live[None, :] & (r < RANK)[:, None])
