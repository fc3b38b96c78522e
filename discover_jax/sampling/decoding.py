"""The device side of the sampler: the state of the decode batch, and pure functions that advance it. The host side is `schedule`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.exceptions import ConfigError
from discover_jax.models.cache import Cache, Pool
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import sharding_for
from discover_jax.sampling.draw import draw_tokens, rollout_keys


@dataclasses.dataclass(frozen=True)
class SecondPhase:
    """Forces a rollout that thinks too long to begin its answer. Forced tokens have log-probability 0 and are excluded from the loss.

    Attributes:
      after: tokens of the first phase. A rollout that has not begun its answer by then gets the forced tokens; then sampling continues.
      opening: consecutive tokens that begin an answer; the first one must not occur again among them.
      forced: the forced tokens; they must end in `opening` and contain no stop token.

    Raises:
      ConfigError: a value is invalid.
    """

    after: int
    opening: tuple[int, ...]
    forced: tuple[int, ...]

    def __post_init__(self):
        if self.after < 1:
            raise ConfigError(f"after, the length of the first phase, must be at least 1 token; got {self.after}.")
        if not self.opening or self.opening[0] in self.opening[1:]:
            raise ConfigError(f"opening must not be empty, and its first token must not occur again in it; got {self.opening}.")
        if self.forced[-len(self.opening) :] != self.opening:
            raise ConfigError(f"forced must end with the tokens of opening, {self.opening}; got {self.forced}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the decode batch without their pages: the whole batch, or one row that enters or leaves it.

    Attributes:
      ring_k_LBKWH, ring_v_LBKWH, lengths_B: of the cache; a length of 0 marks an empty or finished row.
      hidden_BD: hidden state at each row's last token; the next token is sampled from it.
      groups_B, indices_B: int32, group and index of the row's rollout.
      temperatures_B: float32, sampling temperature.
      counts_B: int32, number of generated tokens.
      alive_B: bool, False for rows that are finished or empty.
      opened_B: int32, number of tokens of `SecondPhase.opening` that the row ends with. Constant once the opening is complete; 0 without a
        second phase.
      forcing_B: bool, whether the last token was forced.
    """

    ring_k_LBKWH: jax.Array
    ring_v_LBKWH: jax.Array
    lengths_B: jax.Array
    hidden_BD: jax.Array
    groups_B: jax.Array
    indices_B: jax.Array
    temperatures_B: jax.Array
    counts_B: jax.Array
    alive_B: jax.Array
    opened_B: jax.Array
    forcing_B: jax.Array


Drawn = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Tokens, their log-probabilities, whether the policy chose them, and the experts that they were routed to [..., L, X]."""
Taken = tuple[jax.Array, jax.Array, jax.Array]
"""The same without the experts."""


def _axis(name: str) -> int:
    return 1 if name.startswith("ring") else 0


def take_rows(rows: Rows, slots_R: jax.Array) -> Rows:
    """The rows of these slots, in this order."""
    taken = {field.name: jnp.take(getattr(rows, field.name), slots_R, _axis(field.name)) for field in dataclasses.fields(Rows)}
    return Rows(**taken)


def put_row(rows: Rows, slot: jax.Array, one: Rows) -> Rows:
    """The rows, with that of `slot` replaced by the only row of `one`."""
    put = {}
    for field in dataclasses.fields(Rows):
        into, value = getattr(rows, field.name), getattr(one, field.name)
        put[field.name] = jax.lax.dynamic_update_index_in_dim(into, value, slot, _axis(field.name))
    return Rows(**put)


def new_rows(
    rings: tuple[jax.Array, jax.Array], lengths_B: Any, hidden_BD: jax.Array, groups_B: Any, indices_B: Any, temperatures_B: Any
) -> Rows:
    """Rows after prefill, without generated tokens. Rows of length 0 are empty."""
    ring_k, ring_v = rings
    lengths_B, batch = jnp.asarray(lengths_B, jnp.int32), len(lengths_B)
    return Rows(
        ring_k_LBKWH=ring_k,
        ring_v_LBKWH=ring_v,
        lengths_B=lengths_B,
        hidden_BD=hidden_BD,
        groups_B=jnp.asarray(groups_B, jnp.int32),
        indices_B=jnp.asarray(indices_B, jnp.int32),
        temperatures_B=jnp.asarray(temperatures_B, jnp.float32),
        counts_B=jnp.zeros(batch, jnp.int32),
        alive_B=lengths_B > 0,
        opened_B=jnp.zeros(batch, jnp.int32),
        forcing_B=jnp.zeros(batch, bool),
    )


def abstract_rows(model: Model, batch: int) -> Rows:
    """Shapes and dtypes of `batch` rows; on a mesh, with shardings."""

    def make() -> Rows:
        zeros = jnp.zeros(batch, jnp.int32)
        hidden = jnp.zeros((batch, model.config.width), model.dtype)
        return new_rows(model.init_rings(batch), zeros, hidden, zeros, zeros, zeros)

    shapes = jax.eval_shape(make)
    mesh = model.mesh
    if mesh is None:
        return shapes
    rows = "slots" if batch > 1 else "prompts"

    def lay_out(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = ("repeats", rows, "kv_heads", "positions", "head_size") if name.startswith("ring") else (rows, "width")
        # Per-row numbers are replicated, because the host of every process reads them.
        axes = axes if leaf.ndim > 1 else ("prompts",)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_for(axes, leaf.shape, mesh))

    laid_out: dict[str, Any] = {field.name: lay_out(field.name, getattr(shapes, field.name)) for field in dataclasses.fields(Rows)}
    return Rows(**laid_out)


def empty_rows(model: Model, batch: int) -> Rows:
    """`batch` rows without a rollout, on the devices."""
    made = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract_rows(model, batch))
    return dataclasses.replace(made, temperatures_B=jnp.ones_like(made.temperatures_B))  # logits are divided by it


def _force(phase: SecondPhase | None, rows: Rows, tokens_B: jax.Array, logprobs_B: jax.Array) -> tuple[jax.Array, ...]:
    """Replaces sampled tokens with forced ones. Returns tokens, log-probabilities, and the new `opened_B` and `forcing_B`, each [B]."""
    if phase is None:
        return tokens_B, logprobs_B, rows.opened_B, rows.forcing_B
    forced, opening = (jnp.asarray(ids, jnp.int32) for ids in (phase.forced, phase.opening))
    since_B = rows.counts_B - phase.after
    forcing_B = (rows.forcing_B | ((since_B == 0) & (rows.opened_B < len(opening)))) & (since_B < len(forced))
    tokens_B = jnp.where(forcing_B, forced.at[since_B].get(mode="clip"), tokens_B)
    # A token either continues the opening or starts it again.
    next_B = jnp.where(
        tokens_B == opening.at[rows.opened_B].get(mode="clip"), rows.opened_B + 1, (tokens_B == opening[0]).astype(jnp.int32)
    )
    opened_B = jnp.where(rows.opened_B == len(opening), rows.opened_B, next_B)
    return tokens_B, jnp.where(forcing_B, 0.0, logprobs_B), opened_B, forcing_B


def take_tokens(
    rows: Rows,
    tokens_B: jax.Array,
    logprobs_B: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    second_phase: SecondPhase | None,
) -> tuple[Rows, Taken]:
    """Adds a sampled token to each row, or the forced one instead.

    Returns:
      The rows with new `counts_B`, `alive_B`, `opened_B` and `forcing_B`, and the tokens. Those of rows that were not alive are undefined.
    """
    tokens_B, logprobs_B, opened_B, forcing_B = _force(second_phase, rows, tokens_B, logprobs_B)
    counts_B = rows.counts_B + rows.alive_B
    stops = jnp.asarray(stop_ids, jnp.int32)
    alive_B = rows.alive_B & ~((tokens_B[:, None] == stops).any(axis=-1) | (counts_B >= max_new_tokens))
    rows = dataclasses.replace(rows, counts_B=counts_B, alive_B=alive_B, opened_B=opened_B, forcing_B=forcing_B)
    return rows, (tokens_B, logprobs_B, ~forcing_B)


def empty_drawn(model: Model, shape: tuple[int, int], *, record_routes: bool) -> Drawn:
    """Arrays of this shape for the tokens of a launch. Without routes, theirs has zero layers."""
    routes = model.routes.shape if record_routes else (0, 0)
    zeros = jnp.zeros((*shape, *routes), model.routes.dtype)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.ones(shape, bool), zeros


def decode_launch(
    model: Model,
    frozen: Any,
    lora: Any,
    pool: Pool,
    rows: Rows,
    pages_BM: jax.Array,
    enough: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    *,
    launch_steps: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    second_phase: SecondPhase | None,
    record_routes: bool,
) -> tuple[Pool, Rows, Drawn]:
    """Decodes up to `launch_steps` tokens for every live row. Ends early once at most `enough` rows are live.

    Args:
      frozen, lora: weights; `lora` may be None.
      pool, rows: the decode batch.
      pages_BM: int32, the pages of each row, with room for `launch_steps` more tokens.
      enough: int32, number of live rows at which the launch ends.
      seed, step: folded into the key of every draw.
      launch_steps: most tokens per row.
      max_new_tokens, stop_ids: the budget and the stop tokens that end a rollout.
      second_phase: see `SecondPhase`.
      record_routes: whether to return the experts that tokens were routed to. If False, the array of routes has zero layers.

    Returns:
      Pool, rows, and `Drawn` with arrays [B, launch_steps, ...]. A row's new tokens come first; their number is the increase of
      `counts_B`.
    """
    frozen, lora = model.lay_out(frozen, model.cast(lora))  # once instead of in each layer for each token
    keys_B = rollout_keys(seed, step, rows.groups_B, rows.indices_B)
    drawn_TB = empty_drawn(model, (launch_steps, len(rows.alive_B)), record_routes=record_routes)
    layers, chosen = drawn_TB[3].shape[2:]

    def going(carry: tuple[jax.Array, Pool, Rows, Drawn]) -> jax.Array:
        i, _, rows, _ = carry
        return (i < launch_steps) & (rows.alive_B.sum() > enough)

    def one(carry: tuple[jax.Array, Pool, Rows, Drawn]) -> tuple[jax.Array, Pool, Rows, Drawn]:
        i, pool, rows, drawn_TB = carry
        sampled_B = draw_tokens(keys_B, rows.counts_B, model.decode_logits(frozen, lora, rows.hidden_BD), rows.temperatures_B)
        cache = Cache(pool, rows.ring_k_LBKWH, rows.ring_v_LBKWH, pages_BM, rows.lengths_B)
        rows, taken = take_tokens(rows, *sampled_B, max_new_tokens=max_new_tokens, stop_ids=stop_ids, second_phase=second_phase)
        hidden_BD, cache, routes_BLX = model.decode(frozen, lora, taken[0], cache)
        rows = dataclasses.replace(
            rows,
            ring_k_LBKWH=cache.ring_k_LBKWH,
            ring_v_LBKWH=cache.ring_v_LBKWH,
            # A finished row becomes empty, so attention no longer reads its tokens, and its pages no longer change.
            lengths_B=jnp.where(rows.alive_B, cache.lengths_B, 0),
            hidden_BD=hidden_BD,
        )
        new_B = *taken, routes_BLX[:, :layers, :chosen]
        return i + 1, cache.pool, rows, jax.tree.map(lambda into_TB, new_B: into_TB.at[i].set(new_B), drawn_TB, new_B)

    _, pool, rows, drawn_TB = jax.lax.while_loop(going, one, (jnp.int32(0), pool, rows, drawn_TB))
    return pool, rows, jax.tree.map(lambda x_TB: jnp.swapaxes(x_TB, 0, 1), drawn_TB)
