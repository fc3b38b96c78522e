"""Speculative decoding with drafts from the row's own text: prompt lookup (Saxena, "Prompt Lookup Decoding", 2023).

Programs are often edits of a program in the prompt. So the tokens that followed an earlier occurrence of a row's last tokens are a good
guess at its next ones: the draft. One pass of the model reads the row's next token and the draft. Every position then draws its own token,
with its own key, from its own distribution. The draft is used as long as it equals what was drawn; the first drawn token that differs is
the row's next token, and what follows is discarded. So the draft decides how many tokens a pass yields, and not which: tokens and
log-probabilities are those without drafts, up to the rounding of a larger batch, and their distribution is exact.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.models.cache import Cache, Pool
from discover_jax.models.decoder import Model
from discover_jax.sampling.decoding import Drawn, Rows, SecondPhase, empty_drawn, take_tokens
from discover_jax.sampling.draw import draw_tokens, rollout_keys

LONGEST, SHORTEST = 8, 2
"""Most and fewest tokens of a match. With real rollouts, longer matches gained nothing, and single tokens were mostly rejected."""


def propose(
    history_BS: jax.Array, lengths_B: jax.Array, count: int, *, longest: int = LONGEST, shortest: int = SHORTEST
) -> tuple[jax.Array, jax.Array]:
    """Drafts the next `count` tokens of each row: those after the last one of the longest matches of its last tokens.

    If the match is so late that fewer tokens follow it, they are repeated: the row repeats itself.

    Args:
      history_BS: int32, the tokens of each row.
      lengths_B: int32, their number. What follows is ignored.
      count: tokens to draft.
      longest, shortest: most and fewest tokens of a match.

    Returns:
      drafts_BK, and whether each row has a match, found_B.
    """
    size = history_BS.shape[1]
    ends_S = jnp.arange(size, dtype=jnp.int32)
    matched_BS = jnp.zeros(history_BS.shape, jnp.int32)
    equal_BS = jnp.broadcast_to(ends_S < lengths_B[:, None] - 1, history_BS.shape)
    for back in range(longest):
        last_B1 = jnp.take_along_axis(history_BS, lengths_B[:, None] - 1 - back, axis=1, mode="clip")
        before_BS = jnp.pad(history_BS, ((0, 0), (back, 0)))[:, :size]
        equal_BS &= (before_BS == last_B1) & (ends_S >= back)
        matched_BS += equal_BS
    best_B = jnp.max(jnp.where(matched_BS >= shortest, matched_BS * size + ends_S, -1), axis=1)
    end_B, found_B = best_B % size, best_B >= 0
    after_BK = jnp.arange(count) % jnp.maximum(lengths_B - 1 - end_B, 1)[:, None]
    return jnp.take_along_axis(history_BS, end_B[:, None] + 1 + after_BK, axis=1, mode="clip"), found_B


def _put(history_BS: jax.Array, at_BT: jax.Array, tokens_BT: jax.Array, written_BT: jax.Array) -> jax.Array:
    """The history with these tokens at these positions where `written_BT`."""
    rows_B1 = jnp.arange(len(history_BS))[:, None]
    return history_BS.at[rows_B1, jnp.where(written_BT, at_BT, history_BS.shape[1])].set(tokens_BT, mode="drop")


def _at(x_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    return x_BT[jnp.arange(len(x_BT)), index_B]


def draft_launch(
    model: Model,
    frozen: Any,
    lora: Any,
    pool: Pool,
    rows: Rows,
    pages_BM: jax.Array,
    history_BS: jax.Array,
    enough: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    *,
    draft_tokens: int,
    launch_steps: int,
    launch_tokens: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    second_phase: SecondPhase | None,
    record_routes: bool,
) -> tuple[Pool, Rows, Drawn, jax.Array]:
    """`decode_launch` with drafts. It has up to `launch_steps` passes. A pass yields 1 to `draft_tokens` + 1 tokens for every live row.

    Args:
      model, frozen, lora, pool, rows, enough, seed, step, max_new_tokens, stop_ids, second_phase, record_routes: see `decode_launch`.
      pages_BM: int32, the pages of each row, with room for `launch_tokens` more tokens.
      history_BS: int32, the tokens of each row, prompt first. S is at least the longest possible row.
      draft_tokens: length of a draft, at least 1.
      launch_steps: most passes.
      launch_tokens: most tokens per row, more than `draft_tokens`. The launch ends when a row has no room for another draft.

    Returns:
      Pool, rows and drawn tokens as from `decode_launch`, but [B, launch_tokens, ...]; and int32 [3]: passes of live rows, draft tokens,
      and those of them that were accepted.
    """
    lora, width = model.cast(lora), draft_tokens + 1
    keys_B = rollout_keys(seed, step, rows.groups_B, rows.indices_B)
    batch, begun_B, places_T = len(rows.alive_B), rows.counts_B, jnp.arange(width)
    drawn = empty_drawn(model, (batch, launch_tokens), record_routes=record_routes)
    layers, chosen = drawn[3].shape[2:]
    ends: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "second_phase": second_phase}

    def draw(hidden_BTD: jax.Array, counts_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next token after each hidden state. `counts_B`: the number of sampled tokens before the first one drawn."""
        shape = hidden_BTD.shape[:2]
        logits = model.decode_logits(frozen, lora, hidden_BTD.reshape(-1, hidden_BTD.shape[-1]))
        counts_BT = counts_B[:, None] + jnp.arange(shape[1], dtype=jnp.int32)
        flat = (jnp.broadcast_to(x_B[:, None], shape).reshape(-1) for x_B in (keys_B, rows.temperatures_B))
        keys, temperatures = flat
        tokens, logprobs = draw_tokens(keys, counts_BT.reshape(-1), logits, temperatures)
        return tokens.reshape(shape), logprobs.reshape(shape)

    def going(carry: Any) -> jax.Array:
        i, _, rows, *_ = carry
        longest = jnp.where(rows.alive_B, rows.counts_B - begun_B, 0).max()
        return (i < launch_steps) & (rows.alive_B.sum() > enough) & (longest + width <= launch_tokens)

    def one(carry: Any) -> Any:
        i, pool, rows, history_BS, next_B, drawn, sums_3 = carry
        reading_B, lengths_B, counts_B = rows.alive_B, rows.lengths_B, rows.counts_B
        rows, first_B = take_tokens(rows, *next_B, **ends)
        history_BS = _put(history_BS, lengths_B[:, None], first_B[0][:, None], reading_B[:, None])
        drafts_BK, found_B = propose(history_BS, lengths_B + 1, draft_tokens)
        sizes_B = jnp.where(rows.alive_B & found_B, jnp.minimum(draft_tokens, max_new_tokens - rows.counts_B), 0)
        cache = Cache(pool, rows.ring_k_LBKWH, rows.ring_v_LBKWH, pages_BM, jnp.where(rows.alive_B, lengths_B, 0))
        tokens_BT = jnp.concatenate([first_B[0][:, None], drafts_BK], axis=1)
        hidden_BTD, cache, new, routes_BTLX = model.decode_drafts(frozen, lora, tokens_BT, 1 + sizes_B, cache)
        sampled_BT, logprobs_BT = draw(hidden_BTD, rows.counts_B)

        accepted_B, taken_T, accepting_B = jnp.zeros(batch, jnp.int32), [first_B], rows.alive_B
        for k in range(draft_tokens):
            after, taken_B = take_tokens(rows, sampled_BT[:, k], logprobs_BT[:, k], **ends)
            accepting_B &= (k < sizes_B) & (taken_B[0] == drafts_BK[:, k])
            changed = {name: jnp.where(accepting_B, getattr(after, name), getattr(rows, name)) for name in _CHANGED}
            rows = dataclasses.replace(rows, **changed)
            accepted_B += accepting_B
            taken_T.append(taken_B)
            accepting_B &= rows.alive_B

        kept_B = jnp.where(rows.alive_B, 1 + accepted_B, 0)
        cache = model.keep_drafts(cache, new, kept_B)
        rows = dataclasses.replace(
            rows,
            ring_k_LBKWH=cache.ring_k_LBKWH,
            ring_v_LBKWH=cache.ring_v_LBKWH,
            lengths_B=jnp.where(rows.alive_B, cache.lengths_B, 0),
            hidden_BD=_at(hidden_BTD, accepted_B),
        )
        yielded_BT = reading_B[:, None] & (places_T <= accepted_B[:, None])
        history_BS = _put(history_BS, lengths_B[:, None] + places_T, tokens_BT, yielded_BT)
        new_BT = *(jnp.stack(xs, axis=1) for xs in zip(*taken_T, strict=True)), routes_BTLX[:, :, :layers, :chosen]
        into_BT = jnp.where(yielded_BT, (counts_B - begun_B)[:, None] + places_T, launch_tokens)
        rows_B1 = jnp.arange(batch)[:, None]
        drawn = jax.tree.map(lambda into, new: into.at[rows_B1, into_BT].set(new, mode="drop"), drawn, new_BT)
        sums_3 += jnp.stack([reading_B.sum(), sizes_B.sum(), accepted_B.sum()])
        return i + 1, cache.pool, rows, history_BS, (_at(sampled_BT, accepted_B), _at(logprobs_BT, accepted_B)), drawn, sums_3

    # The token that follows the last one yielded is drawn again by the next launch.
    next_B = tuple(x_B1[:, 0] for x_B1 in draw(rows.hidden_BD[:, None], rows.counts_B))
    carry = jnp.int32(0), pool, rows, history_BS, next_B, drawn, jnp.zeros(3, jnp.int32)
    _, pool, rows, _, _, drawn, sums_3 = jax.lax.while_loop(going, one, carry)
    return pool, rows, drawn, sums_3


_CHANGED = ("counts_B", "alive_B", "opened_B", "forcing_B")
"""What `take_tokens` changes."""
