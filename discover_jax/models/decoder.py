"""A decoder-only model as pure functions of two pytrees: `frozen` (base weights) and `lora` (adapter). Safe to call inside jit."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from discover_jax.exceptions import ConfigError, ShardingError
from discover_jax.kernels.experts_decode_tpu import lay_out_trees
from discover_jax.kernels.kernel_set import REFERENCE, KernelSet, reference_set
from discover_jax.kernels.mxfp4_tiles import SLABS
from discover_jax.kernels.packed_attention import ATTENTION
from discover_jax.kernels.projections import Stack
from discover_jax.kernels.spread import can_spread, row_devices, rows_axes
from discover_jax.models.attention import Attention
from discover_jax.models.binding import Declared, bind, declared, join, split_matrices
from discover_jax.models.cache import Cache, Pool, copy_page
from discover_jax.models.config import REMAT, LoraConfig, ModelConfig
from discover_jax.models.drafts import keep_in_rings, locate_drafts, windows_of
from discover_jax.models.fused_layer import STACKED, check_fusable, decode_fused
from discover_jax.models.layers import Layer, Repeat
from discover_jax.models.parameters import Tree, abstract_tree, init_tree
from discover_jax.models.places import TokenPlaces, keep_chunk, locate_chunk, locate_in_pages, locate_in_rings
from discover_jax.models.projection import rms_norm
from discover_jax.models.rope import turns_of
from discover_jax.models.sharding import sharding_for, shardings

EXPERTS = ("packed", "tiled", "lanes", "dense")
_LAYER = "layer"
"""Name of a sliding layer's output for rematerialisation policies. A full layer's output is the scan's carry, which is always kept."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A hashable description of the model, without arrays. Its methods are pure and may be called inside jit.

    In all methods, `lora` = None means the base model.

    Attributes:
      config, lora: sizes, and the adapter's ranks.
      dtype: type of the inputs of products, and of weights that are not MXFP4. The residual stream and all sums are float32, and are
        rounded when a product reads them. Sampler and update round at the same places with any kernels.
      experts: form of the experts' weights. "packed": MXFP4, unpacked where used. "tiled": the same bits in the order that the decoding
        kernels of GPUs need (the sizes must pass kernels.mxfp4_tiles.check_sizes). "lanes": in that of TPUs (kernels.mxfp4_lanes).
        "dense": `dtype`.
      mesh: devices for the parameters; None for the default device.
      remat: what the backward pass of whole sequences recomputes. "pairs": everything; only the input of each repeat of the
        layers' pattern is kept, which in gpt-oss is a pair of layers.
        "layers": everything except attention; the residuals of its backward pass are kept too. "none": nothing.
      kernels: one implementation per operation, see kernels.kernel_set. Default: the references, spread over the mesh.
    """

    config: ModelConfig
    lora: LoraConfig = LoraConfig()  # noqa: RUF009 - frozen
    dtype: Any = jnp.float32
    experts: str = "dense"
    mesh: Mesh | None = None
    remat: str = "layers"
    kernels: KernelSet = REFERENCE

    def __post_init__(self):
        if self.experts not in EXPERTS:
            raise ConfigError(f"experts must be one of {', '.join(EXPERTS)}; got {self.experts!r}.")
        if self.remat not in REMAT:
            raise ConfigError(f"remat must be one of {', '.join(REMAT)}; got {self.remat!r}.")
        if self.kernels == REFERENCE:
            object.__setattr__(self, "kernels", reference_set(self.mesh))
        if self.kernels.layer is not None:
            check_fusable(self.config, self.kernels)
        if self.kernels.mesh != reference_set(self.mesh).mesh:
            raise ConfigError(
                f"The kernels were built for mesh {self.kernels.mesh}, but the model for {self.mesh}. Build both with the same mesh."
            )
        object.__setattr__(self, "lora", self.lora.of_model(self.config))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # so that jnp.float32 and "float32" hash alike

    # Parameters

    def abstract_frozen(self) -> Tree:
        """Shapes and types of the base weights; with shardings if there is a mesh."""
        return abstract_tree(self._declared.frozen, self.mesh)

    def abstract_lora(self) -> Tree:
        """Shapes and types of the adapter; with shardings if there is a mesh."""
        return abstract_tree(self._declared.lora, self.mesh)

    def init_frozen(self, key: jax.Array) -> Tree:
        """Random base weights, created on the devices."""
        return self._init(self._declared.frozen, self.abstract_frozen(), key)

    def init_lora(self, key: jax.Array) -> Tree:
        """A new adapter. Its products are zero, so the policy equals the base model exactly."""
        return self._init(self._declared.lora, self.abstract_lora(), key)

    def cast(self, lora: Tree | None) -> Tree | None:
        """The adapter in the model's type. Products round it to this type anyway, so results are bit-identical."""
        return jax.tree.map(lambda x: x.astype(self.dtype), lora)

    def lay_out(self, frozen: Tree, lora: Tree | None) -> tuple[Tree, Tree | None]:
        """The weights as `prefill` and `decode` read them. Call it outside of loops over tokens, and after `cast`.

        On TPUs, biases and adapters of the experts get the layouts of their kernel. In each layer of each step, this would take a sixth of
        the time outside of kernels, by XLA's estimate. Elsewhere nothing changes.
        """
        if self.experts != "lanes" or "decode_experts" not in self.kernels.kernels:
            return frozen, lora
        frozen, laid_out = lay_out_trees(frozen, lora or {})
        return frozen, None if lora is None else laid_out

    # Whole sequences

    def hidden(
        self,
        frozen: Tree,
        lora: Tree | None,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        routes_BTLX: jax.Array | None = None,
    ) -> jax.Array:
        """The residual stream after the final norm, [B, T, D].

        Args:
          tokens_BT, positions_BT: int32; positions restart in each segment.
          segments_BT: int32; segments are contiguous. A token sees itself and earlier tokens of its segment. 0 is padding, whose outputs
            are undefined.
          routes_BTLX: the X distinct experts that each of L layers uses for each token, as returned by `prefill` and `decode`. None: the
            experts with the largest logits. Their weights are computed in both cases.
        """
        c, adapted = self.config, lora is not None

        def read(layer: Layer, x_BTD: jax.Array, window: int | None, routes_BTX: jax.Array | None) -> jax.Array:
            q, k, v = layer.attention.project(x_BTD, positions_BT, adapted=adapted)
            x_BTD += layer.attention.attend_packed(q, k, v, segments_BT, window, adapted=adapted)
            return x_BTD + layer.feed_forward(x_BTD, routes_BTX, adapted=adapted)

        def step(x_BTD: jax.Array, parameters: tuple[Tree, Tree, jax.Array | None]) -> tuple[jax.Array, None]:
            *own, routes = parameters
            repeat = self._bind_repeat(*own)
            for number, kind in enumerate(c.pattern):
                if number:
                    x_BTD = checkpoint_name(x_BTD, _LAYER)
                window = c.sliding_window if kind == "sliding" else None
                x_BTD = read(getattr(repeat, kind), x_BTD, window, None if routes is None else routes[number])
            return x_BTD, None

        x_BTD = frozen["embedding"][tokens_BT].astype(jnp.float32)
        routes = routes_BTLX
        if routes is not None:  # repeats, layers of the pattern, B, T, X
            shape = (c.num_repeats, len(c.pattern), *routes.shape[:2], c.experts_per_token)
            routes = jnp.moveaxis(routes, 2, 0).reshape(shape)
        parameters = (frozen[c.stack], (lora or {}).get(c.stack, {}), routes)
        if self.remat != "none":
            names = (ATTENTION, _LAYER) if self.remat == "layers" else ()
            # CSE cannot undo rematerialisation in the body of a loop, so preventing it would only cost time.
            step = jax.checkpoint(step, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=False)
        x_BTD, _ = jax.lax.scan(step, x_BTD, parameters)
        return rms_norm(x_BTD, frozen["norm"], c.rms_eps, self.dtype)

    def logits(self, frozen: Tree, lora: Tree | None, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        head = bind(self._declared, {"head": frozen.get("head", {})}, lora and {"head": lora.get("head", {})}).head
        weight = frozen["embedding"] if self.config.tied else None
        return head(hidden, adapted=lora is not None, out_dtype=jnp.float32, weight_oi=weight)

    def decode_logits(self, frozen: Tree, lora: Tree | None, hidden_TD: jax.Array) -> jax.Array:
        """`logits` in decoding, by the kernel that reads the head, if there is one: float32 [T, V]."""
        if "decode_head" not in self.kernels.kernels:
            return self.logits(frozen, lora, hidden_TD)
        head = bind(self._declared, {"head": frozen.get("head", {})}, lora and {"head": lora.get("head", {})}).head
        arrays = head.arrays(adapted=lora is not None, weight_oi=frozen["embedding"] if self.config.tied else None)
        stack = Stack(**{name: array[None] for name, array in arrays.items()})
        return self.kernels.decode_head(hidden_TD, stack, head.scale)

    # Token by token

    @property
    def routes(self) -> jax.ShapeDtypeStruct:
        """Shape [L, X] and type of the chosen experts of a token, as returned by `prefill` and `decode`."""
        c = self.config
        return jax.ShapeDtypeStruct((c.num_layers, c.experts_per_token), jnp.uint8 if c.num_experts <= 256 else jnp.uint16)

    def init_pool(self, pages: int, page_size: int) -> Pool:
        """Empty pages of `page_size` tokens each, for the full layers."""
        c = self.config
        shape = (c.num_full, pages, c.num_kv_heads, page_size, c.head_size)
        return Pool(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def copy_page(self, pool: Pool, source: jax.Array, target: jax.Array) -> Pool:
        """The pool with page `source` copied to page `target` of the same device; unchanged if `target` is not a valid page."""
        return copy_page(pool, source, target, self.kernels.copy_page)

    def init_rings(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """Empty rings of keys and values for the sliding layers of `batch` rows."""
        c = self.config
        shape = (c.num_sliding, batch, c.num_kv_heads, c.sliding_window, c.head_size)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def init_cache(self, batch: int, capacity: int, page_size: int = 128) -> Cache:
        """An empty cache of `batch` rows, each with its own pages for at least `capacity` tokens."""
        each = -(-capacity // page_size)
        pages_BM = jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)
        return Cache(self.init_pool(batch * each, page_size), *self.init_rings(batch), pages_BM, jnp.zeros(batch, jnp.int32))

    def abstract_pool(self, pages: int, page_size: int) -> Pool:
        """Shapes and types of a pool. On a mesh it has shardings: each of the `row_devices` has an equal, contiguous part of the pages.

        Raises:
          ShardingError: pages or heads are not divisible by their mesh axes.
        """
        pool = jax.eval_shape(lambda: self.init_pool(pages, page_size))
        if self.mesh is None:
            return pool
        axes = ("repeats", "pages", "kv_heads", "positions", "head_size")
        sharding = sharding_for(axes, pool.keys_LPKsH.shape, self.mesh)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), pool)

    def prefill(
        self, frozen: Tree, lora: Tree | None, tokens_BC: jax.Array, counts_B: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Reads a right-padded chunk of each row's prompt. Earlier chunks must have been full.

        Args:
          frozen, lora: weights.
          tokens_BC: the next C tokens of each row. C and the rows' lengths are multiples of the page size.
          counts_B: int32, number of tokens that are not padding; at least 1.
          cache: must have pages for these tokens. On a mesh every device reads all rows, and `pages_BM` has the pages of the B rows on the
            first device, then those on the second, and so on.

        Returns:
          The residual stream after the final norm at each row's last token [B, D], the cache including the chunk, and the chosen experts
          [B, C, L, X].

        Raises:
          CapacityError: C is not a multiple of the page size, or exceeds the pages of a row.
        """
        c, adapted = self.config, lora is not None
        frozen, lora = self.lay_out(frozen, lora)
        at = locate_chunk(cache, counts_B, tokens_BC.shape[1], c.sliding_window if c.num_sliding else None)
        layers, bind_repeat = self._scanned(frozen, lora)

        def step(carry: tuple[jax.Array, Pool], parameters: tuple[jax.Array, tuple[Tree, Tree], Any]):
            x_BCD, pool = carry
            index, slices, rings = parameters
            repeat = bind_repeat(slices)
            stacked = index if self._stacked else None
            routes = []
            for kind in c.pattern:
                layer: Layer = getattr(repeat, kind)
                q, k, v = self._project_chunk(layer.attention, x_BCD, at.positions_BC, stacked, adapted=adapted)
                if kind == "sliding":
                    assert at.kept_BW is not None, "the model has sliding layers"
                    x_BCD += layer.attention.attend_window(q, rings, k, v, cache.lengths_B, stacked, adapted=adapted)
                    rings = tuple(keep_chunk(ring, x, at.kept_BW) for ring, x in zip(rings, (k, v), strict=True))
                else:
                    pool = Pool(*self.kernels.write_pages(pool.keys_LPKsH, pool.values_LPKsH, index, at.pages_Bm, k, v))
                    x_BCD += layer.attention.attend_chunk(q, pool, index, cache.pages_BM, cache.lengths_B, stacked, adapted=adapted)
                y_BCD, routes_BCX = layer.decode_feed_forward(x_BCD, index, stacked, adapted=adapted)
                x_BCD += y_BCD
                routes.append(routes_BCX)
            return (x_BCD, pool), (rings, self._routes_of_repeat(routes))

        x_BCD = frozen["embedding"][tokens_BC].astype(jnp.float32)
        rings = (cache.ring_k_LBKWH, cache.ring_v_LBKWH) if c.num_sliding else None
        inputs = (jnp.arange(c.num_repeats), layers, rings)
        (x_BCD, pool), (rings, routes) = jax.lax.scan(step, (x_BCD, cache.pool), inputs)
        x_BD = jnp.take_along_axis(x_BCD, (counts_B - 1)[:, None, None], axis=1)[:, 0]
        x_BD = rms_norm(x_BD, frozen["norm"], c.rms_eps, self.dtype)
        ring_k, ring_v = rings or (cache.ring_k_LBKWH, cache.ring_v_LBKWH)
        return x_BD, Cache(pool, ring_k, ring_v, cache.pages_BM, cache.lengths_B + counts_B), self._routes_of_token(routes)

    def decode(self, frozen: Tree, lora: Tree | None, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache, jax.Array]:
        """Reads the next token of each row, at position `cache.lengths_B`. The weights may be those of `lay_out`.

        The row must have a page for it; on a mesh, on the row's device. A row of length 0 is empty: its token is not written, and its
        output is undefined.

        Returns:
          The residual stream after the final norm [B, D], the cache including the token, and the chosen experts [B, L, X].

        Raises:
          ShardingError: the number of rows is not a multiple of the number of devices that share them.
        """
        self._check_rows(tokens_B.shape[0])
        c, adapted = self.config, lora is not None
        lengths_B = cache.lengths_B
        at = {"full": locate_in_pages(cache), "sliding": locate_in_rings(cache, c.sliding_window)}
        x_BTD = frozen["embedding"][tokens_B][:, None].astype(jnp.float32)
        pools = {"full": cache.pool, "sliding": Pool(cache.ring_k_LBKWH, cache.ring_v_LBKWH)}
        if self.kernels.layer is not None and len(tokens_B) <= self.kernels.layer.most_rows * row_devices(self.mesh):
            scanned = self._scanned(frozen, lora, STACKED)
            turns = turns_of(lengths_B, c)
            stream, pools, routes = decode_fused(c, *scanned, x_BTD[:, 0], pools, at, turns, self.kernels, self.dtype, adapted=adapted)
            _, x_BD = self.kernels.layer.add_and_norm(*stream, frozen["norm"][None], jnp.int32(0), c.rms_eps, self.dtype)
            return x_BD, self._after(cache, pools), self._routes_of_token(routes.astype(self.routes.dtype))[:, 0]
        layers, bind_repeat = self._scanned(frozen, lora)

        def read(layer: Layer, x_BTD: jax.Array, pool: Pool, index: jax.Array, at: TokenPlaces) -> tuple[jax.Array, Pool, jax.Array]:
            stacked = index if self._stacked else None
            q, k_B1KH, v_B1KH = layer.attention.project(x_BTD, lengths_B[:, None], stacked, adapted=adapted)
            new = index, at.pages_B, at.places_B, k_B1KH[:, 0], v_B1KH[:, 0]
            pool = Pool(*self.kernels.write_token(pool.keys_LPKsH, pool.values_LPKsH, *new))
            x_BTD += layer.attention.attend_cached(q, pool, index, at.table_BM, at.counts_B, stacked, adapted=adapted)
            y_BTD, routes_BTX = layer.decode_feed_forward(x_BTD, index, stacked, adapted=adapted)
            return x_BTD + y_BTD, pool, routes_BTX

        # The caches are the loop's carry, so that each step writes one place instead of copying them.
        def step(carry: tuple[jax.Array, dict[str, Pool]], parameters: tuple[jax.Array, tuple[Tree, Tree]]):
            x_BTD, pools = carry
            index, slices = parameters
            repeat = bind_repeat(slices)
            routes = []
            for kind in c.pattern:
                x_BTD, pool, routes_BTX = read(getattr(repeat, kind), x_BTD, pools[kind], index, at[kind])
                pools = pools | {kind: pool}
                routes.append(routes_BTX)
            return (x_BTD, pools), self._routes_of_repeat(routes)

        (x_BTD, pools), routes = jax.lax.scan(step, (x_BTD, pools), (jnp.arange(c.num_repeats), layers))
        x_BD = rms_norm(x_BTD[:, 0], frozen["norm"], c.rms_eps, self.dtype)
        return x_BD, self._after(cache, pools), self._routes_of_token(routes)[:, 0]

    @staticmethod
    def _after(cache: Cache, pools: dict[str, Pool]) -> Cache:
        """The cache after one token a row, which the pools have."""
        rings = pools["sliding"]
        return Cache(pools["full"], rings.keys_LPKsH, rings.values_LPKsH, cache.pages_BM, cache.lengths_B + 1)

    def decode_drafts(
        self, frozen: Tree, lora: Tree | None, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache, tuple[jax.Array, jax.Array] | None, jax.Array]:
        """Reads T tokens of each row at once, from position `cache.lengths_B`. `keep_drafts` then keeps the first of them.

        The row must have pages for them; on a mesh, on the row's device.

        Args:
          tokens_BT: the next tokens of each row.
          counts_B: int32, number of tokens of each row to read. Nothing is computed for the others, nor for rows of length 0; their
            outputs are undefined.

        Returns:
          The residual stream after the final norm [B, T, D]; the cache, in which only the pages have changed; keys and values of the
          sliding layers, each [L, B, T, K, H], for `keep_drafts`, or None without such layers; and the chosen experts [B, T, L, X].

        Raises:
          ShardingError: the number of rows is not a multiple of the number of devices that share them.
        """
        self._check_rows(tokens_BT.shape[0])
        c, adapted, tokens = self.config, lora is not None, tokens_BT.shape[1]
        at = locate_drafts(cache, counts_B, tokens, c.sliding_window)
        windows_n1 = jnp.arange(tokens_BT.size)[:, None]
        layers, bind_repeat = self._scanned(frozen, lora)

        def flat(x_BTkh: jax.Array) -> jax.Array:
            return x_BTkh.reshape(-1, 1, *x_BTkh.shape[2:])

        def step(carry: tuple[jax.Array, Pool], parameters: tuple[jax.Array, tuple[Tree, Tree]]):
            x_BTD, pool = carry
            index, slices = parameters
            repeat = bind_repeat(slices)
            stacked, routes, new = index if self._stacked else None, [], None
            for kind in c.pattern:
                layer: Layer = getattr(repeat, kind)
                q, k, v = layer.attention.project(x_BTD, at.positions_BT, stacked, adapted=adapted)
                if kind == "sliding":
                    new, rings = (k, v), (cache.ring_k_LBKWH, cache.ring_v_LBKWH)
                    read = Pool(*(windows_of(ring[index], x, at.positions_BT) for ring, x in zip(rings, new, strict=True)))
                    places = read, jnp.int32(0), windows_n1, at.window_counts
                else:
                    written = at.pages, at.places, flat(k)[:, 0], flat(v)[:, 0]
                    pool = Pool(*self.kernels.write_token(pool.keys_LPKsH, pool.values_LPKsH, index, *written, tokens=tokens))
                    places = pool, index, at.table, at.counts
                attended = layer.attention.attend_cached(flat(q), *places, stacked, adapted=adapted)
                x_BTD += attended.reshape(x_BTD.shape)
                y_BTD, routes_BTX = layer.decode_feed_forward(x_BTD, index, stacked, adapted=adapted, valid_BT=at.valid_BT)
                x_BTD += y_BTD
                routes.append(routes_BTX)
            return (x_BTD, pool), (new, self._routes_of_repeat(routes))

        x_BTD = frozen["embedding"][tokens_BT].astype(jnp.float32)
        inputs = (jnp.arange(c.num_repeats), layers)
        (x_BTD, pool), (new, routes) = jax.lax.scan(step, (x_BTD, cache.pool), inputs)
        x_BTD = rms_norm(x_BTD, frozen["norm"], c.rms_eps, self.dtype)
        return x_BTD, dataclasses.replace(cache, pool=pool), new, self._routes_of_token(routes)

    def keep_drafts(self, cache: Cache, new: tuple[jax.Array, jax.Array] | None, kept_B: jax.Array) -> Cache:
        """The cache after the first `kept_B` of the tokens that `decode_drafts` has read. `new` is its result of that name."""
        ring_k, ring_v = cache.ring_k_LBKWH, cache.ring_v_LBKWH
        if new is not None:
            ring_k, ring_v = (keep_in_rings(ring, x, cache.lengths_B, kept_B) for ring, x in zip((ring_k, ring_v), new, strict=True))
        return Cache(cache.pool, ring_k, ring_v, cache.pages_BM, cache.lengths_B + kept_B)

    def _check_rows(self, rows: int) -> None:
        if rows % row_devices(self.mesh):
            raise ShardingError(f"Cannot split {rows} rows over {row_devices(self.mesh)} devices. Use a multiple of this number.")

    def _init(self, state: nnx.State, abstract: Tree, key: jax.Array) -> Tree:
        return jax.jit(lambda key: init_tree(state, key, self.mesh), out_shardings=shardings(abstract))(key)

    def _project_chunk(
        self, attention: Attention, x_BCD: jax.Array, positions_BC: jax.Array, layer: jax.Array | None, *, adapted: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of a prompt's chunk. On a mesh, a device has the queries of its own tokens and all keys and values."""
        q, k, v = attention.project(x_BCD, positions_BC, layer, adapted=adapted)
        if self.mesh is not None:
            split = rows_axes(x_BCD.shape[1], self.mesh)
            of_own, of_all = (NamedSharding(self.mesh, PartitionSpec(None, axes, "tensor")) for axes in (split, None))
            q, k, v = (jax.lax.with_sharding_constraint(x, layout) for x, layout in ((q, of_own), (k, of_all), (v, of_all)))
        return q, k, v

    def _routes_of_repeat(self, routes: Sequence[jax.Array]) -> jax.Array:
        return jnp.stack(routes).astype(self.routes.dtype)

    @staticmethod
    def _routes_of_token(routes: jax.Array) -> jax.Array:
        """Converts the routes of all repeats [repeats, layers of the pattern, B, T, X] to [B, T, L, X]."""
        return jnp.moveaxis(routes.reshape(routes.shape[0] * routes.shape[1], *routes.shape[2:]), 0, 2)

    @property
    def _stacked(self) -> bool:
        """Whether the projections of attention and of a dense MLP stay stacked too, because their kernel reads them from the stack."""
        return self.mesh is None or can_spread("decode_projections", self.mesh)

    @property
    def _declared(self) -> Declared:
        return declared(self.config, self.lora, self.dtype, self.kernels, self.experts)

    def _scanned(
        self, frozen: Tree, lora: Tree | None, stacked: tuple[str, ...] = ()
    ) -> tuple[tuple[Tree, Tree], Callable[[tuple[Tree, Tree]], Repeat]]:
        """The layers that a loop over the repeats slices, and a function from these slices to the module of a repeat.

        The loop does not slice large matrices: their kernels would get copies of the slices. They stay stacked, and so do the parameters
        in `stacked`.
        """
        names = stacked + tuple(SLABS) if self.config.num_experts else ()
        if self._stacked:
            names += ("q", "k", "v", "o", "gate", "up", "down")
        stack = self.config.stack
        frozen_layers, frozen_stacks = split_matrices(frozen[stack], names)
        lora_layers, lora_stacks = split_matrices((lora or {}).get(stack, {}), names)

        def bind_repeat(slices: tuple[Tree, Tree]) -> Repeat:
            return self._bind_repeat(join(slices[0], frozen_stacks), join(slices[1], lora_stacks))

        return (frozen_layers, lora_layers), bind_repeat

    def _bind_repeat(self, frozen: Tree, lora: Tree) -> Repeat:
        """One repeat of the layers' pattern with its slices of the stacks; without the adapter if `lora` is empty."""
        stack = self.config.stack
        return getattr(bind(self._declared, {stack: frozen}, {stack: lora} if lora else None), stack)
