"""A Pallas kernel for TPUs that sorts the rows of decoding experts: the steps of `experts_decode_pallas` in one operation.

In plain JAX (`experts_decode_tpu.steps_of`), XLA needs 25 small operations in each layer, of 26 us by its own estimate. The kernel was
compiled for TPUs and interpreted on a CPU. No TPU has run it.

Dimensions: R choices, padded to whole lanes; E experts; S steps, padded to whole lanes. [n, 1] arrays are along the sublanes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.expert_rows import most_blocks
from discover_jax.kernels.parts_pallas import scalar, whole

LANES = 128
EXPERT, FIRST, ROWS, STACK, TOKEN = range(5)
"""Lines of the table: of each step, its expert, first row, number of rows, and place in the stacks; of each sorted row, its token."""
_LINES = 8


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES


def table_width(choices: int, steps: int) -> int:
    """Columns of the table."""
    return max(_padded(choices), _padded(steps))


def table_of(steps: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """The kernel's results from those of `experts_decode_tpu.steps_of`."""
    expert_S, first_S, rows_S, tokens_R, weights_R, stack_S = steps
    width = table_width(tokens_R.size, expert_S.size)
    lines = (jnp.pad(line, (0, width - line.size)) for line in (expert_S, first_S, rows_S, stack_S, tokens_R))
    table = jnp.pad(jnp.stack(list(lines)), ((0, _LINES - 5), (0, 0)))
    return table, jnp.pad(weights_R, (0, _padded(weights_R.size) - weights_R.size))[None]


# ---------------------------------------------------------------------- choices next to the tokens' inputs

_PIECES = 3
"""Numbers with 8 significant bits whose sum is a float32."""


def packed_column(width: int) -> int:
    """The column at which a token's choices begin, after its `width` inputs."""
    return _padded(width)


def put_choices(index_T1: Sequence[jax.Array], weights_T1: Sequence[jax.Array]) -> jax.Array:
    """Each token's X experts and their weights, as exact sums of numbers that bfloat16 holds: float32 [T, LANES].

    So devices send them along with the tokens' inputs, in one collective. May be called in a kernel.

    Args:
      index_T1: int32 [T, 1], of each choice the number of the expert, below 2^16.
      weights_T1: float32 [T, 1].
    """
    lines = [*(index & 255 for index in index_T1), *(index >> 8 for index in index_T1)]
    rest, pieces = list(weights_T1), []
    for _ in range(_PIECES):
        heads = [_without_low_bits(weight) for weight in rest]
        rest = [weight - head for weight, head in zip(rest, heads, strict=True)]
        pieces += heads
    lines = [*(line.astype(jnp.float32) for line in lines), *pieces]
    assert len(lines) <= LANES, "the choices of a token fit the lanes"
    lane_TL = lax.broadcasted_iota(jnp.int32, (lines[0].shape[0], LANES), 1)
    out_TL = jnp.zeros(lane_TL.shape, jnp.float32)
    for lane, line in enumerate(lines):
        out_TL = jnp.where(lane_TL == lane, line, out_TL)
    return out_TL


def _without_low_bits(x: jax.Array) -> jax.Array:
    """A float32 cut to a bfloat16. A conversion would round, and compilers may leave out its way back."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16)), jnp.float32)


def take_choices(choices_TL: jax.Array, share: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """The inverse of `put_choices` for `share` experts per token. May be called in a kernel."""
    column = [choices_TL[:, lane : lane + 1].astype(jnp.float32) for lane in range((2 + _PIECES) * share)]
    index = [(column[x] + 256 * column[share + x]).astype(jnp.int32) for x in range(share)]
    pieces = [column[(2 + piece) * share : (3 + piece) * share] for piece in range(_PIECES)]
    return index, [first + (second + third) for first, second, third in zip(*pieces, strict=True)]


# ---------------------------------------------------------------------- kernel


def _ones(condition: jax.Array) -> jax.Array:
    return jnp.where(condition, 1, 0)


def _count(condition: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(_ones(condition), axis=axis, keepdims=True)


def _kernel(
    layer_1: Any, first_1: Any, choices_TL: Any, table: Any, sorted_1R: Any, sums_RL: Any, index_1R: Any, columns: Any,
    *, experts: int, share: int, rows: int, steps: int, cores: int,
) -> None:  # fmt: skip
    """`columns`: of each choice its expert, place and weight. `sums_RL`: for sums over lanes. `steps`: those of a core."""
    choices, tokens = sums_RL.shape[0], choices_TL.shape[0]
    number_R1 = lax.broadcasted_iota(jnp.int32, (choices, 1), 0)
    lane_1L = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    index_R1, place_R1, weights_R1 = columns
    index_R1[...], weights_R1[...] = jnp.full_like(index_R1, experts + 1), jnp.zeros_like(weights_R1)  # padding is after all choices
    for x, (index_T1, weights_T1) in enumerate(zip(*take_choices(choices_TL[...], share), strict=True)):
        own_T1 = index_T1 - first_1[0]
        index_R1[x * tokens : (x + 1) * tokens] = jnp.where((own_T1 >= 0) & (own_T1 < experts), own_T1, experts)
        weights_R1[x * tokens : (x + 1) * tokens] = weights_T1

    def over(body: Callable[[Any, jax.Array], None]) -> None:
        """Calls `body` with the choices of each register, and their numbers."""
        lax.fori_loop(0, choices // LANES, lambda c, _: body(pl.ds(pl.multiple_of(c * LANES, LANES), LANES), c * LANES + lane_1L), None)

    def turn(at: Any, number_1L: jax.Array) -> None:
        index_1R[:, at] = jnp.sum(jnp.where(number_R1 == number_1L, index_R1[...], 0), axis=0, keepdims=True)

    over(turn)
    key_R1 = index_R1[...] * choices + number_R1
    sums_RL[...] = jnp.zeros_like(sums_RL)

    def count(at: Any, number_1L: jax.Array) -> None:
        sums_RL[...] += jnp.where(key_R1 > index_1R[:, at] * choices + number_1L, 1.0, 0.0)  # float32 is exact for these numbers

    over(count)
    place_R1[...] = jnp.sum(sums_RL[...], axis=1, keepdims=True).astype(jnp.int32)
    token_R1 = number_R1 - ((number_R1.astype(jnp.float32) + 0.5) * (1 / tokens)).astype(jnp.int32) * tokens

    def give(at: Any, number_1L: jax.Array) -> None:
        here = place_R1[...] == number_1L
        table[TOKEN : TOKEN + 1, at] = jnp.sum(jnp.where(here, token_R1, 0), axis=0, keepdims=True)
        sorted_1R[:, at] = jnp.sum(jnp.where(here, weights_R1[...], 0.0), axis=0, keepdims=True)

    table[...] = jnp.zeros_like(table)
    over(give)

    # Blocks of `rows` choices, as `expert_rows.cut_blocks`.
    shift = rows.bit_length() - 1
    expert_E1 = lax.broadcasted_iota(jnp.int32, (-(-experts // 8) * 8, 1), 0)
    expert_1E = lax.broadcasted_iota(jnp.int32, (1, _padded(experts)), 1)
    count_E1, count_1E = _count(index_1R[...] == expert_E1, 1), _count(index_R1[...] == expert_1E, 0)
    first_E1 = _count(index_1R[...] < expert_E1, 1)
    needed_E1, needed_1E = (
        jnp.where(number < experts, (count + rows - 1) >> shift, 0) for count, number in ((count_E1, expert_E1), (count_1E, expert_1E))
    )
    end_E1 = jnp.sum(jnp.where(expert_1E <= expert_E1, needed_1E, 0), axis=1, keepdims=True)
    used = jnp.sum(needed_E1)
    half = (used + cores - 1) >> (cores.bit_length() - 1)
    number_1S = lax.broadcasted_iota(jnp.int32, (1, _padded(steps * cores)), 1)
    core_1S = sum((_ones(number_1S >= core * steps) for core in range(1, cores)), jnp.zeros_like(number_1S))
    block_1S = core_1S * half + number_1S - core_1S * steps
    last_1S = jnp.minimum((core_1S + 1) * half, used)
    empty_1S = block_1S >= last_1S
    block_1S = jnp.maximum(jnp.minimum(block_1S, last_1S - 1), 0)
    expert_1S = jnp.minimum(_count((end_E1 <= block_1S) & (expert_E1 < experts), 0), experts - 1)

    def of_expert(x_E1: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(expert_1S == expert_E1, x_E1, 0), axis=0, keepdims=True)

    before_1S = (block_1S - of_expert(end_E1 - needed_E1)) * rows
    rows_1S = jnp.where(empty_1S, 0, jnp.clip(of_expert(count_E1) - before_1S, 0, rows))
    lines = {EXPERT: expert_1S, FIRST: of_expert(first_E1) + before_1S, ROWS: rows_1S, STACK: expert_1S + experts * layer_1[0]}
    for line, x_1S in lines.items():
        table[line : line + 1, : x_1S.shape[1]] = x_1S


def sort_steps(
    index_TX: jax.Array,
    weights_TX: jax.Array,
    experts: int,
    rows: int,
    layer: jax.Array | int,
    cores: int,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`sort_choices` of experts and weights. `experts` stands for an expert on another device."""
    share = index_TX.shape[1]
    columns = ([x[:, i : i + 1] for i in range(share)] for x in (index_TX.astype(jnp.int32), weights_TX.astype(jnp.float32)))
    return sort_choices(put_choices(*columns), share, experts, rows, layer, cores, interpret=interpret)


def sort_choices(
    choices_TW: jax.Array,
    share: int,
    experts: int,
    rows: int,
    layer: jax.Array | int,
    cores: int,
    *,
    first: jax.Array | int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The steps of decoding's experts: the table int32 [8, `table_width`], and the weights of the sorted rows, float32 [1, R].

    Choice x of token t has the number x T + t.

    Args:
      choices_TW: bfloat16 or float32. The last LANES columns are those of `put_choices`.
      share: experts per token.
      experts: number of experts on this device.
      rows: rows of a block, a power of two.
      layer: index of the layer in the stacks of experts.
      cores: parts of the steps with equally many blocks, a power of two.
      first: number of the first expert on this device.
      interpret: as for `pallas_call`.
    """
    assert rows & (rows - 1) == 0 == cores & (cores - 1), "rows of a block, and cores, are powers of two"
    tokens, width = choices_TW.shape
    choices = share * tokens
    wide, steps = _padded(choices), -(-most_blocks(choices, experts, rows) // cores)
    table = table_width(choices, steps * cores)

    return pl.pallas_call(
        functools.partial(_kernel, experts=experts, share=share, rows=rows, steps=steps, cores=cores),
        out_shape=(jax.ShapeDtypeStruct((_LINES, table), jnp.int32), jax.ShapeDtypeStruct((1, wide), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[pl.BlockSpec((tokens, LANES), lambda *_: (0, width // LANES - 1))],
            out_specs=(whole(_LINES, table), whole(1, wide)),
            scratch_shapes=[
                pltpu.VMEM((wide, LANES), jnp.float32),
                pltpu.VMEM((1, wide), jnp.int32),
                [pltpu.VMEM((wide, 1), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)],
            ],
        ),
        interpret=interpret,
        name="expert_steps",
    )(scalar(layer), scalar(first), choices_TW)
