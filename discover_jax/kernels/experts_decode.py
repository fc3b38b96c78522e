"""The mixture of experts in decoding, on a GPU: compact rows, fused kernels on packed MXFP4, unmerged adapters. Needs the extra `cuda`.

Two kernels read the weights once: gate and up with bias, adapter and activation; then down with bias, adapter and routing weight. Sums
are float32. The input, the activation between the two kernels, and the result are rounded to bfloat16, as in the reference.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels import experts_triton
from discover_jax.kernels.expert_rows import Blocks
from discover_jax.kernels.expert_rows_decode import sort_rows_of_layer
from discover_jax.kernels.experts import ExpertMatrix, gated, moe_reference
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.mxfp4_tiles import COLUMNS, ROWS
from discover_jax.kernels.triton_call import call_kernel, largest_divisor

MOST_RANK = 128
"""Rank limit of the kernels: tiles of larger adapters do not fit the shared memory of all GPUs, and the update refuses them anyway."""
SPLIT = 5
"""Limit on the parts into which the columns of an adapter's A are divided among kernel instances."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words", "factors", "bias", "lora_a", "lora_b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class TiledMatrix:
    """One matrix [out, in] of every expert, packed in tiles (mxfp4_tiles.lay_out). For a stack of layers every shape has L before E.

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
    """Launch parameters of a kernel: slabs per kernel instance, tiles of 64 columns per iteration, iterations in flight, warps, and
    instances along the columns.

    Numbers that must divide a size of the matrix (parts, step, depth) are limits: the kernel uses the largest divisor up to them.
    """

    parts: int
    step: int
    stages: int
    warps: int
    depth: int = 1


@dataclasses.dataclass(frozen=True)
class ExpertsTiling:
    """Rows per block (a power of two, at least 8), and the launch parameters of both kernels."""

    rows: int
    gate_up: Launch
    down: Launch


def choose_tiling(routed: int, experts: int) -> ExpertsTiling:
    """The fastest measured on an H200 for this many routed rows at gpt-oss-120b's shape (benchmarks/kernels_decode.py)."""
    if routed <= experts // 8:
        return ExpertsTiling(8, Launch(1, 3, 3, 4, depth=5), Launch(1, 3, 3, 4))
    if routed <= 2 * experts:
        return ExpertsTiling(8, Launch(1, 3, 3, 4), Launch(1, 3, 3, 4))
    if routed <= 6 * experts:
        return ExpertsTiling(8, Launch(1, 3, 3, 2), Launch(1, 3, 3, 4))
    if routed <= 32 * experts:
        return ExpertsTiling(16, Launch(1, 3, 2, 2), Launch(3, 1, 3, 2))
    return ExpertsTiling(32, Launch(1, 1, 3, 2), Launch(3, 1, 3, 2))


def _low(x: jax.Array, matrix: TiledMatrix, rows: Blocks, *, block: int, share: int) -> tuple[jax.Array, int, int]:
    """Parts of the adapter's inner product, their number, and the rank. Without an adapter: a placeholder and zeros."""
    if matrix.lora_a is None:
        return jnp.zeros(1, jnp.float32), 1, 0
    routed, (_, rank, width) = rows.slots.shape[0], matrix.lora_a.shape
    split = largest_divisor(width // COLUMNS, SPLIT)
    low = call_kernel(
        experts_triton.times_a,
        *(x, matrix.lora_a, rows.slots, rows.blocks, rows.blocks.shape[1], routed),
        out=jax.ShapeDtypeStruct((split, routed, rank), jnp.float32),
        grid=(split, rows.blocks.shape[1]),
        warps=1,
        stages=4,
        constants={"K": width, "N": block, "SHARE": share, "RANK": rank, "SPLIT": split, "SCALE": matrix.scale, "STAGES": 4},
    )
    return low, split, rank


def multiply(
    x: jax.Array,
    matrix: TiledMatrix,
    rows: Blocks,
    launch: Launch,
    *,
    block: int,
    share: int,
    paired: bool,
    limit: float,
    alpha: float,
) -> jax.Array:
    """Routed rows times their expert's matrix: bfloat16 activations [R, out/2] if paired, else float32 parts [depth, R, out]."""
    _, slabs, columns, m16, _ = matrix.words.shape
    routed, count, out = rows.slots.shape[0], rows.blocks.shape[1], slabs * m16 * ROWS
    parts, depth = largest_divisor(slabs, launch.parts), largest_divisor(columns, launch.depth)
    step = largest_divisor(columns // depth, launch.step)
    gated_there = paired and depth == 1
    low, split, rank = _low(x, matrix, rows, block=block, share=share)
    lora_b = low if matrix.lora_b is None else matrix.lora_b
    activation = jax.ShapeDtypeStruct((routed, out // 2), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((depth, routed, out), jnp.float32)
    sizes = {"K": columns * COLUMNS, "OUT": out, "M16": m16, "N": block, "SHARE": share, "RANK": rank, "SPLIT": split}
    cuts = {"PARTS": parts, "STEP": step, "STAGES": launch.stages, "DEPTH": depth}
    result = call_kernel(
        experts_triton.matmul,
        *(x, matrix.words, matrix.factors, matrix.bias, rows.slots, low, lora_b, rows.blocks, count, routed),
        out=activation if gated_there else sums,
        grid=(slabs // parts, count, depth),
        warps=launch.warps,
        stages=launch.stages,
        constants={**sizes, **cuts, "PAIRED": paired, "GATED": gated_there, "LIMIT": limit, "ALPHA": alpha},
    )
    return gated(result.sum(axis=0), limit=limit, alpha=alpha).astype(jnp.bfloat16) if paired and not gated_there else result


def moe_routed(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: TiledMatrix,
    down: TiledMatrix,
    *,
    limit: float,
    alpha: float,
    layer: jax.Array | None = None,
    elsewhere: int = 0,
    rows: Blocks | None = None,
    chosen: ExpertsTiling | None = None,
) -> jax.Array:
    """sum_x weights[t, x] * down_e(act(gate_up_e(x_t))), e = index[t, x]: [T, D] float32. Not differentiable.

    Args:
      x_TD: activations; rounded to bfloat16.
      index_TX, weights_TX: the experts of each token, all different, and their weights. The number of experts on this device stands for
        an expert on another device; it may occur several times and adds nothing.
      gate_up, down: the matrices; `gate_up` is laid out with paired rows.
      limit, alpha: of the activation, see kernels.experts.gated.
      layer: int32 scalar, the layer to use if the matrices are stacks of layers. The kernels read its weights in place: XLA would copy a
        slice of the stack before passing it to a kernel.
      elsewhere: number of experts on other devices.
      rows: the choices sorted by expert, in blocks of `choose_tiling`'s rows, if they are known.
      chosen: tiles to use instead of `choose_tiling`'s.
    """
    options: dict[str, Any] = {"limit": limit, "alpha": alpha, "layer": layer, "elsewhere": elsewhere}
    parts_PTXD = moe_parts(x_TD, index_TX, gate_up, down, **options, rows=rows, chosen=chosen)
    weighted = parts_PTXD * weights_TX.astype(jnp.float32)[..., None]
    if elsewhere:  # no kernel wrote the rows of experts on other devices
        weighted = jnp.where((index_TX < gate_up.words.shape[0 if layer is None else 1])[..., None], weighted, 0.0)
    return weighted.sum(axis=(0, 2))


def moe_parts(
    x_TD: jax.Array,
    index_TX: jax.Array,
    gate_up: TiledMatrix,
    down: TiledMatrix,
    *,
    limit: float,
    alpha: float,
    layer: jax.Array | None = None,
    elsewhere: int = 0,
    rows: Blocks | None = None,
    chosen: ExpertsTiling | None = None,
) -> jax.Array:
    """`moe_routed` before its last sum: float32 [parts, T, X, D], without the weights. Those of experts on other devices are undefined."""
    (tokens, share), experts = index_TX.shape, gate_up.words.shape[0 if layer is None else 1]
    chosen = chosen or choose_tiling(tokens * share * experts // (experts + elsewhere), experts)
    rows = rows or sort_rows_of_layer(index_TX, experts, chosen.rows, 0 if layer is None else layer)
    if layer is not None:
        gate_up, down = jax.tree.map(lambda stack: stack.reshape(-1, *stack.shape[2:]), (gate_up, down))
    options: dict[str, Any] = {"block": chosen.rows, "limit": limit, "alpha": alpha}
    y_RF = multiply(x_TD.astype(jnp.bfloat16), gate_up, rows, chosen.gate_up, share=share, paired=True, **options)
    parts_RD = multiply(y_RF, down, rows, chosen.down, share=1, paired=False, **options)
    return parts_RD.reshape(-1, tokens, share, parts_RD.shape[-1])


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
    rows: Blocks | None = None,
) -> jax.Array:
    """`MixtureOfExperts` by the kernels if both matrices have tiles (arrays `words` and `factors`); not differentiable.

    Otherwise it uses the reference and logs a warning once. `rows`: see `moe_routed`.
    """
    options: dict[str, Any] = {"limit": limit, "alpha": alpha, "layer": layer, "elsewhere": elsewhere}
    tiled = tiled_matrices(gate_up, down, adapted=adapted)
    if tiled is None:
        return moe_reference(x_TD, index_TX, weights_TX, gate_up, down, experts=experts, adapted=adapted, **options)
    return moe_routed(x_TD, index_TX, weights_TX, *tiled, rows=rows, **options)


def tiled_matrices(gate_up: ExpertMatrix, down: ExpertMatrix, *, adapted: bool) -> tuple[TiledMatrix, TiledMatrix] | None:
    """Both matrices for the kernels. None if the kernels do not support them; then it logs the reason once."""
    up, low = gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted)
    rank = max((own["lora_a"].shape[-2] for own in (up, low) if "lora_a" in own), default=0)
    reason = None
    if "words" not in up or "words" not in low:
        reason = "the experts are not laid out in tiles"
    elif rank > MOST_RANK:
        reason = f"the adapter's rank {rank} is above {MOST_RANK}"
    if reason is not None:
        warn_reference("decode_experts", reason)
        return None
    return TiledMatrix(**up, scale=gate_up.scale), TiledMatrix(**low, scale=down.scale)
