"""The mixture of experts in the update, on a TPU: grouped products of sorted rows, with derivatives.

Exact and dropless for any routing, with the rounding points of the GPU's kernels. Devices that share the experts exchange their tokens in
chunks. In a chunk, rows are sorted by expert into blocks that each belong to one expert. A loop computes some blocks at a time, until all
rows of this device's experts are done. So memory does not grow with the number of devices. A layer's MXFP4 is unpacked to bfloat16 once in
the forward pass and once in the backward pass, and never kept. The backward pass keeps only the inputs of this device. It recomputes gates
and ups, but not the output.

The kernels were compiled for TPUs and interpreted on a CPU. No TPU has run them.

Dimensions: R choices of experts of all tokens, P rows of a loop's blocks, F width of an expert.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from discover_jax.kernels.exchange import Exchange, exchanged
from discover_jax.kernels.expert_rows import cut_blocks
from discover_jax.kernels.experts import ExpertMatrix, activate, moe_reference
from discover_jax.kernels.experts_update_pallas import Owners, Tiles, activation, grouped, outer, unpack, unpack_lanes
from discover_jax.kernels.fallback import experts_update_refusal, warn_reference

ROWS = (512, 256, 128)
"""Possible rows of a block. Larger ones read weights less often, and waste more: half a block per expert."""
ROWS_AT_ONCE = 16_384
"""Most rows of all blocks that the loop computes at once. Their arrays take about 1 GB at gpt-oss's width."""
TOKENS_AT_ONCE = 49_152
"""Most tokens of all devices that are exchanged at once. Their arrays take 1.1 GB in the backward pass at gpt-oss's width."""
TOKEN_TILE = 16
"""Tokens of a chunk on a device are a multiple of this. A TPU stores 16 rows of bfloat16 together; XLA copies other chunks into another
layout before and after it gathers them."""
UNEVEN = 1.1
"""Rows that a device may have over its share before the loop takes one more turn."""


def choose_tiles(choices: int, experts: int, own: int) -> Tiles:
    """The largest blocks that padding enlarges by about an eighth or less, and as many at once as fill the turns of the loop.

    Args:
      choices: of all tokens, among the experts of all devices.
      experts, own: number of experts of all devices, and of this one.
    """
    rows = next((rows for rows in ROWS if choices >= 4 * rows * experts), ROWS[-1])
    most = choices // rows + own  # if all choices are of own experts
    expected = most if own == experts else min(most, math.ceil(UNEVEN * own * (choices / experts / rows + 0.5)))
    turns = -(-expected * rows // ROWS_AT_ONCE)
    return Tiles(rows=rows, blocks=-(-expected // turns))


Arrays = dict[str, jax.Array]
"""Of one matrix: `lanes` and `powers` (see mxfp4_lanes), `blocks` and `scales`, or `weight`; and `bias`; without the adapter."""
Adapter = tuple[jax.Array, jax.Array]
"""[E, rank, in] and [E, out, rank]."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The constants of a layer: limit and alpha of the activation, scales of the adapters of both matrices, the tiles, and the exchange of
    tokens with other devices."""

    limit: float
    alpha: float
    scale_up: float
    scale_down: float
    tiles: Tiles
    exchange: Exchange = Exchange()  # noqa: RUF009 - frozen


def _unpacked(matrix: Arrays, tiles: Tiles, part: int = 0, parts: int = 1) -> jax.Array:
    """[E, in, out/parts], of every `parts`-th output from `part`: gates or ups if there are two."""
    if "lanes" in matrix:
        return unpack_lanes(matrix["lanes"], matrix["powers"], part, matrix["bias"].shape[1] // parts, tiles)
    if "weight" in matrix:
        return matrix["weight"][:, part::parts].swapaxes(1, 2)
    blocks, scales = matrix["blocks"][:, part::parts], matrix["scales"][:, part::parts]
    # A TPU stores `blocks` with the outputs along its lanes, so this copies nothing.
    packed = blocks.transpose(0, 2, 3, 1).reshape(blocks.shape[0], -1, blocks.shape[1])
    return unpack(packed, scales.swapaxes(1, 2), tiles)


def _alternating(gates_ErF: jax.Array, ups_ErF: jax.Array) -> jax.Array:
    """[E, 2 F, r] whose even rows are those of gates."""
    both_EF2r = jnp.stack([gates_ErF, ups_ErF], axis=2).transpose(0, 3, 2, 1)
    return both_EF2r.reshape(both_EF2r.shape[0], -1, both_EF2r.shape[3])


class _Rows(NamedTuple):
    """The rows of a turn of the loop.

    Attributes:
      owners: of their blocks.
      tokens_P: the token of each row; the number of tokens at padding.
      slots_P: the choice of each row, see `expert_rows.Blocks`; the number of choices at padding.
      live_P1: which are not padding.
    """

    owners: Owners
    tokens_P: jax.Array
    slots_P: jax.Array
    live_P1: jax.Array

    def of_tokens(self, x_TD: jax.Array) -> jax.Array:
        """The tokens' rows of x; any row at padding."""
        return x_TD.at[self.tokens_P].get(mode="clip")

    def added(self, total_TD: jax.Array, rows_PD: jax.Array) -> jax.Array:
        """The sum of `total_TD` and each token's rows."""
        return total_TD.at[self.tokens_P].add(rows_PD, mode="drop")

    def weights(self, weights_TX: jax.Array) -> jax.Array:
        """The weights of the choices, float32 [P, 1]; 0 at padding."""
        weights_P = weights_TX.astype(jnp.float32).reshape(-1).at[self.slots_P].get(mode="clip")
        return jnp.where(self.live_P1, weights_P[:, None], 0)

    def of_experts(self, x_ED: jax.Array) -> jax.Array:
        """The row of x of each row's expert."""
        return jnp.repeat(x_ED[self.owners.experts_b], self.slots_P.shape[0] // self.owners.rows_b.shape[0], axis=0)


def _sorted_slots(index_TX: jax.Array, experts: int) -> jax.Array:
    """`expert_rows.Blocks.slots`, by a sort of one array where its keys fit in int32. A sort of pairs takes twice as long to compile."""
    index_R, rows = index_TX.reshape(-1), index_TX.size
    if (experts + 1) * rows > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(index_R, stable=True).astype(jnp.int32)
    return lax.sort(index_R * rows + jnp.arange(rows, dtype=jnp.int32), is_stable=False) % rows


def _over_rows(index_TX: jax.Array, experts: int, tiles: Tiles, start: Any, turn: Callable[[_Rows, Any], Any]) -> Any:
    """Calls `turn` on the rows of some blocks after another, and with its last result, until all rows of this device had their turn."""
    (tokens, share), slots_R, blocks = (
        index_TX.shape,
        _sorted_slots(index_TX, experts),
        cut_blocks(index_TX.reshape(-1), experts, tiles.rows),
    )
    most = blocks.shape[1]
    count = min(tiles.blocks, most)
    blocks = jnp.pad(blocks, ((0, 0), (0, -most % count)), mode="edge").at[2, most:].set(0)

    def rows_of(number: jax.Array) -> _Rows:
        experts_b, first_b, rows_b = lax.dynamic_slice_in_dim(blocks, number * count, count, axis=1)
        place_P = (first_b[:, None] + jnp.arange(tiles.rows)).reshape(-1)
        live_P = (jnp.arange(tiles.rows) < rows_b[:, None]).reshape(-1)
        slots_P = jnp.where(live_P, slots_R.at[place_P].get(mode="clip"), tokens * share)
        return _Rows(Owners(experts_b, rows_b), slots_P // share, slots_P, live_P[:, None])

    turns = -(-jnp.sum(blocks[2] > 0) // count)
    return lax.fori_loop(0, turns, lambda number, total: turn(rows_of(number), total), start)


class _Matrices:
    """The unpacked matrices and the adapters of a layer in the layouts of the kernels, for rows of a dtype.

    Attributes:
      gates, ups: [E, D, F].
      down: [E, F, D].
      a_up, a_down: [E, r, D] and [E, r, F]; None without adapters.
      b_gates, b_ups, b_down: [E, r, F], [E, r, F] and [E, r, D].
    """

    def __init__(self, adapters: tuple[Adapter, Adapter] | None, gate_up: Arrays, down: Arrays, layer: Layer, dtype: Any) -> None:
        self._layer, self._dtype = layer, dtype
        self.gates, self.ups = (_unpacked(gate_up, layer.tiles, part, 2) for part in range(2))
        self.down = _unpacked(down, layer.tiles)
        biases = gate_up["bias"][:, 0::2], gate_up["bias"][:, 1::2], down["bias"]
        self.bias_gates, self.bias_ups, self.bias_down = (bias.astype(jnp.float32) for bias in biases)
        self.adapted = adapters is not None
        self.a_up: Any = None
        self.a_down: Any = None
        self.b_gates: Any = None
        self.b_ups: Any = None
        self.b_down: Any = None
        if adapters is not None:
            (self.a_up, b_up), (self.a_down, b_down) = jax.tree.map(lambda x: x.astype(dtype), adapters)
            self.b_gates, self.b_ups, self.b_down = (b.swapaxes(1, 2) for b in (b_up[:, 0::2], b_up[:, 1::2], b_down))

    def low(self, scale: float, factors: list[tuple[jax.Array, Any]], owners: Owners) -> Any:
        """Rows times transposed matrices [E, r, K], scaled: float32 [P, r]; None without adapters."""
        return scale * grouped(factors, owners, self._layer.tiles, transposed=True) if self.adapted else None

    def second(self, low_Pr: Any, matrix: Any) -> Any:
        """An adapter's second product for the kernels; None without adapters."""
        return (low_Pr.astype(self._dtype), matrix) if self.adapted else None

    def activate(self, x_PD: jax.Array, owners: Owners) -> tuple[list[jax.Array], Any]:
        """Activation, gates and ups [P, F], and the adapter's rows [P, r]."""
        low_Pr = self.low(self._layer.scale_up, [(x_PD, self.a_up)], owners)
        halves = [
            (self.gates, self.bias_gates, self.second(low_Pr, self.b_gates)),
            (self.ups, self.bias_ups, self.second(low_Pr, self.b_ups)),
        ]
        return activation(x_PD, halves, owners, self._layer.tiles, limit=self._layer.limit, alpha=self._layer.alpha), low_Pr


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def moe_sorted(
    x_TD: jax.Array,
    weights_TX: jax.Array,
    adapters: tuple[Adapter, Adapter] | None,
    index_TX: jax.Array,
    gate_up: Arrays,
    down: Arrays,
    layer: Layer,
) -> jax.Array:
    """`moe_reference`'s sum, [T, D] float32, differentiable in `x_TD`, `weights_TX` and `adapters`.

    Args:
      x_TD: activations of this device's tokens.
      weights_TX, index_TX: the experts of each token, all different, and their weights. Without an exchange, the number of experts on this
        device stands for an expert on another device; rows of such choices are never computed. With one, the numbers are among the experts
        of all devices.
      adapters: of gate_up and of down, or None.
      gate_up, down: this device's matrices of one layer.
      layer: constants.
    """
    matrices, tiles, experts = _Matrices(adapters, gate_up, down, layer, x_TD.dtype), layer.tiles, down["bias"].shape[0]

    def of_chunk(chunk: _Chunk) -> jax.Array:
        def turn(rows: _Rows, total_GD: jax.Array) -> jax.Array:
            (active_PF, _, _), _ = matrices.activate(rows.of_tokens(chunk.x_GD), rows.owners)
            low_Pr = matrices.low(layer.scale_down, [(active_PF, matrices.a_down)], rows.owners)
            adapter = matrices.second(low_Pr, matrices.b_down)
            y_PD = grouped([(active_PF, matrices.down)], rows.owners, tiles, bias=matrices.bias_down, adapter=adapter)
            return rows.added(total_GD, rows.weights(chunk.weights_GX) * y_PD)

        start = jnp.zeros(chunk.x_GD.shape, jnp.float32)
        return layer.exchange.scatter(_over_rows(chunk.index_GX, experts, tiles, start, turn))

    chunks = _cut(x_TD, weights_TX, index_TX, layer.exchange)
    y_ntD = lax.map(lambda own: of_chunk(_gathered(own, experts, layer.exchange)), chunks)
    return layer.exchange.join(y_ntD, x_TD.shape[0])


class _Chunk(NamedTuple):
    """Tokens G of a chunk on all devices.

    Attributes:
      x_GD, weights_GX: activations, and weights of the choices.
      index_GX: the choices, relative to this device's experts.
    """

    x_GD: jax.Array
    weights_GX: jax.Array
    index_GX: jax.Array


def _cut(x_TD: jax.Array, weights_TX: jax.Array, index_TX: jax.Array, exchange: Exchange) -> tuple[jax.Array, ...]:
    """This device's tokens in chunks: activations, weights and choices. Padding chooses no expert."""
    return exchange.split(x_TD), exchange.split(weights_TX), exchange.split(index_TX, -1)


def _gathered(own: tuple[jax.Array, ...], experts: int, exchange: Exchange) -> _Chunk:
    x_GD, weights_GX, index_GX = map(exchange.gather, own)
    return _Chunk(x_GD, weights_GX, exchange.own(index_GX, experts))


def _forward(*arguments: Any) -> tuple[jax.Array, tuple]:
    return moe_sorted(*arguments), arguments[:-1]


def _backward(layer: Layer, kept: Any, d_out_TD: jax.Array) -> tuple:
    """Does not need the output of `down`: with y = W active + b, the weight's gradient is d_out y = (W^T d_out) active + d_out b."""
    x_TD, weights_TX, adapters, index_TX, gate_up, down = kept
    matrices, exchange, experts = _Matrices(adapters, gate_up, down, layer, x_TD.dtype), layer.exchange, down["bias"].shape[0]

    def add_chunk(d_adapters: Any, chunk: tuple[tuple[jax.Array, ...], jax.Array]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        own, d_out_tD = chunk
        of_all = _gathered(own, experts, exchange)
        # Rounding before the exchange gives the same numbers as rounding after it, with half of the bytes.
        d_x_GD, d_weights_GX, d_adapters = _chunk_gradients(
            matrices, layer, of_all, exchange.gather(d_out_tD.astype(x_TD.dtype)), d_adapters
        )
        return d_adapters, (exchange.scatter(d_x_GD.astype(x_TD.dtype)), exchange.scatter(d_weights_GX))

    start = None
    if adapters is not None:
        like = matrices.a_up, matrices.b_gates, matrices.b_ups, matrices.a_down, matrices.b_down
        start = [jnp.zeros(one.shape, jnp.float32) for one in like]
    chunks = _cut(x_TD, weights_TX, index_TX, exchange), exchange.split(d_out_TD)
    found, (d_x_ntD, d_weights_ntX) = lax.scan(add_chunk, start, chunks)
    d_adapters = None
    if adapters is not None:
        a_up, b_gates, b_ups, a_down, b_down = found
        found = (a_up, _alternating(b_gates, b_ups)), (a_down, b_down.swapaxes(1, 2))
        d_adapters = jax.tree.map(lambda gradient, own: gradient.astype(own.dtype), found, adapters)
    d_x_TD, d_weights_TX = (exchange.join(x_nt, x_TD.shape[0]) for x_nt in (d_x_ntD, d_weights_ntX))
    return d_x_TD, d_weights_TX.astype(weights_TX.dtype), d_adapters, None, None, None


def _chunk_gradients(
    matrices: _Matrices, layer: Layer, chunk: _Chunk, d_out_GD: jax.Array, d_adapters: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """The gradients in activations and weights of a chunk, float32 [G, D] and [G, X], and `d_adapters` with those of the chunk added."""
    tiles, experts = layer.tiles, matrices.bias_down.shape[0]

    def turn(rows: _Rows, totals: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        d_x_GD, d_weights_R, d_adapters = totals
        x_PD, d_PD, weights_P1 = rows.of_tokens(chunk.x_GD), rows.of_tokens(d_out_GD), rows.weights(chunk.weights_GX)
        (active_PF, gates_PF, ups_PF), low_up_Pr = matrices.activate(x_PD, rows.owners)
        # First the gradients of `down` for outputs with weight 1.
        d_low_down_Pr = matrices.low(layer.scale_down, [(d_PD, matrices.b_down)], rows.owners)
        d_active_PF = grouped(
            [(d_PD, matrices.down)],
            rows.owners,
            tiles,
            transposed=True,
            adapter=matrices.second(d_low_down_Pr, matrices.a_down),
            dtype=d_PD.dtype,
        ).astype(jnp.float32)
        d_weights_P = jnp.sum(d_active_PF * active_PF.astype(jnp.float32), axis=1)
        d_weights_P += jnp.sum(d_PD.astype(jnp.float32) * rows.of_experts(matrices.bias_down.astype(d_PD.dtype)), axis=1)
        d_gates_PF, d_ups_PF = _activation_gradient(gates_PF, ups_PF, weights_P1 * d_active_PF, layer)
        d_low_up_Pr = matrices.low(layer.scale_up, [(d_gates_PF, matrices.b_gates), (d_ups_PF, matrices.b_ups)], rows.owners)
        adapter = matrices.second(d_low_up_Pr, matrices.a_up)
        factors = [(d_gates_PF, matrices.gates), (d_ups_PF, matrices.ups)]
        d_x_PD = grouped(factors, rows.owners, tiles, transposed=True, adapter=adapter)
        if d_adapters is not None:
            low_down_Pr = matrices.low(layer.scale_down, [(active_PF, matrices.a_down)], rows.owners)
            pairs = (
                (d_low_up_Pr, x_PD),
                (low_up_Pr, d_gates_PF),
                (low_up_Pr, d_ups_PF),
                (weights_P1 * d_low_down_Pr, active_PF),
                (weights_P1 * low_down_Pr, d_PD),
            )
            of_rows = [outer(jnp.where(rows.live_P1, v_Pr, 0), u_PN, experts, rows.owners, tiles) for v_Pr, u_PN in pairs]
            d_adapters = jax.tree.map(jnp.add, d_adapters, of_rows)
        return rows.added(d_x_GD, d_x_PD), d_weights_R.at[rows.slots_P].set(d_weights_P, mode="drop"), d_adapters

    start = jnp.zeros(chunk.x_GD.shape, jnp.float32), jnp.zeros(chunk.index_GX.size, jnp.float32), d_adapters
    d_x_GD, d_weights_R, d_adapters = _over_rows(chunk.index_GX, experts, tiles, start, turn)
    return d_x_GD, d_weights_R.reshape(chunk.index_GX.shape), d_adapters


def _activation_gradient(gates_PF: jax.Array, ups_PF: jax.Array, d_active_PF: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
    """The gradient of kernels.experts.gated in gates and ups, in their dtype; zero where they are clamped."""

    def in_float32(gates_PF: jax.Array, ups_PF: jax.Array) -> jax.Array:
        return activate(gates_PF.astype(jnp.float32), ups_PF.astype(jnp.float32), limit=layer.limit, alpha=layer.alpha)

    _, pull = jax.vjp(in_float32, gates_PF, ups_PF)
    return pull(d_active_PF)


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
    axis: str = "",
) -> jax.Array:
    """`MixtureOfExperts` by the kernels, for packed experts in both layouts (`lanes` or `blocks`) or dense ones (`weight`); differentiable.

    If `axis` names a mesh axis, tokens are exchanged along it: x, choices and weights are those of this device's tokens, and choices are
    numbers among the experts of all devices. If the kernels do not support the arguments, uses the reference and logs the reason once.
    """
    arrays = [dict(matrix.arrays(adapted=adapted)) for matrix in (gate_up, down)]
    if reason := _reason_against(x_TD, arrays, layer):
        warn_reference("experts", reason, "tpu")
        options: dict[str, Any] = {"experts": experts, "adapted": adapted, "limit": limit, "alpha": alpha, "layer": layer}
        moe = functools.partial(exchanged, moe_reference, axis) if axis else moe_reference
        return moe(x_TD, index_TX, weights_TX, gate_up, down, **options)
    adapters: Any = tuple((own.pop("lora_a"), own.pop("lora_b")) for own in arrays) if "lora_a" in arrays[0] else None
    exchange = Exchange(axis, TOKENS_AT_ONCE, TOKEN_TILE)
    choices = exchange.gathered(index_TX.shape[0]) * index_TX.shape[1]
    tiles = choose_tiles(choices, experts + elsewhere, experts)
    constants = Layer(limit, alpha, gate_up.scale, down.scale, tiles, exchange)
    return moe_sorted(x_TD, weights_TX, adapters, index_TX, *arrays, constants)


def _reason_against(x_TD: jax.Array, arrays: list[Arrays], layer: jax.Array | None) -> str:
    """Why the kernels do not support these arguments; empty if they do."""
    if any(own.keys().isdisjoint(("lanes", "blocks", "weight")) for own in arrays):
        return "the experts are neither packed nor dense"
    if any(own["weight"].dtype != jnp.bfloat16 for own in arrays if "weight" in own):
        return "the experts' weights are not bfloat16"
    return experts_update_refusal(x_TD, arrays, layer)
