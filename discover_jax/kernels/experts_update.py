"""The mixture of experts in the update, on a GPU: grouped products of sorted rows, with derivatives. Needs the extra `cuda`.

Exact and dropless for any routing. Rows are sorted by expert into blocks that each belong to one expert, so only the last rows of a block
are wasted. A layer's MXFP4 is unpacked to bfloat16 in the forward pass and again in the backward pass, and never kept. Activations, routing
weights and adapters have derivatives; base weights do not. The forward pass rounds to the activations' dtype where the reference does. The
backward pass rounds the inputs of products and of the activation. That dtype is bfloat16, except in Triton's interpreter, where float32
shows that the kernels differ from the reference only by rounding.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels import experts_update_triton
from discover_jax.kernels.expert_rows import Blocks, sort_rows
from discover_jax.kernels.experts import ExpertMatrix, activate, moe_reference
from discover_jax.kernels.experts_decode import TiledMatrix
from discover_jax.kernels.fallback import experts_update_refusal, warn_reference
from discover_jax.kernels.mxfp4_tiles import COLUMNS, ROWS
from discover_jax.kernels.triton_call import call_kernel, compute_capability, power_of_two, shared_kib

MOST_RANK = 128
"""Rank limit of the kernels, on GPUs with enough shared memory: see `most_rank`."""


def most_rank() -> int:
    """The largest rank of an adapter that the kernels support on this process's GPU.

    A kernel instance has up to 256 outputs. It holds the adapter's second matrix for them in float32: 1 KiB for each unit of the rank,
    which is padded to a power of two.
    """
    return min(MOST_RANK, 1 << (shared_kib(compute_capability()).bit_length() - 1))


@dataclasses.dataclass(frozen=True)
class Launch:
    """Launch parameters of the grouped product: outputs per kernel instance, iterations in flight, warps."""

    outputs: int
    stages: int = 3
    warps: int = 8


@dataclasses.dataclass(frozen=True)
class GroupedTiling:
    """Rows per block, and the launch parameters of wide products, of the paired product, and of products to an adapter's rank.

    The defaults are the fastest measured on an H200 at gpt-oss-120b's shape and 32k tokens (benchmarks/kernels_update.py).
    """

    rows: int = 128
    wide: Launch = Launch(256)
    paired: Launch = Launch(64)
    narrow: Launch = Launch(16, 4, 2)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What all products of a layer share: the rows and their blocks, and the tiles."""

    rows: Blocks
    share: int
    tiling: GroupedTiling
    limit: float
    alpha: float

    @property
    def routed(self) -> int:
        return self.rows.slots.shape[0]

    def product(
        self,
        x: jax.Array,
        matrix: jax.Array,
        *,
        left: bool = False,
        of_tokens: bool = False,
        to_slots: bool = False,
        exact: bool = False,
        bias: jax.Array | None = None,
        adapter: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Rows of `x` times their expert's transposed matrix [E, N, K], or [E, K, N] if `left`: [R, N] of sorted rows, in the dtype of `x`.

        Args:
          of_tokens: rows of `x` are the tokens, not the sorted rows.
          to_slots: returns float32 in the order of the slots.
          exact: returns float32.
          bias: [E, N].
          adapter: the low-rank rows [R, rank] float32, and the matrix [E, N, rank], or [E, rank, N] if `left`; their product is added.
        """
        outputs = matrix.shape[2 if left else 1]
        launch = self.tiling.narrow if outputs <= 64 else self.tiling.wide
        dtype = jnp.float32 if to_slots or exact else x.dtype
        out = jax.ShapeDtypeStruct((self.routed, outputs), dtype)
        flags = {"LEFT": left, "SHARE": self.share if of_tokens else 0, "SCATTER": to_slots, "FLOAT": exact, "PAIRED": False}
        return self._call(x, matrix, bias, adapter, launch, outputs, [out, jax.ShapeDtypeStruct((1,), jnp.bfloat16)], flags)[0]

    def activation(
        self, x: jax.Array, matrix: jax.Array, bias: jax.Array, adapter: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array]:
        """The activation of the tokens' rows `x` times gates and ups [E, 2 F, K]: [R, F], and its inputs [R, 2 F]."""
        outputs = matrix.shape[1] // 2
        out = [jax.ShapeDtypeStruct((self.routed, width), x.dtype) for width in (outputs, 2 * outputs)]
        flags = {"LEFT": False, "SHARE": self.share, "SCATTER": False, "FLOAT": False, "PAIRED": True}
        active, both = self._call(x, matrix, bias, adapter, self.tiling.paired, outputs, out, flags)
        return active, both

    def _call(
        self,
        x: jax.Array,
        matrix: jax.Array,
        bias: jax.Array | None,
        adapter: tuple[jax.Array, jax.Array] | None,
        launch: Launch,
        outputs: int,
        out: list[Any],
        flags: dict[str, Any],
    ) -> list[jax.Array]:
        none = jnp.zeros(1, jnp.float32)
        low, second = adapter if adapter is not None else (none, none)
        blocks, width = self.rows.blocks.shape[1], max(16, min(launch.outputs, power_of_two(outputs)))
        sizes = {"K": x.shape[1], "N": outputs, "BM": self.tiling.rows, "BN": width, "STAGES": launch.stages}
        more = {"BIAS": bias is not None, "RANK": low.shape[1] if adapter is not None else 0, "LIMIT": self.limit, "ALPHA": self.alpha}
        return call_kernel(
            experts_update_triton.grouped,
            *(x, matrix, none if bias is None else bias, low, second, self.rows.slots, self.rows.blocks, blocks),
            out=out,
            grid=(-(-outputs // width), blocks),
            warps=launch.warps,
            stages=launch.stages,
            constants={**sizes, **more, **flags},
        )

    def outer(self, u: jax.Array, v_RX: jax.Array, firsts: jax.Array, *, of_tokens: bool = False) -> jax.Array:
        """For each expert the sum over its rows of u v^T: float32 [E, width of u, rank]."""
        experts, width, rank = firsts.shape[0] - 1, u.shape[1], v_RX.shape[1]
        block = min(128, power_of_two(width))
        return call_kernel(
            experts_update_triton.outer,
            *(u, v_RX, self.rows.slots, firsts),
            out=jax.ShapeDtypeStruct((experts, width, rank), jnp.float32),
            grid=(experts, -(-width // block)),
            warps=4,
            stages=3,
            constants={"N": width, "BN": block, "BR": 64, "STAGES": 3, "SHARE": self.share if of_tokens else 0, "RANK": rank},
        )


def unpack(matrix: TiledMatrix, dtype: Any = jnp.bfloat16, *, paired: bool) -> jax.Array:
    """The exact matrices of all experts [E, out, in]; in paired ones gates come before ups."""
    experts, slabs, tiles, m16, _ = matrix.words.shape
    return call_kernel(
        experts_update_triton.unpack,
        *(matrix.words, matrix.factors),
        out=jax.ShapeDtypeStruct((experts, slabs * m16 * ROWS, tiles * COLUMNS), dtype),
        grid=(experts, slabs, tiles),
        warps=2,
        stages=1,
        constants={"SLABS": slabs, "TILES": tiles, "M16": m16, "PAIRED": paired},
    )


def _where_here(index_TX: jax.Array, experts: int, of_choices: jax.Array) -> jax.Array:
    """[T, X, ...], zero for choices of experts on other devices, whose rows no kernel has written."""
    here_TX = index_TX < experts
    return jnp.where(here_TX.reshape(*here_TX.shape, *[1] * (of_choices.ndim - 2)), of_choices, 0)


def _gates_first(x: jax.Array) -> jax.Array:
    """Axis 1 of [E, 2 F, ...] with even entries before odd ones."""
    return jnp.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)


def _alternating(x: jax.Array) -> jax.Array:
    """The inverse of `_gates_first`."""
    return jnp.stack(jnp.split(x, 2, axis=1), axis=2).reshape(x.shape)


Adapter = tuple[jax.Array, jax.Array]
"""[E, rank, in] and [E, out, rank]."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def moe_sorted(
    x_TD: jax.Array,
    weights_TX: jax.Array,
    adapters: tuple[Adapter, Adapter] | None,
    index_TX: jax.Array,
    gate_up: TiledMatrix,
    down: TiledMatrix,
    limit: float,
    alpha: float,
    tiling: GroupedTiling,
) -> jax.Array:
    """`moe_reference`'s sum for tiles, [T, D] float32, differentiable in `x_TD`, `weights_TX` and `adapters`.

    Args:
      x_TD: activations.
      weights_TX, index_TX: the experts of each token, all different, and their weights. The number of experts on this device stands for
        an expert on another device; rows of such choices are never computed.
      adapters: of gate_up and of down, or None. Adapters within the matrices are ignored.
      gate_up, down: of one layer; `gate_up` is laid out with paired rows. Their `scale` applies to the adapters.
      limit, alpha: of the activation, see kernels.experts.gated.
      tiling: the tiles.
    """
    return _forward(x_TD, weights_TX, adapters, index_TX, gate_up, down, limit, alpha, tiling)[0]


def _forward(
    x_TD: Any, weights_TX: Any, adapters: Any, index_TX: Any, gate_up: Any, down: Any, limit: float, alpha: float, tiling: GroupedTiling
) -> tuple[jax.Array, tuple]:
    (tokens, share), experts = index_TX.shape, gate_up.words.shape[0]
    layer = _Layer(sort_rows(index_TX, experts, tiling.rows), share, tiling, limit, alpha)
    dtype = x_TD.dtype
    low_up: Any = None
    low_down: Any = None
    second_up = second_down = None
    both: Any = adapters or ((None, None), (None, None))
    (a_up, b_up), (a_down, b_down) = both
    if adapters is not None:
        low_up = gate_up.scale * layer.product(x_TD, a_up.astype(dtype), of_tokens=True, exact=True)
        second_up = low_up, _gates_first(b_up)
    bias_up = _gates_first(gate_up.bias.astype(jnp.float32))
    active_RF, both_RF2 = layer.activation(x_TD, unpack(gate_up, dtype, paired=True), bias_up, second_up)
    if adapters is not None:
        low_down = down.scale * layer.product(active_RF, a_down.astype(dtype), exact=True)
        second_down = low_down, b_down
    bias_down = down.bias.astype(jnp.float32)
    y_RD = layer.product(active_RF, unpack(down, dtype, paired=False), to_slots=True, bias=bias_down, adapter=second_down)
    y_TXD = _where_here(index_TX, experts, y_RD.reshape(tokens, share, -1))
    out_TD = jnp.sum(y_TXD * weights_TX.astype(jnp.float32)[..., None], axis=1)
    kept = x_TD, weights_TX, adapters, index_TX, gate_up, down, layer.rows, active_RF, both_RF2, low_up, low_down
    return out_TD, kept


def _backward(limit: float, alpha: float, tiling: GroupedTiling, kept: Any, d_out_TD: jax.Array) -> tuple:
    """Does not need the output of `down`. With y = W active + b, the weight's gradient is d_out y = (W^T d_out) active + d_out b, and the
    activation's gradient computes the product W^T d_out anyway. So a rematerialised layer skips its last product."""
    x_TD, weights_TX, adapters, index_TX, gate_up, down, rows, active_RF, both_RF2, low_up, low_down = kept
    share, experts = index_TX.shape[1], gate_up.words.shape[0]
    layer = _Layer(rows, share, tiling, limit, alpha)
    dtype, slots = x_TD.dtype, rows.slots
    d_rounded_TD = d_out_TD.astype(dtype)
    firsts = jnp.sum(index_TX.reshape(-1)[None] < jnp.arange(experts + 1)[:, None], axis=1, dtype=jnp.int32)
    weights_R1 = weights_TX.astype(jnp.float32).reshape(-1)[slots][:, None]

    d_adapters = through_up = through_down = None
    d_low_up: Any = None
    d_low_down: Any = None
    both: Any = adapters or ((None, None), (None, None))
    (a_up, b_up), (a_down, b_down) = both
    # First compute the gradients of `down` for outputs with weight 1.
    if adapters is not None:
        d_low_down = down.scale * layer.product(d_rounded_TD, b_down.astype(dtype), left=True, of_tokens=True, exact=True)
        through_down = d_low_down, a_down
    d_active_RF = layer.product(d_rounded_TD, unpack(down, dtype, paired=False), left=True, of_tokens=True, adapter=through_down)
    dot_R = jnp.sum(d_active_RF.astype(jnp.float32) * active_RF.astype(jnp.float32), axis=1)
    dot_TX = jnp.zeros(dot_R.shape, jnp.float32).at[slots].set(dot_R, unique_indices=True).reshape(index_TX.shape)
    of_bias_TE = jnp.einsum("td,ed->te", d_rounded_TD, down.bias.astype(dtype), preferred_element_type=jnp.float32)
    d_weights_TX = dot_TX + jnp.take_along_axis(of_bias_TE, index_TX, axis=1, mode="clip")
    d_weights_TX = _where_here(index_TX, experts, d_weights_TX)
    d_both_RF2 = _activation_gradient(both_RF2, weights_R1 * d_active_RF.astype(jnp.float32), limit, alpha)
    if adapters is not None:
        d_low_up = gate_up.scale * layer.product(d_both_RF2, _gates_first(b_up).astype(dtype), left=True, exact=True)
        through_up = d_low_up, a_up
    d_x_RD = layer.product(d_both_RF2, unpack(gate_up, dtype, paired=True), left=True, to_slots=True, adapter=through_up)
    d_x_TXD = _where_here(index_TX, experts, d_x_RD.reshape(-1, share, d_x_RD.shape[1]))
    d_x_TD = jnp.sum(d_x_TXD, axis=1).astype(x_TD.dtype)
    if adapters is not None:
        # `low` and its gradient already include the adapter's scale.
        of_up = layer.outer(x_TD, d_low_up, firsts, of_tokens=True).swapaxes(1, 2), _alternating(layer.outer(d_both_RF2, low_up, firsts))
        of_b_down = layer.outer(d_rounded_TD, weights_R1 * low_down, firsts, of_tokens=True)
        of_down = layer.outer(active_RF, weights_R1 * d_low_down, firsts).swapaxes(1, 2), of_b_down
        d_adapters = jax.tree.map(lambda gradient, own: gradient.astype(own.dtype), (of_up, of_down), adapters)
    return d_x_TD, d_weights_TX.astype(weights_TX.dtype), d_adapters, None, None, None


def _activation_gradient(both_RF2: jax.Array, d_active_RF: jax.Array, limit: float, alpha: float) -> jax.Array:
    """The gradient of kernels.experts.gated in gates and ups, [R, 2 F] in their dtype; zero where they are clamped."""

    def in_float32(both_RF2: jax.Array) -> jax.Array:
        return activate(*jnp.split(both_RF2.astype(jnp.float32), 2, axis=1), limit=limit, alpha=alpha)

    _, pull = jax.vjp(in_float32, both_RF2)
    return pull(d_active_RF)[0]


moe_sorted.defvjp(_forward, _backward)


def moe_update(
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
    """`MixtureOfExperts` by the kernels if both matrices have tiles of one layer (arrays `words` and `factors`); differentiable.

    Otherwise it uses the reference and logs the reason once.
    """
    del elsewhere  # one tiling suits any number of rows
    arrays = [dict(matrix.arrays(adapted=adapted)) for matrix in (gate_up, down)]
    rank = max((own["lora_a"].shape[-2] for own in arrays if "lora_a" in own), default=0)
    reason = experts_update_refusal(x_TD, arrays, layer)
    if not reason and any("words" not in own for own in arrays):
        reason = "the experts are not laid out in tiles"
    elif not reason and rank > most_rank():
        reason = f"the adapter's rank {rank} is above {most_rank()}, the most that fits this GPU's shared memory"
    if reason:
        warn_reference("experts", reason)
        options: dict[str, Any] = {"experts": experts, "adapted": adapted, "limit": limit, "alpha": alpha, "layer": layer}
        return moe_reference(x_TD, index_TX, weights_TX, gate_up, down, **options)
    adapters: Any = tuple((own.pop("lora_a"), own.pop("lora_b")) for own in arrays) if "lora_a" in arrays[0] else None
    tiles = (TiledMatrix(**own, scale=matrix.scale) for matrix, own in zip((gate_up, down), arrays, strict=True))
    return moe_sorted(x_TD, weights_TX, adapters, index_TX, *tiles, limit, alpha, GroupedTiling())
