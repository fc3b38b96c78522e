"""The mixture of experts in decoding, on a TPU: compact rows, a fused kernel on packed MXFP4, unmerged adapters.

It was compiled for TPUs and interpreted on a CPU. No TPU has run it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels import experts_decode_pallas
from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import ExpertMatrix, moe_reference
from discover_jax.kernels.experts_decode_pallas import CORES, Settings
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.mxfp4_lanes import INPUTS

MOST_TOKENS = 512
"""Tokens of one call. More are computed one part after another: all of them are in the chip's memory."""
MOST_GROUPS = 5
"""Limit on the groups of 64 inputs that are unpacked together."""
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Rows of a block. A block's rows are unpacked for together, so a block should hold all rows of most experts."""


def choose_rows(routed: int, experts: int) -> int:
    """Rows of a block: a power of two of at least three times the mean of rows per expert, within the limits. It bounds how often an
    expert's weights are read again when its rows do not fit one block."""
    mean = -(-routed // experts)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (3 * mean - 1).bit_length()))


def chunk_inputs(lanes: jax.Array) -> int:
    """Inputs of a chunk for a matrix's words [..., pieces, rows, N]: it divides a piece."""
    groups = lanes.shape[-2] * 8 // INPUTS
    return INPUTS * next(n for n in range(MOST_GROUPS, 0, -1) if groups % n == 0)


def steps_of(index_TX: jax.Array, weights_TX: jax.Array, experts: int, rows: int, layer: jax.Array | int) -> tuple[jax.Array, ...]:
    """What the kernel needs to know of each step and row, see `experts_decode_pallas.multiply`. Half of the blocks are for each core."""
    (_, share), slots_R = index_TX.shape, (sorted_rows := sort_rows(index_TX, experts, rows)).slots
    expert_b, first_b, rows_b = sorted_rows.blocks
    used = jnp.sum(rows_b > 0)
    half = -(-used // CORES)
    steps = -(-rows_b.shape[0] // CORES)
    block = jnp.arange(CORES)[:, None] * half + jnp.arange(steps)
    last = jnp.minimum((jnp.arange(CORES)[:, None] + 1) * half, used)
    empty = (block >= last).reshape(-1)
    block = jnp.clip(jnp.minimum(block, last - 1), 0, rows_b.shape[0] - 1).reshape(-1)
    expert_S = expert_b[block]
    per_step = expert_S, first_b[block], jnp.where(empty, 0, rows_b[block])
    stack_S = expert_S + experts * jnp.asarray(layer, jnp.int32)
    return *per_step, slots_R // share, weights_TX.reshape(-1)[slots_R].astype(jnp.float32), stack_S


def _by_parts(x_Eo: jax.Array, parts: int, width: int) -> jax.Array:
    """Rows of a matrix in the order of its words: [E, ..., out] to [E, ..., parts, width], padded."""
    x = x_Eo.reshape(*x_Eo.shape[:-1], -1, parts).swapaxes(-1, -2)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _prepare(arrays: dict[str, jax.Array], layer: jax.Array | None, chunk: int) -> tuple[jax.Array, ...]:
    """A matrix for the kernel. Its words and scales stay in the stack; the layer's small arrays are copied into their layouts."""
    lanes, powers = arrays["lanes"], arrays["powers"]
    small = {name: array for name, array in arrays.items() if name not in ("lanes", "powers")}
    if layer is None:
        lanes, powers = lanes[None], powers[None]
    else:
        small = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), small)
    parts, width = lanes.shape[2], lanes.shape[-1]
    prepared = [stack.reshape(-1, *stack.shape[2:]) for stack in (lanes, powers)]
    prepared.append(_by_parts(small["bias"].astype(jnp.float32), parts, width))
    if "lora_a" in small:
        experts, rank, _ = small["lora_a"].shape
        prepared.append(small["lora_a"].reshape(experts, rank, -1, chunk).swapaxes(1, 2))
        prepared.append(_by_parts(small["lora_b"].swapaxes(1, 2), parts, width).swapaxes(1, 2))
    return tuple(prepared)


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
        [L, E, ...].
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
    chunks = chunk_inputs(gate_up["lanes"]), chunk_inputs(down["lanes"])
    up, low = (_prepare(arrays, layer, chunk) for arrays, chunk in zip((gate_up, down), chunks, strict=True))
    settings = Settings(chosen, limit, alpha, scales if "lora_a" in gate_up else None, interpret=interpret)
    x_iTw = jnp.pad(x_TD.astype(jnp.float32), [(0, -tokens % 8), (0, 0)]).reshape(-1, width // chunks[0], chunks[0]).swapaxes(0, 1)
    steps = steps_of(index_TX, weights_TX, experts, chosen, 0 if layer is None else layer)
    out = experts_decode_pallas.multiply(steps, x_iTw, up, low, chunks[1], settings, x_TD.dtype)
    return out.sum(axis=0)[:tokens, :width]


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
