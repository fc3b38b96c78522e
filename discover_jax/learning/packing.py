"""Packing: several rollouts in one row of fixed length, kept apart by segment ids, and rows in batches of one shape.

A rollout with P prompt and T generated tokens takes P + T - 1 places of a row: place j holds token j and is asked for token j + 1.
The last token is never an input and the first never a target. Rows are filled first-fit, longest rollout first: never more
than 11/9 of the fewest possible rows plus one (the classical bound of first-fit decreasing), and a function of the lengths alone. A
group's prompt is computed once for each of its rollouts: docs/performance.md says why.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from discover_jax.exceptions import CapacityError, ConfigError, LearningError
from discover_jax.types import Rollout

TILE = 128
"""Lengths of rows are multiples of it, so that kernels' tiles are full."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rollouts; all arrays [B rows, T places].

    Attributes:
      tokens_BT: int32, inputs; 0 at padding.
      targets_BT: int32, the token that follows each input within its rollout; 0 at padding.
      positions_BT: int32, place of the input in its rollout, from 0; 0 at padding.
      segments_BT: int32, 1, 2, ... for the rollouts of a row in order; 0 for padding.
      mask_BT: bool, True where the target is a token that the policy chose: only these bear loss or statistics.
      sampler_logprobs_BT: float32, log-probability of the target under the sampler; 0 where masked.
      advantages_BT: float32, the rollout's advantage; 0 where masked.
      temperatures_BT: float32, that the rollout was sampled at; 1 at padding.
      routes_BTLX: uint8 or uint16, the experts that each layer of the sampler chose for the input, 0, 1, ... at padding; None if they were
        not recorded.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    mask_BT: np.ndarray
    sampler_logprobs_BT: np.ndarray
    advantages_BT: np.ndarray
    temperatures_BT: np.ndarray
    routes_BTLX: np.ndarray | None = None


def empty_batch(rows: int, row_tokens: int, routes: Any = None) -> Batch:
    """Rows of padding; with routes of the shape [L, X] and dtype of `routes`, if given."""
    shape = (rows, row_tokens)
    zeros = functools.partial(np.zeros, shape)
    routes_BTLX = None
    if routes is not None:
        routes_BTLX = np.broadcast_to(np.arange(routes.shape[-1], dtype=routes.dtype), (*shape, *routes.shape)).copy()
    return Batch(
        tokens_BT=zeros(np.int32),
        targets_BT=zeros(np.int32),
        positions_BT=zeros(np.int32),
        segments_BT=zeros(np.int32),
        mask_BT=zeros(np.bool_),
        sampler_logprobs_BT=zeros(np.float32),
        advantages_BT=zeros(np.float32),
        temperatures_BT=np.ones(shape, np.float32),
        routes_BTLX=routes_BTLX,
    )


def _places(rollout: Rollout) -> int:
    return len(rollout.prompt_tokens_P) + len(rollout.tokens_T) - 1


def _check(rollout: Rollout, row_tokens: int) -> None:
    name = f"Rollout {rollout.index} of group {rollout.group}"
    lengths = len(rollout.tokens_T), len(rollout.logprobs_T), len(rollout.chosen_T)
    if len(set(lengths)) > 1:
        raise LearningError(f"{name} has {lengths[0]} tokens, {lengths[1]} log-probabilities and {lengths[2]} flags; all must be equal.")
    if not 0 < rollout.temperature < float("inf"):
        raise LearningError(f"{name} has temperature {rollout.temperature!r}; it must be finite and above 0.")
    if len(rollout.prompt_tokens_P) == 0:
        raise LearningError(f"{name} has an empty prompt, so its first token has no probability; prompts need at least one token.")
    if not np.isfinite(rollout.logprobs_T[rollout.chosen_T]).all():
        raise LearningError(f"{name} has log-probabilities that are not finite: the sampler's logits overflowed or were NaN.")
    if rollout.routes_SLX is not None and len(rollout.routes_SLX) != _places(rollout):
        raise LearningError(f"{name} has routes of {len(rollout.routes_SLX)} tokens; they must be those of {_places(rollout)} inputs.")
    if _places(rollout) > row_tokens:
        raise CapacityError(
            f"{name} has {len(rollout.prompt_tokens_P)} prompt and {len(rollout.tokens_T)} generated tokens and takes {_places(rollout)}"
            f" places; a row of the update has {row_tokens}. Set config.train.row_tokens to 0 or to the longest prompt plus the budget"
            " of a rollout."
        )


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, each of total length at most `capacity`; equal lengths keep their order.

    Every length must be at most `capacity`.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if fit is None:
            fit = len(bins)
            bins.append([])
            room.append(capacity)
        bins[fit].append(index)
        room[fit] -= lengths[index]
    return bins


def _routes(rollouts: Sequence[Rollout]) -> jax.ShapeDtypeStruct | None:
    """Shape [L, X] and type of the routes that all rollouts have; None if none has any."""
    found = {None if r.routes_SLX is None else (r.routes_SLX.shape[1:], r.routes_SLX.dtype) for r in rollouts} or {None}
    if len(found) > 1:
        raise LearningError(f"All rollouts of a step must have routes of one shape and type, or none; got {found}.")
    (only,) = found
    return None if only is None else jax.ShapeDtypeStruct(*only)


def row_lengths(row_tokens: int, lengths: int) -> list[int]:
    """So many lengths of rows, from half of `row_tokens` to the whole in equal steps, rounded up to whole tiles: longest first.

    Fewer if rounding makes some equal.
    """
    parts = [row_tokens - row_tokens * part // (2 * max(1, lengths - 1)) for part in range(lengths)]
    return sorted({min(row_tokens, -(-part // TILE) * TILE) for part in parts}, reverse=True)


def _fill(places: Sequence[int], row_tokens: int, rows: int, lengths: int) -> tuple[int, list[list[int]]]:
    """The length of rows that takes the fewest positions in all, padding and empty rows included, and what goes into each row."""
    longest = max(places, default=0)
    fillings = [(length, first_fit_decreasing(places, length)) for length in row_lengths(row_tokens, lengths) if length >= longest]
    return min(fillings, key=lambda filling: -(-len(filling[1]) // rows) * filling[0])  # of equal ones the first, which is the longest


def pack(rollouts: Sequence[Rollout], advantages: npt.ArrayLike, *, row_tokens: int, rows: int, lengths: int = 1) -> list[Batch]:
    """Rollouts and their advantages as batches of one shape [rows, length]; the last is filled up with empty rows.

    The length is whichever of `row_lengths` leaves the least padding: rollouts of a third of a row and a bit would leave a third of it.

    Rollouts without a chosen token have nothing to say and are left out. No rollouts give no batches.

    Args:
      rollouts: those that take part in the update.
      advantages: one finite number for each rollout.
      row_tokens: places of the longest row.
      rows: rows of a microbatch.
      lengths: of rows that may be chosen from; each is a shape for which the update is compiled once.

    Raises:
      CapacityError: a rollout is longer than a row.
      ConfigError: `row_tokens`, `rows` or `lengths` is below 1.
      LearningError: lengths disagree, a prompt is empty, or an advantage or log-probability is not finite in float32.
    """
    if min(row_tokens, rows, lengths) < 1:
        raise ConfigError(f"row_tokens = {row_tokens}, rows = {rows} and lengths = {lengths} cannot be packed. All must be at least 1.")
    with np.errstate(over="ignore"):
        advantage_of = np.asarray(advantages, np.float64).astype(np.float32)
    if advantage_of.shape != (len(rollouts),):
        raise LearningError(f"{len(rollouts)} rollouts need as many advantages; got the shape {advantage_of.shape}.")
    if not np.isfinite(advantage_of).all():
        raise LearningError(f"Advantages {np.asarray(advantages)[~np.isfinite(advantage_of)].tolist()} are not finite in float32.")
    for rollout in rollouts:
        _check(rollout, row_tokens)

    kept = [(rollout, advantage) for rollout, advantage in zip(rollouts, advantage_of, strict=True) if rollout.chosen_T.any()]
    length, bins = _fill([_places(rollout) for rollout, _ in kept], row_tokens, rows, lengths)
    routes = _routes([rollout for rollout, _ in kept])
    batches = [empty_batch(rows, length, routes) for _ in range(-(-len(bins) // rows))]
    for number, members in enumerate(bins):
        batch, row, start = batches[number // rows], number % rows, 0
        for segment, member in enumerate(members, start=1):
            rollout, advantage = kept[member]
            tokens = np.concatenate([rollout.prompt_tokens_P, rollout.tokens_T])
            end = start + _places(rollout)
            batch.tokens_BT[row, start:end] = tokens[:-1]
            batch.targets_BT[row, start:end] = tokens[1:]
            batch.positions_BT[row, start:end] = np.arange(end - start)
            batch.segments_BT[row, start:end] = segment
            batch.temperatures_BT[row, start:end] = rollout.temperature
            if batch.routes_BTLX is not None:
                batch.routes_BTLX[row, start:end] = rollout.routes_SLX
            generated = slice(end - len(rollout.tokens_T), end)
            batch.mask_BT[row, generated] = rollout.chosen_T
            batch.sampler_logprobs_BT[row, generated] = np.where(rollout.chosen_T, rollout.logprobs_T, 0.0)
            batch.advantages_BT[row, generated] = np.where(rollout.chosen_T, advantage, 0.0)
            start = end
    return batches


def filled_frac(batches: Sequence[Batch]) -> float:
    """Fraction of positions that are not padding."""
    return sum(int(np.count_nonzero(batch.segments_BT)) for batch in batches) / sum(batch.segments_BT.size for batch in batches)


def pack_substeps(
    rollouts: Sequence[Rollout], advantages: npt.ArrayLike, *, substeps: int, row_tokens: int, rows: int, lengths: int = 1
) -> list[list[Batch]]:
    """The batches of each of several optimiser steps that share the rollouts: every rollout is used once, in one of them.

    As in the reference code, the rollouts are cut in their order into as equal parts as possible, of which the first may have one more;
    given group by group, groups stay whole where their number divides by `substeps`. A part is a function of the rollouts alone, so neither
    packing nor microbatches nor devices change what an optimiser step sees. Fewer usable rollouts than substeps make fewer substeps, and
    none make none.

    Args:
      rollouts, advantages, row_tokens, rows, lengths: as for `pack`.
      substeps: optimiser steps, at least 1; with 1, `pack` of everything.

    Raises:
      CapacityError, ConfigError, LearningError: as `pack`; ConfigError for fewer than one substep, too.
    """
    if substeps < 1:
        raise ConfigError(f"substeps must be at least 1; got {substeps}.")
    values = np.asarray(advantages, np.float64)
    if values.shape != (len(rollouts),):
        raise LearningError(f"{len(rollouts)} rollouts need as many advantages; got the shape {values.shape}.")
    usable = [index for index, rollout in enumerate(rollouts) if rollout.chosen_T.any()]
    parts = [part for part in np.array_split(np.asarray(usable, np.int64), substeps) if part.size]
    return [pack([rollouts[i] for i in part], values[part], row_tokens=row_tokens, rows=rows, lengths=lengths) for part in parts]
