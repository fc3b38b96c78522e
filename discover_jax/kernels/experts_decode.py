"""The mixture of experts in decoding, on a GPU: compact rows, fused kernels on packed MXFP4, adapters unmerged. Needs the extra `kernels`.

Two kernels read the weights, each once: gate and up with bias, adapter and activation; down with bias, adapter and routing weight. Sums
are float32; what is rounded to bfloat16 is the input, the activation between the two, and the result, as in the reference.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from discover_jax.kernels import experts_triton
from discover_jax.kernels.expert_rows import Blocks, sort_rows
from discover_jax.kernels.mxfp4_tiles import COLUMNS, ROWS

_HOPPER = 90
"""Compute capability for which kernels are lowered where there is no GPU."""


class TiledMatrix(NamedTuple):
    """One matrix [out, in] of every expert, packed in tiles (mxfp4_tiles.lay_out).

    Attributes:
      words, factors: the tiles.
      bias: [E, out].
      lora_a, lora_b: [E, rank, in] and [E, out, rank], or None.
      scale: the adapter's alpha / rank.
    """

    words: jax.Array
    factors: jax.Array
    bias: jax.Array
    lora_a: jax.Array | None = None
    lora_b: jax.Array | None = None
    scale: float = 0.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is cut: slabs of a program, tiles of 64 columns an iteration, iterations in flight, warps."""

    parts: int
    step: int
    stages: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of a block (a power of two, at least 8), and the launches of both kernels."""

    rows: int
    gate_up: Launch
    down: Launch


def plan(routed: int, experts: int) -> Plan:
    """The fastest of what was measured on an H200 for so many routed rows (benchmarks/kernels.py)."""
    if routed <= 6 * experts:
        return Plan(8, Launch(2, 1, 4, 2), Launch(3, 1, 4, 2))
    if routed <= 14 * experts:
        return Plan(16, Launch(2, 1, 4, 2), Launch(3, 1, 4, 2))
    return Plan(32 if routed <= 64 * experts else 64, Launch(1, 1, 3, 2), Launch(1, 1, 3, 2))


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(most, 0, -1) if number % n == 0)


def _call(kernel: Any, *arguments: Any, out: jax.ShapeDtypeStruct, grid: tuple[int, int], warps: int, stages: int, **constants: Any) -> Any:
    import jax_triton  # it imports only where jax has its GPU plugin

    capability = None if jax.default_backend() == "gpu" else _HOPPER
    return jax_triton.triton_call(
        *arguments, kernel=kernel, out_shape=out, grid=grid, num_warps=warps, num_stages=stages, compute_capability=capability, **constants
    )


def _low(x: jax.Array, matrix: TiledMatrix, rows: Blocks, *, block: int, share: int) -> tuple[jax.Array, int, int]:
    """Parts of the adapter's inner product, their number, and the rank; a placeholder and zeros without an adapter."""
    if matrix.lora_a is None:
        return jnp.zeros(1, jnp.float32), 1, 0
    routed, (_, rank, width) = rows.slots.shape[0], matrix.lora_a.shape
    split = _largest_divisor(width // COLUMNS, 5)
    low = _call(
        experts_triton.times_a,
        *(x, matrix.lora_a, rows.slots, rows.blocks, rows.blocks.shape[1], routed),
        out=jax.ShapeDtypeStruct((split, routed, rank), jnp.float32),
        grid=(split, rows.blocks.shape[1]),
        warps=1,
        stages=4,
        **{"K": width, "N": block, "SHARE": share, "RANK": rank, "SPLIT": split, "SCALE": matrix.scale, "STAGES": 4},
    )
    return low, split, rank


def _matmul(
    x: jax.Array,
    matrix: TiledMatrix,
    weights_R: jax.Array,
    rows: Blocks,
    launch: Launch,
    *,
    block: int,
    share: int,
    gated: bool,
    limit: float,
    alpha: float,
) -> jax.Array:
    """Routed rows [R, ...] of the gated activation in bfloat16, or of the weighted outputs in float32."""
    _, slabs, columns, m16, _ = matrix.words.shape
    routed, count, out = rows.slots.shape[0], rows.blocks.shape[1], slabs * m16 * ROWS
    parts, step = _largest_divisor(slabs, launch.parts), _largest_divisor(columns, launch.step)
    low, split, rank = _low(x, matrix, rows, block=block, share=share)
    lora_b = low if matrix.lora_b is None else matrix.lora_b
    return _call(
        experts_triton.matmul,
        *(x, matrix.words, matrix.factors, matrix.bias, rows.slots, weights_R, low, lora_b, rows.blocks, count, routed),
        out=jax.ShapeDtypeStruct((routed, out // 2), jnp.bfloat16) if gated else jax.ShapeDtypeStruct((routed, out), jnp.float32),
        grid=(slabs // parts, count),
        warps=launch.warps,
        stages=launch.stages,
        **{"K": columns * COLUMNS, "OUT": out, "M16": m16, "PARTS": parts, "N": block, "STEP": step, "STAGES": launch.stages},
        **{"GATED": gated, "SHARE": share, "RANK": rank, "SPLIT": split, "LIMIT": limit, "ALPHA": alpha},
    )


def mix_routed(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: TiledMatrix,
    down: TiledMatrix,
    *,
    limit: float,
    alpha: float,
    chosen: Plan | None = None,
) -> jax.Array:
    """sum_x weights[t, x] * down_e(act(gate_up_e(x_t))), e = index[t, x]: [T, D] in x's type. Without derivatives.

    Args:
      x_TD: activations; rounded to bfloat16.
      index_TX, weights_TX: the experts of each token, all different, and their weights.
      gate_up, down: `gate_up` laid out with paired rows.
      limit, alpha: of the activation, see kernels.experts.gated.
      chosen: how the kernels are cut, instead of `plan`'s choice.
    """
    (tokens, share), experts = index_TX.shape, gate_up.words.shape[0]
    chosen = chosen or plan(tokens * share, experts)
    rows = sort_rows(index_TX, experts, chosen.rows)
    weights_R = weights_TX.reshape(-1).astype(jnp.float32)
    options = {"block": chosen.rows, "limit": limit, "alpha": alpha}
    y_RF = _matmul(x_TD.astype(jnp.bfloat16), gate_up, weights_R, rows, chosen.gate_up, share=share, gated=True, **options)
    out_RD = _matmul(y_RF, down, weights_R, rows, chosen.down, share=1, gated=False, **options)
    return out_RD.reshape(tokens, share, -1).sum(axis=1).astype(x_TD.dtype)
