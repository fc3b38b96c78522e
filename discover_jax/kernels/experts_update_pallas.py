"""Pallas kernels for TPUs of the update's experts: unpacking of MXFP4, and grouped products of rows sorted by expert.

Rows lie in blocks that each belong to one expert (see expert_rows). Every block is whole: rows that fill it up are padding, which the
caller masks. A grid step computes one block of rows times some columns of its expert's matrix, over the whole contracted axis. Blocks of an
expert follow each other, so its matrix is read once. Blocks without rows cost a step and are written as zeros, without a product.

Dimensions: E experts, P rows of all blocks, b blocks, K contracted axis, N columns, r rank of an adapter.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.dot_pallas import dot
from discover_jax.kernels.experts import activate
from discover_jax.kernels.experts_decode_pallas import exponents_of
from discover_jax.kernels.experts_decode_pallas import unpack as unpack_words
from discover_jax.kernels.mxfp4_lanes import INPUTS
from discover_jax.kernels.parts_pallas import VECTOR_MEMORY

MXFP4 = 32
"""Weights that share a scale."""
PART = 18
"""Most scales of a column that are unpacked at once."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How rows and columns are cut.

    Attributes:
      rows: rows of a block; on a TPU a multiple of 16.
      columns: columns of a matrix that a grid step computes; on a TPU a multiple of 128.
      blocks: blocks whose rows are in memory at once.
      interpret: as for `pallas_call`: False on a TPU; True, or `pltpu.InterpretParams`, elsewhere.
    """

    rows: int = 512
    columns: int = 512
    blocks: int = 32
    interpret: Any = False


class Owners(NamedTuple):
    """Of each block: its expert, and its number of rows that are not padding. int32 [b]; blocks of an expert are adjacent."""

    experts_b: jax.Array
    rows_b: jax.Array


def unpack(packed: jax.Array, scales: jax.Array, tiles: Tiles) -> jax.Array:
    """MXFP4 as bfloat16 [E, K, N], exact for weights that are not below 2^-126, which become 0.

    Args:
      packed: uint8 [E, K/2, N]. Two weights that are adjacent along K share a byte, the even one in its low nibble.
      scales: uint8 [E, K/32, N].
      tiles: its columns are unpacked at once.
    """
    experts, groups, width = scales.shape
    parts = next(parts for parts in range(1, groups + 1) if groups % parts == 0 and groups // parts <= PART)
    each, columns = groups // parts, min(tiles.columns, width)

    def spec(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, columns), lambda e, n, k: (e, k, 0, n))

    out = pl.pallas_call(
        _unpack,
        grid=(experts, pl.cdiv(width, columns), parts),
        in_specs=[spec(each * MXFP4 // 2), spec(each)],
        out_specs=spec(each * MXFP4),
        out_shape=jax.ShapeDtypeStruct((experts, parts, each * MXFP4, width), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=tiles.interpret,
        name="experts_unpack",
    )(packed.reshape(experts, parts, -1, width), scales.reshape(experts, parts, each, width))
    return out.reshape(experts, groups * MXFP4, width)


def _unpack(packed: Any, scales: Any, out: Any) -> None:
    bytes_hn, scales_gn = packed[...].astype(jnp.int32), scales[...].astype(jnp.int32)
    powers_gn = lax.bitcast_convert_type(scales_gn << 23, jnp.float32)  # 2^(scale - 127)

    def bits(nibbles_hn: jax.Array) -> jax.Array:
        """The bits of these nibbles' weights in float32. The upper half is the weight in bfloat16, and the lower half is 0."""
        code = nibbles_hn & 7
        doubled = jnp.where(code < 4, code, (2 | (code & 1)) << ((code >> 1) - 1))  # 0, 1, 2, 3, 4, 6, 8, 12
        values_hn = jnp.where(nibbles_hn < 8, 0.5, -0.5) * doubled.astype(jnp.float32)
        scaled = values_hn.reshape(scales_gn.shape[0], MXFP4 // 2, -1) * powers_gn[:, None]
        return lax.bitcast_convert_type(scaled.reshape(values_hn.shape), jnp.int32)

    # A TPU holds two adjacent rows of bfloat16 in the halves of a word, the even row in the lower one. So the weights of a byte are a word.
    words_hn = lax.shift_right_logical(bits(bytes_hn & 15), jnp.full_like(bytes_hn, 16)) | (bits(bytes_hn >> 4) & -(1 << 16))
    out[...] = pltpu.bitcast(words_hn, jnp.bfloat16)


def unpack_lanes(lanes: jax.Array, powers: jax.Array, part: int, width: int, tiles: Tiles) -> jax.Array:
    """`unpack` for one part of a matrix in the layout of mxfp4_lanes: bfloat16 [E, K, N], exact.

    Args:
      lanes, powers: words int32 [E, parts, pieces, K/pieces/8, N padded] and scales uint8 [E, parts, pieces, s, N padded].
      part: 0 for gates, 1 for ups; 0 if there is one part.
      width: N.
      tiles: its columns are unpacked at once.
    """
    (experts, _, pieces, rows, _), columns = lanes.shape, min(tiles.columns, lanes.shape[4])

    def spec(height: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, height, columns), lambda e, n, k: (e, part, k, 0, n))

    return pl.pallas_call(
        _unpack_lanes,
        grid=(experts, pl.cdiv(width, columns), pieces),
        in_specs=[spec(rows), spec(powers.shape[3])],
        out_specs=pl.BlockSpec((None, None, 8 * rows, columns), lambda e, n, k: (e, k, 0, n)),
        out_shape=jax.ShapeDtypeStruct((experts, pieces, 8 * rows, width), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=tiles.interpret,
        name="experts_unpack",
    )(lanes, powers).reshape(experts, pieces * 8 * rows, width)


def _unpack_lanes(words: Any, powers: Any, out: Any) -> None:
    exponents_sn = exponents_of(powers[...])
    for group in range(words.shape[0] // 8):
        first, second = (jnp.broadcast_to(exponents_sn[s : s + 1], (8, words.shape[1])) for s in (2 * group, 2 * group + 1))
        out[INPUTS * group : INPUTS * (group + 1), :] = unpack_words(words[8 * group : 8 * (group + 1), :], first, second)


def grouped(
    factors: Sequence[tuple[jax.Array, jax.Array]],
    owners: Owners,
    tiles: Tiles,
    *,
    transposed: bool = False,
    bias: jax.Array | None = None,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    weights_P1: jax.Array | None = None,
) -> jax.Array:
    """Rows times their expert's matrix, summed over `factors`: float32 [P, N]. Zero in blocks without rows.

    Args:
      factors: rows [P, K], and matrices [E, K, N], or [E, N, K] if `transposed`.
      owners: of the blocks of rows.
      tiles: the tiles.
      bias: float32 [E, N].
      adapter: rows [P, r] and matrices [E, r, N], whose product is added.
      weights_P1: float32, by which the rows of the result are multiplied.
    """
    width = factors[0][1].shape[1 if transposed else 2]
    call = _Call(tiles, owners, min(tiles.columns, width))
    for x_PK, matrix in factors:
        call.rows(x_PK)
        call.matrix(matrix, transposed=transposed)
    if weights_P1 is not None:
        call.rows(weights_P1)
    call.optional(bias, adapter)
    options = {"factors": len(factors), "transposed": transposed, "biased": bias is not None, "weighted": weights_P1 is not None}
    return call(functools.partial(_grouped, **options), "experts_grouped", width, [jnp.float32])[0]


def _grouped(_experts, rows_b, *refs: Any, factors: int, transposed: bool, biased: bool, weighted: bool) -> None:
    *inputs, out = refs
    weights, inputs = (inputs[2 * factors], inputs[: 2 * factors] + inputs[2 * factors + 1 :]) if weighted else (None, inputs)

    @pl.when(rows_b[pl.program_id(1)] > 0)
    def _() -> None:
        sums, more = _optional(inputs[2 * factors :], biased=biased), inputs[: 2 * factors]
        for x, matrix in zip(more[0::2], more[1::2], strict=True):
            sums += dot(x[...], matrix[...].astype(x.dtype), (1, 1) if transposed else (1, 0))
        out[...] = sums if weights is None else weights[...] * sums

    @pl.when(rows_b[pl.program_id(1)] == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)


def _optional(refs: Sequence[Any], *, biased: bool) -> Any:
    """The sum of the bias and the adapter's product. Either may be missing; without both, it is 0."""
    sums: Any = refs[0][...] if biased else 0.0
    if low := refs[1 if biased else 0 :]:
        sums += dot(low[0][...], low[1][...])
    return sums


def activation(
    x_PK: jax.Array,
    halves: Sequence[tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]],
    owners: Owners,
    tiles: Tiles,
    *,
    limit: float,
    alpha: float,
) -> list[jax.Array]:
    """The activation (see kernels.experts.gated) of the rows' gates and ups, and these gates and ups: three of [P, N] in the rows' dtype.

    Args:
      x_PK: rows.
      halves: of gates and of ups: matrix [E, K, N], bias float32 [E, N], and adapter as for `grouped`.
      owners, tiles: as for `grouped`.
      limit, alpha: of the activation.
    """
    width = halves[0][0].shape[2]
    call = _Call(tiles, owners, min(tiles.columns, width))
    call.rows(x_PK)
    for matrix, bias, adapter in halves:
        call.matrix(matrix, transposed=False)
        call.optional(bias, adapter)
    kernel = functools.partial(_activation, limit=limit, alpha=alpha)
    return call(kernel, "experts_activation", width, [x_PK.dtype] * 3)


def _activation(_experts, rows_b, x, *refs: Any, limit: float, alpha: float) -> None:
    (*inputs, active, gates, ups), half = refs, (len(refs) - 3) // 2

    @pl.when(rows_b[pl.program_id(1)] > 0)
    def _() -> None:
        gate, up = (_optional(own[1:], biased=True) + dot(x[...], own[0][...].astype(x.dtype)) for own in (inputs[:half], inputs[half:]))
        gates[...], ups[...] = gate.astype(gates.dtype), up.astype(ups.dtype)
        active[...] = activate(gate, up, limit=limit, alpha=alpha).astype(active.dtype)

    @pl.when(rows_b[pl.program_id(1)] == 0)
    def _() -> None:
        for out in (active, gates, ups):
            out[...] = jnp.zeros_like(out)


def activation_gradient(
    d_PK: jax.Array,
    matrix: jax.Array,
    forward: Sequence[jax.Array],
    weights_P1: jax.Array,
    owners: Owners,
    tiles: Tiles,
    *,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    limit: float,
    alpha: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of gates and ups, [P, N] in the rows' dtype, and of the rows' weights but for the bias, float32 [P].

    Args:
      d_PK: gradient of the output, for weights of 1.
      matrix: of the output, [E, N, K].
      forward: `activation`'s results.
      weights_P1: float32 weights of the rows' outputs.
      owners, tiles, adapter: as for `grouped`.
      limit, alpha: of the activation.
    """
    width = matrix.shape[1]
    call = _Call(tiles, owners, min(tiles.columns, width))
    call.rows(d_PK)
    call.matrix(matrix, transposed=True)
    for x_PN in forward:
        call.columns(x_PN)
    call.rows(weights_P1)
    call.optional(None, adapter)
    kernel = functools.partial(_activation_gradient, width=width, limit=limit, alpha=alpha)
    d_gates, d_ups, parts_nP1 = call(kernel, "experts_gradient", width, [d_PK.dtype] * 2, row_sums=True)
    return d_gates, d_ups, parts_nP1.sum(axis=(0, 2))


def _activation_gradient(
    _experts, rows_b, d, matrix, active, gates, ups, weights, *refs: Any, width: int, limit: float, alpha: float
) -> None:
    (*low, d_gates, d_ups, part), first = refs, pl.program_id(0) * active.shape[1]

    @pl.when(rows_b[pl.program_id(1)] > 0)
    def _() -> None:
        sums = dot(d[...], matrix[...].astype(d.dtype), (1, 1)) + _optional(low, biased=False)
        d_active = sums.astype(d.dtype).astype(jnp.float32)
        columns = first + lax.broadcasted_iota(jnp.int32, active.shape, 1)
        of_columns = jnp.where(columns < width, d_active * active[...].astype(jnp.float32), 0.0)
        part[...] = of_columns.sum(axis=1, keepdims=True)
        _, pull = jax.vjp(
            functools.partial(activate, limit=limit, alpha=alpha), gates[...].astype(jnp.float32), ups[...].astype(jnp.float32)
        )
        gradients = pull(weights[...] * d_active)
        d_gates[...], d_ups[...] = (gradient.astype(d_gates.dtype) for gradient in gradients)

    @pl.when(rows_b[pl.program_id(1)] == 0)
    def _() -> None:
        for out in (d_gates, d_ups, part):
            out[...] = jnp.zeros_like(out)


class _Call:
    """Collects the arguments of a kernel whose grid is (columns, blocks)."""

    def __init__(self, tiles: Tiles, owners: Owners, columns: int) -> None:
        self._tiles, self._owners, self._columns = tiles, owners, columns
        self._specs: list[pl.BlockSpec] = []
        self._arrays: list[jax.Array] = []

    def _add(self, array: jax.Array, shape: tuple[int | None, ...], at: Callable[[Any, Any, Any], tuple[Any, ...]]) -> None:
        self._arrays.append(array)
        self._specs.append(pl.BlockSpec(shape, lambda n, b, experts, _rows: at(n, b, experts[b])))

    def rows(self, x_PK: jax.Array) -> None:
        self._add(x_PK, (self._tiles.rows, x_PK.shape[1]), lambda _n, b, _e: (b, 0))

    def columns(self, x_PN: jax.Array) -> None:
        self._add(x_PN, (self._tiles.rows, self._columns), lambda n, b, _e: (b, n))

    def matrix(self, matrix: jax.Array, *, transposed: bool) -> None:
        if transposed:
            self._add(matrix, (None, self._columns, matrix.shape[2]), lambda n, _b, e: (e, n, 0))
        else:
            self._add(matrix, (None, matrix.shape[1], self._columns), lambda n, _b, e: (e, 0, n))

    def optional(self, bias: jax.Array | None, adapter: tuple[jax.Array, jax.Array] | None) -> None:
        if bias is not None:
            self.matrix(bias[:, None], transposed=False)
        if adapter is not None:
            self.rows(adapter[0])
            self.matrix(adapter[1], transposed=False)

    def __call__(self, kernel: Callable, name: str, width: int, dtypes: Sequence[Any], *, row_sums: bool = False) -> list[jax.Array]:
        """`row_sums`: also float32 [n, P, 1], of each row and block of columns."""
        blocks, rows, columns = self._owners.rows_b.shape[0], self._tiles.rows, pl.cdiv(width, self._columns)
        shapes = [jax.ShapeDtypeStruct((blocks * rows, width), dtype) for dtype in dtypes]
        specs = [pl.BlockSpec((rows, self._columns), lambda n, b, *_: (b, n))] * len(dtypes)
        if row_sums:
            shapes.append(jax.ShapeDtypeStruct((columns, blocks * rows, 1), jnp.float32))
            specs.append(pl.BlockSpec((None, rows, 1), lambda n, b, *_: (n, b, 0)))
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(columns, blocks),
                in_specs=self._specs,
                out_specs=specs,
            ),
            # A v5p chip splits the columns over its two cores, or the blocks if there is one block of columns.
            compiler_params=_params("parallel", "arbitrary" if width > self._columns else "parallel"),
            interpret=self._tiles.interpret,
            name=name,
        )(*self._owners, *self._arrays)


def _params(*semantics: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VECTOR_MEMORY)


OUTER_COLUMNS = 3
"""Columns that a grid step of `outer` computes, over those of other products: it has few rows, so small blocks cost mostly their start."""


def outer(v_Pr: jax.Array, u_PN: jax.Array, experts: int, owners: Owners, tiles: Tiles) -> jax.Array:
    """For each expert the sum over its rows of v u^T: float32 [E, r, N], zero for experts without rows. Rows of padding must be 0 in v."""
    (rank, width), blocks = (v_Pr.shape[1], u_PN.shape[1]), owners.rows_b.shape[0]
    columns = min(OUTER_COLUMNS * tiles.columns, width)
    sums = pl.pallas_call(
        _outer,
        out_shape=jax.ShapeDtypeStruct((experts, rank, width), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(width, columns), blocks),
            in_specs=[
                pl.BlockSpec((rank, tiles.rows), lambda n, b, *_: (0, b)),
                pl.BlockSpec((tiles.rows, columns), lambda n, b, *_: (b, n)),
            ],
            out_specs=pl.BlockSpec((None, rank, columns), lambda n, b, experts_b, _: (experts_b[b], 0, n)),
        ),
        compiler_params=_params("parallel", "arbitrary"),
        interpret=tiles.interpret,
        name="experts_outer",
    )(*owners, v_Pr.astype(u_PN.dtype).T, u_PN)
    written_E = jnp.any((owners.experts_b == jnp.arange(experts)[:, None]) & (owners.rows_b > 0), axis=1)
    return jnp.where(written_E[:, None, None], sums, 0)


def _outer(experts_b, rows_b, v_rP, u_PN, sums_rN) -> None:
    b = pl.program_id(1)

    @pl.when((b == 0) | (experts_b[b] != experts_b[jnp.maximum(b - 1, 0)]))
    def _() -> None:
        sums_rN[...] = jnp.zeros_like(sums_rN)

    @pl.when(rows_b[b] > 0)
    def _() -> None:
        sums_rN[...] += dot(v_rP[...], u_PN[...])
