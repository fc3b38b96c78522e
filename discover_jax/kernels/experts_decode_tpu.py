"""The mixture of experts in decoding, on a TPU: compact rows, a fused kernel on packed MXFP4, unmerged adapters.

It was compiled for TPUs and interpreted on a CPU. No TPU has run it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels import experts_decode_pallas
from discover_jax.kernels.expert_rows import most_blocks, sort_rows
from discover_jax.kernels.expert_steps_tpu import sort_choices, sort_steps, table_of
from discover_jax.kernels.experts import ExpertMatrix, moe_reference
from discover_jax.kernels.experts_decode_pallas import CORES, Settings
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.mxfp4_lanes import INPUTS

MOST_TOKENS = 512
"""Tokens of one call. More are computed one part after another: all of them are in the chip's memory."""
MOST_GROUPS = 15
"""Limit on the groups of 64 inputs that are unpacked together, a piece of gpt-oss's matrices. With 5, the compiler's schedule is 5% (v5p)
to 7% (v6e) longer, because each part ends with waiting for its products."""
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Rows of a block. A block's rows are unpacked for together, so a block should hold all rows of most experts."""

MOST_COMPARED = 2048
"""Choices up to which all pairs are compared to sort them."""


def choose_rows(routed: int, experts: int) -> int:
    """Rows of a block: a power of two of at least three times the mean of rows per expert, within the limits. It bounds how often an
    expert's weights are read again when its rows do not fit one block."""
    mean = -(-routed // experts)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (3 * mean - 1).bit_length()))


def chunk_inputs(lanes: jax.Array) -> int:
    """Inputs of a chunk for a matrix's words [..., pieces, rows, N]: it divides a piece."""
    groups = lanes.shape[-2] * 8 // INPUTS
    return INPUTS * next(n for n in range(MOST_GROUPS, 0, -1) if groups % n == 0)


def _sorted(index_R: jax.Array, weights_R: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The place of each sorted row among the choices, and its weight; as `expert_rows.sort_rows`."""
    rows = index_R.shape[0]
    if rows > MOST_COMPARED:
        slots_R = sort_rows(index_R, experts, 1).slots
        return slots_R, weights_R[slots_R]
    numbers = jnp.arange(rows, dtype=jnp.int32)
    keys_R = index_R * rows + numbers
    place_R = jnp.sum(keys_R[:, None] > keys_R[None], axis=1)
    # Sums of one term each. On a TPU, scatters and gathers of scalars are many small operations.
    here = place_R[None] == numbers[:, None]
    return jnp.sum(jnp.where(here, numbers[None], 0), axis=1), jnp.sum(jnp.where(here, weights_R[None], 0), axis=1)


def steps_of(index_TX: jax.Array, weights_TX: jax.Array, experts: int, rows: int, layer: jax.Array | int) -> tuple[jax.Array, ...]:
    """What the kernel needs to know of each step and row, as `expert_steps_tpu.table_of` takes it. Half of the blocks are for each core.

    Blocks are those of `expert_rows.cut_blocks`. In each layer, XLA runs this in few operations: comparisons with sums, no gathers.
    """
    tokens, index_R = len(index_TX), index_TX.T.reshape(-1).astype(jnp.int32)
    slots_R, weights_R = _sorted(index_R, weights_TX.T.reshape(-1).astype(jnp.float32), experts)
    numbers = jnp.arange(experts, dtype=jnp.int32)
    first_E = jnp.sum(index_R[None] < numbers[:, None], axis=1)
    count_E = jnp.sum(index_R[None] == numbers[:, None], axis=1)
    needed_E = -(-count_E // rows)
    end_E = jnp.sum(jnp.where(numbers[None] <= numbers[:, None], needed_E[None], 0), axis=1)
    used = jnp.sum(needed_E)
    half, steps = -(-used // CORES), -(-most_blocks(index_R.shape[0], experts, rows) // CORES)
    core_S, step_S = jnp.repeat(jnp.arange(CORES), steps), jnp.tile(jnp.arange(steps), CORES)
    block_S, last_S = core_S * half + step_S, jnp.minimum((core_S + 1) * half, used)
    empty_S = block_S >= last_S
    block_S = jnp.maximum(jnp.minimum(block_S, last_S - 1), 0)
    expert_S = jnp.minimum(jnp.sum(end_E[None] <= block_S[:, None], axis=1), experts - 1).astype(jnp.int32)

    def of_expert(x_E: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(expert_S[:, None] == numbers[None], x_E[None], 0), axis=1)

    before_S = (block_S - of_expert(end_E - needed_E)) * rows
    rows_S = jnp.where(empty_S, 0, jnp.clip(of_expert(count_E) - before_S, 0, rows))
    per_step = (x_S.astype(jnp.int32) for x_S in (expert_S, of_expert(first_E) + before_S, rows_S))
    return *per_step, slots_R % tokens, weights_R, expert_S + experts * jnp.asarray(layer, jnp.int32)


def _by_parts(x_Eo: jax.Array, parts: int, width: int) -> jax.Array:
    """Rows of a matrix in the order of its words: [E, ..., out] to [E, ..., parts, width], padded."""
    x = x_Eo.reshape(*x_Eo.shape[:-1], -1, parts).swapaxes(-1, -2)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def lay_out_small(small: dict[str, jax.Array], lanes: jax.Array) -> dict[str, jax.Array]:
    """`bias`, `lora_a` and `lora_b` of a matrix, or of a stack of them, in the layouts that the kernel reads.

    Args:
      small: any of these arrays, [E, ...] or [L, E, ...].
      lanes: the matrix's words, [E, ...] or [L, E, ...].

    Returns:
      `bias` float32 [..., E, parts, N], `lora_a` [..., E, i, r, w] and `lora_b` [..., E, parts, r, N], see `multiply`.
    """
    parts, width, chunk = lanes.shape[-4], lanes.shape[-1], chunk_inputs(lanes)
    found = {}
    for name, array in small.items():
        if name == "bias":
            found[name] = _by_parts(array.astype(jnp.float32), parts, width)
        elif name == "lora_a":
            found[name] = array.reshape(*array.shape[:-1], -1, chunk).swapaxes(-3, -2)
        elif name == "lora_b":
            found[name] = _by_parts(array.swapaxes(-1, -2), parts, width).swapaxes(-2, -3)
    return found


Tree = dict[str, Any]


def lay_out_trees(frozen: Tree, lora: Tree) -> tuple[Tree, Tree]:
    """Two trees of parameters with `lay_out_small` of each matrix that has `lanes`. `lora` may lack nodes."""
    if "lanes" in frozen:
        return frozen | lay_out_small({"bias": frozen["bias"]}, frozen["lanes"]), lay_out_small(lora, frozen["lanes"])
    frozen, lora = dict(frozen), dict(lora)
    for name, node in frozen.items():
        if isinstance(node, dict):
            frozen[name], laid_out = lay_out_trees(node, lora.get(name, {}))
            if name in lora:
                lora[name] = laid_out
    return frozen, lora


def _prepare(arrays: dict[str, jax.Array], layer: jax.Array | None) -> tuple[jax.Array, ...]:
    """A matrix for the kernel, which selects a layer's experts itself: words, scales, bias and adapter of all layers, [stack, ...].

    The small arrays are laid out here unless `lay_out_trees` has done so.
    """
    lanes, small = arrays["lanes"], {name: arrays[name] for name in ("bias", "lora_a", "lora_b") if name in arrays}
    if small["bias"].ndim == lanes.ndim - 3:
        small = lay_out_small(small, lanes)
    stacks = [lanes, arrays["powers"], *small.values()]
    return tuple(stacks if layer is None else [stack.reshape(-1, *stack.shape[2:]) for stack in stacks])


def moe_lanes(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: dict[str, jax.Array],
    down: dict[str, jax.Array],
    *,
    experts: int,
    scales: tuple[float, float],
    limit: float,
    alpha: float,
    layer: jax.Array | None = None,
    elsewhere: int = 0,
    rows: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """sum_x weights[t, x] * down_e(act(gate_up_e(x_t))), e = index[t, x]: [T, D] float32. Not differentiable.

    Args:
      x_TD: activations, bfloat16 or float32.
      index_TX, weights_TX, experts, limit, alpha, layer, elsewhere: see `MixtureOfExperts`.
      gate_up, down: `lanes` and `powers` (see mxfp4_lanes), `bias`, and with adapters `lora_a` and `lora_b`: [E, ...], or stacks
        [L, E, ...]. The last three as they are declared, or by `lay_out_trees`.
      scales: alpha / rank of both adapters.
      rows: rows of a block instead of `choose_rows`'s; a multiple of 16.
      interpret: as for `pallas_call`.
    """
    tokens, width = x_TD.shape
    if tokens > MOST_TOKENS:
        parts = -(-tokens // MOST_TOKENS)
        size = -(-tokens // parts)
        # Padding goes to the expert that stands for those of other devices.
        padded = [jnp.pad(x, [(0, parts * size - tokens), (0, 0)]) for x in (x_TD, index_TX + 1, weights_TX)]
        x, index, weights = (x.reshape(parts, size, -1) for x in padded)
        index = jnp.where(index == 0, experts, index - 1)
        options: Any = {"experts": experts, "scales": scales, "limit": limit, "alpha": alpha, "layer": layer, "elsewhere": elsewhere}

        def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            x_TD, index_TX, weights_TX = part
            return moe_lanes(x_TD, index_TX, weights_TX, gate_up, down, rows=rows, interpret=interpret, **options)

        of_part = jax.lax.map(one, (x, index, weights))
        return of_part.reshape(parts * size, -1)[:tokens]
    chosen = rows or choose_rows(tokens * index_TX.shape[1] * experts // (experts + elsewhere), experts)
    number = jnp.int32(0) if layer is None else layer
    if index_TX.size > MOST_COMPARED or chosen & (chosen - 1):
        order = table_of(steps_of(index_TX, weights_TX, experts, chosen, number))
    else:
        order = sort_steps(index_TX, weights_TX, experts, chosen, number, CORES, interpret=interpret)
    out = _multiply(x_TD, order, index_TX.size, experts, chosen, gate_up, down, scales, limit, alpha, layer, interpret)
    return out.sum(axis=0)[:, :width]


def _multiply(
    x_TW: jax.Array,
    order: tuple[jax.Array, jax.Array],
    choices: int,
    experts: int,
    rows: int,
    gate_up: dict[str, jax.Array],
    down: dict[str, jax.Array],
    scales: tuple[float, float],
    limit: float,
    alpha: float,
    layer: jax.Array | None,
    interpret: Any,
) -> jax.Array:
    """Parts of the experts' sum, float32 [CORES, T, M]. M may be padded. Columns after the matrices' inputs are not read."""
    chunks = chunk_inputs(gate_up["lanes"]), chunk_inputs(down["lanes"])
    up, low = _prepare(gate_up, layer), _prepare(down, layer)
    settings = Settings(rows, limit, alpha, scales if "lora_a" in gate_up else None, interpret=interpret)
    steps = CORES * -(-most_blocks(choices, experts, rows) // CORES)
    return experts_decode_pallas.multiply(steps, order, x_TW, up, low, chunks, settings)


def moe_packed(
    sent_TW: jax.Array,
    share: int,
    gate_up: dict[str, jax.Array],
    down: dict[str, jax.Array],
    *,
    experts: int,
    scales: tuple[float, float],
    limit: float,
    alpha: float,
    layer: jax.Array,
    first: jax.Array | int = 0,
    elsewhere: int = 0,
    interpret: Any = False,
) -> jax.Array:
    """Parts of `moe_lanes`, float32 [CORES, T, M], whose sum over CORES is its result and padding of the columns.

    Args:
      sent_TW: inputs of the tokens and their choices, see `expert_steps_tpu.put_choices`; at most MOST_COMPARED choices.
      share: experts per token.
      gate_up, down, experts, scales, limit, alpha, layer, elsewhere: see `moe_lanes`.
      first: number of the first expert on this device.
      interpret: as for `pallas_call`.
    """
    choices = share * len(sent_TW)
    rows = choose_rows(choices * experts // (experts + elsewhere), experts)
    order = sort_choices(sent_TW, share, experts, rows, layer, CORES, first=first, interpret=interpret)
    return _multiply(sent_TW, order, choices, experts, rows, gate_up, down, scales, limit, alpha, layer, interpret)


def moe_decode(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    experts: int,
    adapted: bool,
    limit: float,
    alpha: float,
    layer: jax.Array | None = None,
    elsewhere: int = 0,
) -> jax.Array:
    """`MixtureOfExperts` by the kernel if both matrices have its layout (arrays `lanes` and `powers`); not differentiable.

    Otherwise it uses the reference and logs a warning once.
    """
    options: dict[str, Any] = {"experts": experts, "limit": limit, "alpha": alpha, "layer": layer, "elsewhere": elsewhere}
    up, low = gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted)
    if "lanes" not in up or "lanes" not in low:
        warn_reference("decode_experts", "the experts are not in the layout of the TPU kernels", "tpu")
        return moe_reference(x_TD, index_TX, weights_TX, gate_up, down, adapted=adapted, **options)
    return moe_lanes(x_TD, index_TX, weights_TX, up, low, scales=(gate_up.scale, down.scale), **options)
