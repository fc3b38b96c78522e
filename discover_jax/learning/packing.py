"""Packing: puts several rollouts into one row of fixed length, separated by segment ids, and rows into batches of one shape.

A rollout with P prompt tokens and T generated tokens takes P + T - 1 positions of a row: its inputs are all tokens but the last, and its
targets all tokens but the first. Rows are filled by first-fit decreasing: the number of rows is at most 11/9 of the minimum plus one (the
classical bound), and the result depends only on the lengths. A group's prompt is computed once for each of its rollouts;
docs/performance.md says why.
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
"""Row lengths are multiples of this, so that the kernels' tiles are full."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rollouts; all arrays [B rows, T positions].

    Attributes:
      tokens_BT: int32, inputs; 0 at padding.
      targets_BT: int32, the token after each input in its rollout; 0 at padding.
      positions_BT: int32, position of the input in its rollout, from 0; 0 at padding.
      segments_BT: int32, 1, 2, ... for the rollouts of a row in order; 0 at padding.
      mask_BT: bool, True where the policy chose the target; loss and statistics include only these tokens.
      sampler_logprobs_BT: float32, log-probability of the target under the sampler; 0 where masked.
      advantages_BT: float32, the rollout's advantage; 0 where masked.
      temperatures_BT: float32, the rollout's sampling temperature; 1 at padding.
      routes_BTLX: uint8 or uint16, the experts to which each layer of the sampler routed the input; 0, 1, ... at padding. None if they
        were not recorded.
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
    """Rows of padding. `routes` gives the shape [L, X] and dtype of routes, if there are any."""
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


def _inputs(rollout: Rollout) -> int:
    """Number of input tokens: all but the last."""
    return len(rollout.prompt_tokens_P) + len(rollout.tokens_T) - 1


def _check(rollout: Rollout, row_tokens: int) -> None:
    name = f"Rollout {rollout.index} of group {rollout.group}"
    lengths = len(rollout.tokens_T), len(rollout.logprobs_T), len(rollout.chosen_T)
    if len(set(lengths)) > 1:
        raise LearningError(
            f"{name} has {lengths[0]} tokens_T, {lengths[1]} logprobs_T and {lengths[2]} chosen_T; their lengths must be equal."
        )
    if not 0 < rollout.temperature < float("inf"):
        raise LearningError(f"{name} has temperature {rollout.temperature!r}; it must be finite and above 0.")
    if len(rollout.prompt_tokens_P) == 0:
        raise LearningError(f"{name} has an empty prompt; it must have at least 1 token, or the first generated token has no probability.")
    if not np.isfinite(rollout.logprobs_T[rollout.chosen_T]).all():
        raise LearningError(f"{name} has log-probabilities that are not finite: the sampler's logits overflowed or were NaN.")
    if rollout.routes_SLX is not None and len(rollout.routes_SLX) != _inputs(rollout):
        raise LearningError(f"{name} has routes for {len(rollout.routes_SLX)} tokens, but {_inputs(rollout)} inputs; they must be equal.")
    if _inputs(rollout) > row_tokens:
        raise CapacityError(
            f"{name} has {len(rollout.prompt_tokens_P)} prompt tokens and {len(rollout.tokens_T)} generated tokens, so it needs a row of"
            f" {_inputs(rollout)} tokens; rows of the update have {row_tokens}. Set config.train.row_tokens to 0, or to at least"
            " config.sampling.max_prompt_tokens + max_new_tokens."
        )


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`; the total length of a bin is at most `capacity`. Equal lengths keep their order.

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
    """Shape [L, X] and dtype of the rollouts' routes; None if none has routes."""
    found = {None if r.routes_SLX is None else (r.routes_SLX.shape[1:], r.routes_SLX.dtype) for r in rollouts} or {None}
    if len(found) > 1:
        raise LearningError(f"The routes of all rollouts of a step must have one shape and dtype, or all must be None; got {found}.")
    (only,) = found
    return None if only is None else jax.ShapeDtypeStruct(*only)


def row_lengths(row_tokens: int, lengths: int) -> list[int]:
    """`lengths` row lengths in equal steps from `row_tokens` down to half of it, each rounded up to whole tiles.

    There are fewer if rounding makes some equal.
    """
    parts = [row_tokens - row_tokens * part // (2 * max(1, lengths - 1)) for part in range(lengths)]
    return sorted({min(row_tokens, -(-part // TILE) * TILE) for part in parts}, reverse=True)


def _fill(sizes: Sequence[int], row_tokens: int, rows: int, lengths: int) -> tuple[int, list[list[int]]]:
    """The row length with the fewest positions in total, including padding and empty rows, and the indices of `sizes` in each row."""
    longest = max(sizes, default=0)
    fillings = [(length, first_fit_decreasing(sizes, length)) for length in row_lengths(row_tokens, lengths) if length >= longest]
    return min(fillings, key=lambda filling: -(-len(filling[1]) // rows) * filling[0])  # ties: the first, which is the longest


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the inputs of a rollout are: from `start` in this row of this batch. `segment` counts the rollouts of a row from 1."""

    rollout: int
    batch: int
    row: int
    segment: int
    start: int


def _places(rollouts: Sequence[Rollout], row_tokens: int, rows: int, lengths: int) -> tuple[int, list[_Place]]:
    """The row length, and the place of each rollout with a chosen token, batch by batch. They depend only on the rollouts' lengths."""
    kept = [index for index, rollout in enumerate(rollouts) if rollout.chosen_T.any()]
    length, bins = _fill([_inputs(rollouts[index]) for index in kept], row_tokens, rows, lengths)
    places = []
    for number, members in enumerate(bins):
        start = 0
        for segment, member in enumerate(members, start=1):
            places.append(_Place(kept[member], number // rows, number % rows, segment, start))
            start += _inputs(rollouts[kept[member]])
    return length, places


def _float32(rollouts: Sequence[Rollout], advantages: Sequence[npt.ArrayLike] | np.ndarray) -> list[np.ndarray]:
    """Checked advantages, float32."""
    if len(advantages) != len(rollouts):
        raise LearningError(f"There must be one advantage for each of {len(rollouts)} rollouts; got {len(advantages)}.")
    with np.errstate(over="ignore"):
        values = [np.asarray(value, np.float64).astype(np.float32) for value in advantages]
    for rollout, value, given in zip(rollouts, values, advantages, strict=True):
        if value.shape not in ((), rollout.tokens_T.shape):
            raise LearningError(
                f"Advantages must be one number for a rollout, or one for each of its {len(rollout.tokens_T)} tokens; got shape"
                f" {value.shape}."
            )
        if not np.isfinite(value).all():
            raise LearningError(f"Advantages must be finite in float32; got {np.asarray(given)[~np.isfinite(value)].tolist()}.")
    return values


def pack(
    rollouts: Sequence[Rollout], advantages: Sequence[npt.ArrayLike] | np.ndarray, *, row_tokens: int, rows: int, lengths: int = 1
) -> list[Batch]:
    """Packs rollouts and their advantages into batches of one shape [rows, length]. The last batch is padded with empty rows.

    The length is the one of `row_lengths` that leaves the least padding. With only one length, rollouts slightly longer than a third of a
    row would leave a third of it empty.

    Rollouts without a chosen token are skipped. No rollouts give no batches.

    Args:
      rollouts: the rollouts of the update.
      advantages: for each rollout, a finite number, or one for each of its tokens.
      row_tokens: length of the longest row.
      rows: rows of a microbatch.
      lengths: number of row lengths to choose from. The update is compiled once for each length that is used.

    Raises:
      CapacityError: a rollout is longer than a row.
      ConfigError: `row_tokens`, `rows` or `lengths` is below 1.
      LearningError: lengths disagree, a prompt is empty, or an advantage or log-probability is not finite in float32.
    """
    if min(row_tokens, rows, lengths) < 1:
        raise ConfigError(f"row_tokens, rows and lengths must be at least 1; got {row_tokens}, {rows} and {lengths}.")
    values = _float32(rollouts, advantages)
    for rollout in rollouts:
        _check(rollout, row_tokens)

    length, places = _places(rollouts, row_tokens, rows, lengths)
    routes = _routes([rollouts[place.rollout] for place in places])
    batches = [empty_batch(rows, length, routes) for _ in range(places[-1].batch + 1 if places else 0)]
    for place in places:
        batch, row, rollout, start = batches[place.batch], place.row, rollouts[place.rollout], place.start
        tokens = np.concatenate([rollout.prompt_tokens_P, rollout.tokens_T])
        end = start + _inputs(rollout)
        batch.tokens_BT[row, start:end] = tokens[:-1]
        batch.targets_BT[row, start:end] = tokens[1:]
        batch.positions_BT[row, start:end] = np.arange(end - start)
        batch.segments_BT[row, start:end] = place.segment
        batch.temperatures_BT[row, start:end] = rollout.temperature
        if batch.routes_BTLX is not None:
            batch.routes_BTLX[row, start:end] = rollout.routes_SLX
        generated = slice(end - len(rollout.tokens_T), end)
        batch.mask_BT[row, generated] = rollout.chosen_T
        batch.sampler_logprobs_BT[row, generated] = np.where(rollout.chosen_T, rollout.logprobs_T, 0.0)
        batch.advantages_BT[row, generated] = np.where(rollout.chosen_T, values[place.rollout], 0.0)
    return batches


def values_of_tokens(
    rollouts: Sequence[Rollout], values: Sequence[np.ndarray], *, row_tokens: int, rows: int, lengths: int = 1
) -> list[np.ndarray]:
    """The values [T] of each rollout's generated tokens, from those [B, T] of the batches that `pack` makes of the rollouts.

    Rollouts without a chosen token, which are in no batch, get zeros.
    """
    found = [np.zeros(len(rollout.tokens_T), np.float32) for rollout in rollouts]
    for place in _places(rollouts, row_tokens, rows, lengths)[1]:
        rollout = rollouts[place.rollout]
        end = place.start + _inputs(rollout)
        found[place.rollout] = np.asarray(values[place.batch])[place.row, end - len(rollout.tokens_T) : end]
    return found


def filled_frac(batches: Sequence[Batch]) -> float:
    """Fraction of positions that are not padding."""
    return sum(int(np.count_nonzero(batch.segments_BT)) for batch in batches) / sum(batch.segments_BT.size for batch in batches)


def pack_substeps(
    rollouts: Sequence[Rollout], advantages: npt.ArrayLike, *, substeps: int, row_tokens: int, rows: int, lengths: int = 1
) -> list[list[Batch]]:
    """Splits the rollouts over several optimiser steps and packs each part. Every rollout is used in exactly one step.

    As in the reference code, the rollouts are split in the given order into parts whose sizes differ by at most one, larger parts first. If
    they are given group by group, groups stay whole if `substeps` divides their number. The split depends only on the rollouts; packing,
    microbatches and devices do not change it. If there are fewer usable rollouts than substeps, there are fewer substeps, possibly none.

    Args:
      rollouts, advantages, row_tokens, rows, lengths: as for `pack`.
      substeps: optimiser steps, at least 1. With 1, the result is `[pack(...)]`.

    Raises:
      CapacityError, ConfigError, LearningError: as `pack`; also ConfigError if `substeps` is below 1.
    """
    if substeps < 1:
        raise ConfigError(f"substeps must be at least 1; got {substeps}.")
    values = np.asarray(advantages, np.float64)
    if values.shape != (len(rollouts),):
        raise LearningError(f"There must be one advantage for each of {len(rollouts)} rollouts; got shape {values.shape}.")
    usable = [index for index, rollout in enumerate(rollouts) if rollout.chosen_T.any()]
    parts = [part for part in np.array_split(np.asarray(usable, np.int64), substeps) if part.size]
    return [pack([rollouts[i] for i in part], values[part], row_tokens=row_tokens, rows=rows, lengths=lengths) for part in parts]
