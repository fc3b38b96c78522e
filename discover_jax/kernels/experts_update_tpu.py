"""The mixture of experts in the update, on a TPU: grouped products of sorted rows, with derivatives.

Exact and dropless for any routing, with the rounding points of the GPU's kernels. Devices that share the experts exchange their tokens in
chunks. In a chunk, rows are sorted by expert into blocks that each belong to one expert. A loop computes some blocks at a time, until all
rows of this device's experts are done. So memory does not grow with the number of devices. A layer's MXFP4 is unpacked to bfloat16 once in
the forward pass and once in the backward pass, and never kept. The backward pass keeps only the inputs of this device. It recomputes gates
and ups, but not the output.

The kernels were compiled for TPUs and interpreted on a CPU. No TPU has run them.

Dimensions: R choices of experts of all tokens, P rows of a loop's blocks, F width of an expert.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax

from discover_jax.kernels.exchange import Exchange, chunk_of, exchanged
from discover_jax.kernels.exchange_ring import Ring, Visit, around
from discover_jax.kernels.expert_matrices_tpu import Adapter, Arrays, Layer, Matrices, alternating
from discover_jax.kernels.expert_rows import cut_blocks
from discover_jax.kernels.experts import ExpertMatrix, moe_reference
from discover_jax.kernels.experts_update_pallas import Owners, Tiles, activation_gradient, grouped, outer
from discover_jax.kernels.fallback import experts_update_refusal, warn_reference
from discover_jax.kernels.ring import TILE as RING_TILE

ROWS = (512, 256, 128)
"""Possible rows of a block. Larger ones read weights less often, and waste more: half a block per expert."""
ROWS_AT_ONCE = 16_384
"""Most rows of all blocks that the loop computes at once. Their arrays take about 1 GB at gpt-oss's width."""
TOKENS_AT_ONCE = 49_152
"""Most tokens that are exchanged at once: those of all devices, or those of a visit to a device of a ring. Their arrays take 1.1 GB in the
backward pass at gpt-oss's width."""
TOKEN_TILE = 16
"""Tokens of a chunk on a device are a multiple of this. A TPU stores 16 rows of bfloat16 together; XLA copies other chunks into another
layout before and after it gathers them."""
ROWS_OF_RING = ROWS[1]
"""Rows of the blocks that a visit's tokens must allow, by the rule of `choose_tiles`, to go around a ring."""
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
    matrices, tiles, experts = Matrices(adapters, gate_up, down, layer, x_TD.dtype), layer.tiles, down["bias"].shape[0]

    def of_tokens(chunk: _Chunk, start_GD: jax.Array) -> jax.Array:
        def turn(rows: _Rows, total_GD: jax.Array) -> jax.Array:
            (active_PF, _, _), _ = matrices.activate(rows.of_tokens(chunk.x_GD), rows.owners)
            low_Pr = matrices.low(layer.scale_down, [(active_PF, matrices.a_down)], rows.owners)
            adapter = matrices.second(low_Pr, matrices.b_down)
            weights_P1 = rows.weights(chunk.weights_GX)
            options: dict[str, Any] = {"bias": matrices.bias_down, "adapter": adapter, "weights_P1": weights_P1}
            return rows.added(total_GD, grouped([(active_PF, matrices.down)], rows.owners, tiles, **options))

        return _over_rows(chunk.index_GX, experts, tiles, start_GD, turn)

    def of_chunk(own: tuple[jax.Array, ...]) -> jax.Array:
        if not layer.exchange.ring:
            chunk = _gathered(own, experts, layer.exchange)
            return layer.exchange.scatter(of_tokens(chunk, jnp.zeros(chunk.x_GD.shape, jnp.float32)))
        chosen = _Chosen.gathered(own, layer.exchange)

        def compute(_: None, visit: Visit) -> tuple[None, jax.Array]:
            return None, of_tokens(chosen.chunk(visit, experts), visit.start_tD)

        return around(chosen.ring, own[:1], None, compute, jnp.float32, tiles.interpret)[1]

    y_ntD = lax.map(of_chunk, _cut(x_TD, weights_TX, index_TX, layer.exchange))
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


class _Chosen(NamedTuple):
    """The choices of all devices' tokens in a chunk whose activations go around a ring. They are small, so each device gathers them.

    Attributes:
      exchange: has the ring.
      weights_ntX, index_ntX: weights of the choices, and experts among those of all devices.
    """

    exchange: Exchange
    weights_ntX: jax.Array
    index_ntX: jax.Array

    @classmethod
    def gathered(cls, own: tuple[jax.Array, ...], exchange: Exchange) -> "_Chosen":
        return cls(exchange, *(lax.all_gather(x_tX, exchange.axis) for x_tX in own[1:]))

    @property
    def ring(self) -> Ring:
        return Ring(self.exchange.axis, self.exchange.ring)

    def chunk(self, visit: Visit, experts: int) -> _Chunk:
        """The visitors, for this device's experts."""
        weights_tX, index_tX = (visit.sources.of(x_ntX) for x_ntX in (self.weights_ntX, self.index_ntX))
        return _Chunk(visit.arrays[0], weights_tX, self.exchange.own(index_tX, experts))


def _forward(*arguments: Any) -> tuple[jax.Array, tuple]:
    return moe_sorted(*arguments), arguments[:-1]


def _backward(layer: Layer, kept: Any, d_out_TD: jax.Array) -> tuple:
    """Does not need the output of `down`: with y = W active + b, the weight's gradient is d_out y = (W^T d_out) active + d_out b."""
    x_TD, weights_TX, adapters, index_TX, gate_up, down = kept
    matrices, exchange, experts = Matrices(adapters, gate_up, down, layer, x_TD.dtype), layer.exchange, down["bias"].shape[0]

    def add_chunk(d_adapters: Any, chunk: tuple[tuple[jax.Array, ...], jax.Array]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        own, d_out_tD = chunk
        if exchange.ring:
            return _ring_gradients(matrices, layer, own, d_out_tD, d_adapters)
        of_all = _gathered(own, experts, exchange)
        # Rounding before the exchange gives the same numbers as rounding after it, with half of the bytes.
        d_x_GD, d_weights_GX, d_adapters = _chunk_gradients(
            matrices, layer, of_all, exchange.gather(d_out_tD.astype(x_TD.dtype)), d_adapters, jnp.zeros(of_all.x_GD.shape, jnp.float32)
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
        found = (a_up, alternating(b_gates, b_ups)), (a_down, b_down.swapaxes(1, 2))
        d_adapters = jax.tree.map(lambda gradient, own: gradient.astype(own.dtype), found, adapters)
    d_x_TD, d_weights_TX = (exchange.join(x_nt, x_TD.shape[0]) for x_nt in (d_x_ntD, d_weights_ntX))
    return d_x_TD, d_weights_TX.astype(weights_TX.dtype), d_adapters, None, None, None


def _ring_gradients(
    matrices: Matrices, layer: Layer, own: tuple[jax.Array, ...], d_out_tD: jax.Array, d_adapters: Any
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """As `_chunk_gradients`, for this device's tokens of a chunk that goes around a ring. Returns the adapters' gradients first."""
    chosen, experts, (x_tD, weights_tX, _) = _Chosen.gathered(own, layer.exchange), matrices.bias_down.shape[0], own

    def compute(state: tuple[Any, jax.Array], visit: Visit) -> tuple[tuple[Any, jax.Array], jax.Array]:
        d_adapters, d_weights_ntX = state
        d_x_GD, d_weights_GX, d_adapters = _chunk_gradients(
            matrices, layer, chosen.chunk(visit, experts), visit.arrays[1], d_adapters, visit.start_tD
        )
        return (d_adapters, visit.sources.put(d_weights_ntX, d_weights_GX)), d_x_GD

    start = d_adapters, jnp.zeros((len(layer.exchange.ring), *weights_tX.shape), jnp.float32)
    (d_adapters, d_weights_ntX), d_x_tD = around(
        chosen.ring, (x_tD, d_out_tD.astype(x_tD.dtype)), start, compute, x_tD.dtype, layer.tiles.interpret
    )
    # Each choice has its gradient on one device and 0 on the others.
    return d_adapters, (d_x_tD, lax.psum_scatter(d_weights_ntX, layer.exchange.axis))


def _chunk_gradients(
    matrices: Matrices, layer: Layer, chunk: _Chunk, d_out_GD: jax.Array, d_adapters: Any, start_GD: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """The gradients in activations and weights of a chunk, float32 [G, D] and [G, X], and `d_adapters` with those of the chunk added.

    `start_GD`: zeros, to which the gradient in activations is added."""
    tiles, experts = layer.tiles, matrices.bias_down.shape[0]

    def turn(rows: _Rows, totals: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        d_x_GD, d_weights_R, d_adapters = totals
        x_PD, d_PD, weights_P1 = rows.of_tokens(chunk.x_GD), rows.of_tokens(d_out_GD), rows.weights(chunk.weights_GX)
        forward, low_up_Pr = matrices.activate(x_PD, rows.owners)
        active_PF = forward[0]
        # First the gradients of `down` for outputs with weight 1.
        d_low_down_Pr, d_weights_P = matrices.back_through_down(d_PD, rows.owners)
        options: dict[str, Any] = {"adapter": matrices.second(d_low_down_Pr, matrices.a_down), "limit": layer.limit, "alpha": layer.alpha}
        d_gates_PF, d_ups_PF, more_P = activation_gradient(d_PD, matrices.down, forward, weights_P1, rows.owners, tiles, **options)
        d_weights_P += more_P
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

    start = start_GD, jnp.zeros(chunk.index_GX.size, jnp.float32), d_adapters
    d_x_GD, d_weights_R, d_adapters = _over_rows(chunk.index_GX, experts, tiles, start, turn)
    return d_x_GD, d_weights_R.reshape(chunk.index_GX.shape), d_adapters


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
    ring: tuple[int, ...] = (),
) -> jax.Array:
    """`MixtureOfExperts` by the kernels, for packed experts in both layouts (`lanes` or `blocks`) or dense ones (`weight`); differentiable.

    If `axis` names a mesh axis, tokens are exchanged along it: x, choices and weights are those of this device's tokens, and choices are
    numbers among the experts of all devices. They go around `ring`, the devices along the axis in this order, if there are enough of them
    (see `use_ring`). If the kernels do not support the arguments, uses the reference and logs the reason once.
    """
    arrays = [dict(matrix.arrays(adapted=adapted)) for matrix in (gate_up, down)]
    if reason := _reason_against(x_TD, arrays, layer):
        warn_reference("experts", reason, "tpu")
        options: dict[str, Any] = {"experts": experts, "adapted": adapted, "limit": limit, "alpha": alpha, "layer": layer}
        moe = functools.partial(exchanged, moe_reference, axis) if axis else moe_reference
        return moe(x_TD, index_TX, weights_TX, gate_up, down, **options)
    adapters: Any = tuple((own.pop("lora_a"), own.pop("lora_b")) for own in arrays) if "lora_a" in arrays[0] else None
    if axis and lax.axis_size(axis) > 1:
        used = use_ring(len(ring), index_TX.shape[0], index_TX.shape[1], experts + elsewhere)
        _note_exchange(lax.axis_size(axis), used)
        ring = ring if used else ()
    else:
        ring = ()
    exchange = Exchange(axis, TOKENS_AT_ONCE, 2 * RING_TILE if ring else TOKEN_TILE, ring)
    choices = exchange.gathered(index_TX.shape[0]) * index_TX.shape[1]
    tiles = choose_tiles(choices, experts + elsewhere, experts)
    constants = Layer(limit, alpha, gate_up.scale, down.scale, tiles, exchange)
    return moe_sorted(x_TD, weights_TX, adapters, index_TX, *arrays, constants)


def use_ring(devices: int, tokens: int, experts_per_token: int, experts: int) -> bool:
    """Whether the tokens of a device go around the ring. Otherwise, chunks of all devices' tokens are gathered.

    A visit computes a chunk of one device's tokens. If they are few, the blocks of the experts' rows are mostly padding.

    Args:
      devices: of the ring.
      tokens: of a device.
      experts_per_token: those that the router chooses.
      experts: of all devices.
    """
    return devices > 1 and chunk_of_ring(tokens) * experts_per_token >= 4 * ROWS_OF_RING * experts


def chunk_of_ring(tokens: int) -> int:
    """A device's tokens that visit another device at once."""
    return chunk_of(tokens, 1, TOKENS_AT_ONCE, 2 * RING_TILE)


@functools.cache
def _note_exchange(devices: int, ring: bool) -> None:
    """Logs once (`--verbosity=0`) how tokens are exchanged."""
    how = "they go around a ring" if ring else "all devices' tokens are gathered in chunks, because the visits of a ring would have too few"
    logging.info("exchange of the experts' tokens between %d devices in the update: %s", devices, how)


def _reason_against(x_TD: jax.Array, arrays: list[Arrays], layer: jax.Array | None) -> str:
    """Why the kernels do not support these arguments; empty if they do."""
    if any(own.keys().isdisjoint(("lanes", "blocks", "weight")) for own in arrays):
        return "the experts are neither packed nor dense"
    if any(own["weight"].dtype != jnp.bfloat16 for own in arrays if "weight" in own):
        return "the experts' weights are not bfloat16"
    return experts_update_refusal(x_TD, arrays, layer)
