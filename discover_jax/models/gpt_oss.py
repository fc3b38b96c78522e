"""gpt-oss as pure functions over two pytrees, frozen and lora: the form in which everything jitted sees the model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from discover_jax.exceptions import CapacityError, ConfigError
from discover_jax.models.cache import Cache
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.layers import GptOss, Layer, Pair, rms_norm
from discover_jax.models.parameters import Frozen, Lora, Tree, abstract_tree, init_tree
from discover_jax.models.sharding import sharding_for

EXPERTS = ("packed", "dense")


@dataclasses.dataclass(frozen=True)
class Model:
    """A hashable handle without arrays; its methods are pure and may be called inside jit.

    Attributes:
      config, lora: sizes, and the adapter's ranks.
      dtype: of activations and of weights that are not MXFP4.
      experts: "packed" keeps the experts in MXFP4, unpacking where they are used; "dense" holds them in `dtype`.
      mesh: devices over which parameters are laid out, or None for the default device.
      remat: recompute each pair of layers in the backward pass instead of keeping its activations.

    In all methods `lora` may be None: the base model.
    """

    config: ModelConfig
    lora: LoraConfig = LoraConfig()  # noqa: RUF009 - frozen
    dtype: Any = jnp.float32
    experts: str = "dense"
    mesh: Mesh | None = None
    remat: bool = True

    def __post_init__(self):
        if self.experts not in EXPERTS:
            raise ConfigError(f"experts = {self.experts!r} is not known; allowed: {', '.join(EXPERTS)}.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # so that jnp.float32 and "float32" hash alike

    # Parameters

    def abstract_frozen(self) -> Tree:
        """Shapes and types of the base weights, with shardings if there is a mesh."""
        return abstract_tree(_declared(self).frozen, self.mesh)

    def abstract_lora(self) -> Tree:
        """Shapes and types of the adapter, with shardings if there is a mesh."""
        return abstract_tree(_declared(self).lora, self.mesh)

    def init_frozen(self, key: jax.Array) -> Tree:
        """Random base weights, made on the devices."""
        return jax.jit(lambda key: init_tree(_declared(self).frozen, key, self.mesh))(key)

    def init_lora(self, key: jax.Array) -> Tree:
        """A fresh adapter: its products are zero, so that the policy equals the base exactly."""
        return jax.jit(lambda key: init_tree(_declared(self).lora, key, self.mesh))(key)

    # Whole sequences

    def hidden(self, frozen: Tree, lora: Tree | None, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """The stream after the final norm, [B, T, D].

        Args:
          tokens_BT, positions_BT: int32; positions restart in each segment.
          segments_BT: int32; a token sees earlier tokens of its own segment only; 0 is padding, whose outputs mean nothing.
        """
        return self._forward(frozen, lora, tokens_BT, positions_BT, segments_BT, keep=None)[0]

    def logits(self, frozen: Tree, lora: Tree | None, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        head = self._bind({"head": frozen["head"]}, lora and {"head": lora.get("head", {})})
        return head.head(hidden, adapted=lora is not None, out_dtype=jnp.float32)

    # Token by token

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache of `batch` rows with room for `capacity` tokens each."""
        c = self.config
        full = (c.num_pairs, batch, c.num_kv_heads, capacity, c.head_size)
        ring = (c.num_pairs, batch, c.num_kv_heads, c.sliding_window, c.head_size)
        full_k, full_v, ring_k, ring_v = (jnp.zeros(shape, self.dtype) for shape in (full, full, ring, ring))
        return Cache(full_k, full_v, ring_k, ring_v, jnp.zeros(batch, jnp.int32))

    def abstract_cache(self, batch: int, capacity: int, axis: str = "batch") -> Cache:
        """Shapes and types of a cache, with shardings if there is a mesh; `axis` is the logical axis of its rows.

        Raises:
          ShardingError: rows or heads do not divide by their mesh axis.
        """
        cache, mesh = jax.eval_shape(lambda: self.init_cache(batch, capacity)), self.mesh
        if mesh is None:
            return cache

        def lay_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = (axis,) if leaf.ndim == 1 else ("pairs", axis, "kv_heads", "positions", "head_size")
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_for(axes, leaf.shape, mesh))

        return jax.tree.map(lay_out, cache)

    def prefill(
        self, frozen: Tree, lora: Tree | None, tokens_BT: jax.Array, lengths_B: jax.Array, capacity: int
    ) -> tuple[jax.Array, Cache]:
        """Reads prompts, right-padded, each of at least one token.

        Returns:
          The stream after the final norm at each row's last token, [B, D], and a cache of that capacity.

        Raises:
          CapacityError: the rows are longer than `capacity`.
        """
        batch, length = tokens_BT.shape
        if length > capacity:
            raise CapacityError(f"Prompts padded to {length} tokens do not fit a cache of {capacity}; make max_prompt_tokens larger.")
        window = self.config.sliding_window
        positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
        # Place w of a ring holds the last position that is congruent to w; before the row's start there is none, and decode masks it.
        places_BW = lengths_B[:, None] - 1 - (lengths_B[:, None] - 1 - jnp.arange(window)) % window

        def keep(sliding: tuple[jax.Array, jax.Array], full: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            rows = jnp.clip(places_BW, 0)[:, None, :, None]
            rings = [jnp.take_along_axis(x_BKTH, rows, axis=2) for x_BKTH in sliding]
            padding = ((0, 0), (0, 0), (0, capacity - length), (0, 0))
            return (*(jnp.pad(x_BKTH, padding) for x_BKTH in full), *rings)

        hidden_BTD, (full_k, full_v, ring_k, ring_v) = self._forward(frozen, lora, tokens_BT, positions_BT, segments_BT, keep=keep)
        last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return last_BD, Cache(full_k, full_v, ring_k, ring_v, lengths_B.astype(jnp.int32))

    def decode(self, frozen: Tree, lora: Tree | None, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads one more token a row, at position `cache.lengths_B`, which must be below the capacity.

        Returns:
          The stream after the final norm [B, D], and the cache with the token.
        """
        c, adapted = self.config, lora is not None
        positions_B1, rows_B = cache.lengths_B[:, None], jnp.arange(tokens_B.shape[0])
        places_B = cache.lengths_B % c.sliding_window
        x_BTD = frozen["embedding"][tokens_B][:, None].astype(self.dtype)
        counts_full = cache.lengths_B + 1
        counts_ring = jnp.minimum(counts_full, c.sliding_window)  # after the write; a ring fills from its first place

        def read(layer: Layer, x_BTD: jax.Array, keys: jax.Array, values: jax.Array, pair: jax.Array, places: jax.Array, counts: jax.Array):
            q, k_B1KH, v_B1KH = layer.attention.project(x_BTD, positions_B1, adapted=adapted)
            keys = keys.at[pair, rows_B, :, places].set(k_B1KH[:, 0])
            values = values.at[pair, rows_B, :, places].set(v_B1KH[:, 0])
            x_BTD += layer.attention.attend_cached(q, keys, values, pair, counts, adapted=adapted)
            return x_BTD + layer.experts(x_BTD, adapted=adapted), keys, values

        # The caches travel as the loop's carry, so that each step writes one place instead of copying them.
        def step(carry: tuple[jax.Array, ...], parameters: tuple[jax.Array, Tree, Tree]):
            x_BTD, full_k, full_v, ring_k, ring_v = carry
            index, frozen_pair, lora_pair = parameters
            pair = self._bind_pair(frozen_pair, lora_pair)
            x_BTD, ring_k, ring_v = read(pair.sliding, x_BTD, ring_k, ring_v, index, places_B, counts_ring)
            x_BTD, full_k, full_v = read(pair.full, x_BTD, full_k, full_v, index, cache.lengths_B, counts_full)
            return (x_BTD, full_k, full_v, ring_k, ring_v), None

        carry = (x_BTD, cache.full_k_LBKSH, cache.full_v_LBKSH, cache.ring_k_LBKWH, cache.ring_v_LBKWH)
        carry, _ = jax.lax.scan(step, carry, (jnp.arange(c.num_pairs), frozen["pairs"], (lora or {}).get("pairs", {})))
        x_BTD, full_k, full_v, ring_k, ring_v = carry
        return rms_norm(x_BTD[:, 0], frozen["norm"], c.rms_eps), Cache(full_k, full_v, ring_k, ring_v, cache.lengths_B + 1)

    # Inside

    def _forward(
        self,
        frozen: Tree,
        lora: Tree | None,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        keep: Callable[..., tuple[jax.Array, ...]] | None,
    ) -> tuple[jax.Array, Any]:
        """`hidden`, and what `keep` makes of the sliding and the full layer's keys and values [B, K, T, H] of each pair, stacked."""
        c, adapted = self.config, lora is not None
        distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
        full_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, None, :] > 0) & (distance_BTT >= 0)
        sliding_BTT = full_BTT & (distance_BTT < c.sliding_window)

        def read(layer: Layer, x_BTD: jax.Array, seen_BTT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            q, k, v = layer.attention.project(x_BTD, positions_BT, adapted=adapted)
            k_BKTH, v_BKTH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
            x_BTD += layer.attention.attend(q, k_BKTH, v_BKTH, seen_BTT, adapted=adapted)
            return x_BTD + layer.experts(x_BTD, adapted=adapted), (k_BKTH, v_BKTH)

        def step(x_BTD: jax.Array, parameters: tuple[Tree, Tree]):
            pair = self._bind_pair(*parameters)
            x_BTD, sliding = read(pair.sliding, x_BTD, sliding_BTT)
            x_BTD, full = read(pair.full, x_BTD, full_BTT)
            return x_BTD, keep(sliding, full) if keep is not None else None

        if self.remat and keep is None:
            step = jax.checkpoint(step)
        x_BTD = frozen["embedding"][tokens_BT].astype(self.dtype)
        x_BTD, kept = jax.lax.scan(step, x_BTD, (frozen["pairs"], (lora or {}).get("pairs", {})))
        return rms_norm(x_BTD, frozen["norm"], c.rms_eps), kept

    def _bind(self, frozen: Tree, lora: Tree | None) -> GptOss:
        """The module with these arrays; what is left out of the trees stays a declaration."""
        return _merge(_declared(self), frozen, lora)

    def _bind_pair(self, frozen: Tree, lora: Tree) -> Pair:
        """A pair of layers with its slice of the stacked arrays; an empty `lora` leaves the adapter out."""
        return self._bind({"pairs": frozen}, {"pairs": lora} if lora else None).pairs


@dataclasses.dataclass(frozen=True)
class _Declared:
    """A model's modules without arrays, split at the border."""

    graph: nnx.GraphDef
    frozen: nnx.State
    lora: nnx.State


@functools.cache
def _declared(model: Model) -> _Declared:
    module = GptOss(model.config, model.lora, model.dtype, packed=model.experts == "packed")
    return _Declared(*nnx.split(module, Frozen, Lora))


def _merge(declared: _Declared, frozen: Tree, lora: Tree | None) -> GptOss:
    def bound(state: nnx.State, tree: Tree | None) -> nnx.State:
        bound = nnx.map_state(lambda _, variable: variable.copy(), state)
        if tree:
            nnx.replace_by_pure_dict(bound, tree)
        return bound

    return nnx.merge(declared.graph, bound(declared.frozen, frozen), bound(declared.lora, lora))
