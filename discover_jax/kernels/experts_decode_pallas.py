"""A Pallas kernel for TPUs of decoding experts: rows sorted by expert times its packed MXFP4 (see mxfp4_lanes), unpacked tile by tile.

One step of the grid reads one piece of one expert's matrices from HBM while the step before computes. First come the pieces of gate and
up, then those of down. A block of rows belongs to one expert, and steps without rows read nothing. Rows are taken from the tokens and
added to the outputs in the chip's memory. So neither sorted rows nor activations are written to HBM. Experts are added in their order, as
in the reference. Sums are float32, and the activation is rounded to the tokens' dtype. The first axis of the grid is for chips with two
cores: each has half of the blocks and its own output.

Dimensions: S steps of blocks, T tokens, R routed rows, D width, F expert width, c pieces of a matrix's inputs, i chunks of its inputs,
w inputs of a chunk, N and M the padded F and D, r rank.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.dot_pallas import dot
from discover_jax.kernels.expert_steps_tpu import FIRST, ROWS, STACK, TOKEN
from discover_jax.kernels.experts import activate
from discover_jax.kernels.mxfp4_lanes import INPUTS, LANES

CORES = 2
MASK = 0x81C081C0 - (1 << 32)
_TILE = 512
"""Outputs that are unpacked together."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of the kernel.

    Attributes:
      rows: rows of a block.
      limit, alpha: of the activation, see kernels.experts.gated.
      scales: alpha / rank of both adapters; None without adapters.
      memory: limit on a core's vector memory, bytes.
      interpret: as for `pallas_call`.
    """

    rows: int
    limit: float
    alpha: float
    scales: tuple[float, float] | None = None
    memory: int = 100 * 2**20
    interpret: Any = False


def exponents_of(powers: jax.Array) -> jax.Array:
    """(scale - 1) << 7 in both halves of int32, for scales uint8."""
    exponents = (powers.astype(jnp.int32) - 1) << 7
    return exponents | exponents << 16


def unpack(words: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """[8, n] words to [64, n] bfloat16. `first`, `second`: int32 [8, n] or [1, n], the `exponents_of` the scales of 32 inputs each."""
    pairs = [
        (words << 6) & MASK,
        (words << 2) & MASK,
        (lax.shift_right_logical(words, 4) | (words << 28)) & MASK,
        (words & (0x81808180 - (1 << 32))) | ((words >> 8) & 0x00400040),
    ]
    return jnp.concatenate([_scale(pair, first if i < 2 else second) for i, pair in enumerate(pairs)], axis=0)


def _scale(pair: jax.Array, factor: jax.Array) -> jax.Array:
    """[8, n] pairs to [16, n] bfloat16. The code with the lowest magnitude bit alone is zero; there is no negative zero."""
    codes, bits = pltpu.bitcast(pair, jnp.int16), pltpu.bitcast(pair + factor, jnp.int16)
    return pltpu.bitcast(jnp.where(codes == 0x0040, jnp.int16(0), bits), jnp.bfloat16)


def _row(factors_nsl: Any, row: jax.Array, at: slice, interpret: Any) -> jax.Array:
    """A row of factors in all sublanes, [8, n]. A load with stride 0 costs no vector operation, unlike a broadcast."""

    def tile(number: int) -> jax.Array:
        if interpret:  # Pallas does not interpret such loads
            return jnp.broadcast_to(factors_nsl[number, pl.ds(row, 1)], (8, LANES))
        return factors_nsl[number, pl.ds(row, 8, stride=0)]

    return jnp.concatenate([tile(number) for number in range(at.start // LANES, at.stop // LANES)], axis=1)


def _multiply(
    x_iRw: Any, first: Any, words_pKN: Any, powers_psN: Any, factors_nsl: Any, sums_pRN: Any, dtype: Any, interpret: Any = False
) -> None:
    """Adds to the sums the product of all rows and one piece of a matrix. `first`: the first of the piece's chunks."""
    parts, height, width = words_pKN.shape
    groups = x_iRw.shape[2] // INPUTS
    for part in range(parts):
        for tile in range(width // LANES):
            factors_nsl[tile] = exponents_of(powers_psN[part, :, tile * LANES : (tile + 1) * LANES])

        def add(i: jax.Array, _: None, part: int = part) -> None:
            x_Rw = x_iRw[first + i].astype(dtype)
            for begin in range(0, width, _TILE):
                at = slice(begin, min(begin + _TILE, width))
                tiles = []
                for group in range(groups):
                    g = i * groups + group
                    words = words_pKN[part, pl.ds(pl.multiple_of(8 * g, 8), 8), at]
                    tiles.append(unpack(words, *(_row(factors_nsl, 2 * g + n, at, interpret) for n in range(2))))
                sums_pRN[part, :, at] += dot(x_Rw, jnp.concatenate(tiles, axis=0).astype(dtype))

        lax.fori_loop(0, height // (8 * groups), add, None)


def _adapt(x_iRw: Any, a_irw: Any, b_prN: Any, sums_pRN: Any, scale: float, dtype: Any) -> None:
    """Adds the adapter's product, rounded between its two products as in the reference."""
    low = sum((dot(x_iRw[i].astype(dtype), a_irw[i].astype(dtype), (1, 1)) for i in range(x_iRw.shape[0])), jnp.float32(0))
    for part in range(sums_pRN.shape[0]):
        sums_pRN[part] += dot((scale * low).astype(dtype), b_prN[part].astype(dtype))


def _kernel(
    table, weights_1R, x_TD, gate_up, gate_up_powers, gate_up_bias, down, down_powers, down_bias,
    *rest, pieces: tuple[int, int], settings: Settings,
) -> None:  # fmt: skip
    *adapters, out_TM, x_iTw, x_iRw, y_iRw, h_pRN, sum_pRM, factors_nsl, factors_msl = rest
    dtype = x_TD.dtype
    step, j, (ups, downs) = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1), pl.program_id(2), pieces
    first, rows = table[FIRST, step], table[ROWS, step]

    @pl.when((pl.program_id(1) == 0) & (j == 0))
    def _() -> None:
        out_TM[...] = jnp.zeros_like(out_TM)
        for i in range(x_iTw.shape[0]):  # XLA would need several passes over the tokens
            x_iTw[i] = x_TD[:, i * x_iTw.shape[2] : (i + 1) * x_iTw.shape[2]].astype(jnp.float32)

    @pl.when((rows > 0) & (j == 0))
    def _() -> None:
        h_pRN[...], sum_pRM[...] = jnp.zeros_like(h_pRN), jnp.zeros_like(sum_pRM)

        def take(row: jax.Array, _: None) -> None:
            token = table[TOKEN, first + row]
            for i in range(x_iTw.shape[0]):
                x_iRw[i, pl.ds(row, 1)] = x_iTw[i, pl.ds(token, 1)]

        lax.fori_loop(0, rows, take, None)

    @pl.when((rows > 0) & (j < ups))
    def _() -> None:
        _multiply(x_iRw, j * (x_iRw.shape[0] // ups), gate_up, gate_up_powers, factors_nsl, h_pRN, dtype, settings.interpret)

    @pl.when((rows > 0) & (j == ups - 1))
    def _() -> None:
        if settings.scales is not None:
            _adapt(x_iRw, adapters[0], adapters[1], h_pRN, settings.scales[0], dtype)
        gate, up = h_pRN[0] + gate_up_bias[0:1], h_pRN[1] + gate_up_bias[1:2]
        y = activate(gate, up, limit=settings.limit, alpha=settings.alpha).astype(dtype).astype(jnp.float32)
        for i in range(y_iRw.shape[0]):
            y_iRw[i] = y[:, i * y_iRw.shape[2] : (i + 1) * y_iRw.shape[2]]

    @pl.when((rows > 0) & (j >= ups))
    def _() -> None:
        _multiply(y_iRw, (j - ups) * (y_iRw.shape[0] // downs), down, down_powers, factors_msl, sum_pRM, dtype, settings.interpret)

    @pl.when((rows > 0) & (j == ups + downs - 1))
    def _() -> None:
        if settings.scales is not None:
            _adapt(y_iRw, adapters[2], adapters[3], sum_pRM, settings.scales[1], dtype)
        sum_pRM[0] += down_bias[...]

        def give(row: jax.Array, _: None) -> None:
            at = pl.ds(table[TOKEN, first + row], 1)
            out_TM[at] += weights_1R[0, first + row] * sum_pRM[0, pl.ds(row, 1)]

        lax.fori_loop(0, rows, give, None)


def _matrix_spec(shape: tuple[int, ...], begin: int) -> pl.BlockSpec:
    """One piece of an expert's words or scales [stack, parts, pieces, rows, N] per step.

    `begin`: the step of the first piece. Steps outside of the matrix's own keep the piece next to them, so that they read nothing: before
    them the last piece of the block before, after them the last piece. Steps without rows repeat the last piece of the last block.
    """
    _, parts, pieces, rows, width = shape

    def at(core: Any, s: Any, j: Any, table: Any, weights_1R: Any) -> tuple:
        del weights_1R
        step = core * pl.num_programs(1) + s
        early = (j < begin) & (s > 0)
        piece = jnp.where((table[ROWS, step] == 0) | early, pieces - 1, jnp.clip(j - begin, 0, pieces - 1))
        return table[STACK, jnp.where(early, step - 1, step)], 0, piece, 0, 0

    return pl.BlockSpec((None, parts, None, rows, width), at)


def _expert_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
    """An expert's slice of a stack of small arrays [stack, ...]."""
    return pl.BlockSpec(
        (None, *shape[1:]), lambda core, s, j, table, weights_1R: (table[STACK, core * pl.num_programs(1) + s],) + (0,) * (len(shape) - 1)
    )


def multiply(
    steps: int,
    order: tuple[jax.Array, jax.Array],
    x_TD: jax.Array,
    gate_up: tuple[jax.Array, ...],
    down: tuple[jax.Array, ...],
    chunks: tuple[int, int],
    settings: Settings,
) -> jax.Array:
    """The sum over routed rows of weight * down(act(gate_up(x))): float32 [CORES, T, M], to be summed over the first axis.

    Args:
      steps: blocks, a multiple of CORES, in the order of the grid.
      order: table and weights of the sorted rows, see expert_steps_tpu.
      x_TD: the tokens' inputs, bfloat16 or float32, which is also the type of the products' inputs. More columns may follow.
      gate_up, down: of a stack of experts: words and scales (see mxfp4_lanes); bias float32 [stack, 2, N], [stack, 1, M]; with adapters
        also A [stack, i, r, w] and B [stack, parts, r, N or M].
      chunks: inputs of a chunk of `gate_up` and of `down`.
      settings: constants.
    """
    (tokens, width), lanes, out = x_TD.shape, gate_up[0].shape[-1], down[0].shape[-1]
    count, wide = gate_up[0].shape[2] * gate_up[0].shape[3] * 8 // chunks[0], chunks[0]
    ups, downs, inputs = gate_up[0].shape[2], down[0].shape[2], down[0].shape[2] * down[0].shape[3] * 8
    rows = settings.rows
    of = {"gate_up": gate_up, "down": down}
    specs = [pl.BlockSpec((tokens, width), lambda *_: (0, 0), pipeline_mode=pl.Buffered(1))]
    for matrix, begin in ((of["gate_up"], 0), (of["down"], ups)):
        specs += [_matrix_spec(matrix[0].shape, begin), _matrix_spec(matrix[1].shape, begin), _expert_spec(matrix[2].shape)]
    adapters = [*gate_up[3:], *down[3:]]
    scratch = [(count, tokens, wide), (count, rows, wide), (inputs // chunks[1], rows, chunks[1]), (2, rows, lanes), (1, rows, out)]
    factors = [pltpu.VMEM((matrix[1].shape[4] // LANES, matrix[1].shape[3], LANES), jnp.int32) for matrix in (gate_up, down)]
    return pl.pallas_call(
        functools.partial(_kernel, pieces=(ups, downs), settings=settings),
        out_shape=jax.ShapeDtypeStruct((CORES, tokens, out), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(order),
            grid=(CORES, steps // CORES, ups + downs),
            in_specs=[*specs, *(_expert_spec(array.shape) for array in adapters)],
            out_specs=pl.BlockSpec((None, tokens, out), lambda core, *_: (core, 0, 0)),
            scratch_shapes=[*(pltpu.VMEM(shape, jnp.float32) for shape in scratch), *factors],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=settings.memory),
        interpret=settings.interpret,
        name="experts_decode",
    )(*order, x_TD, *gate_up[:3], *down[:3], *adapters)
