"""Packing: for any rollouts, the batches contain each token exactly once, with its own data."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.exceptions import CapacityError, ConfigError, LearningError
from discover_jax.learning.packing import filled_frac, first_fit_decreasing, pack, pack_substeps, row_lengths
from discover_jax.types import Rollout, StopReason


def make_rollout(prompt, tokens, chosen=None, logprobs=None, group=0, index=0):
    chosen = np.ones(len(tokens), bool) if chosen is None else np.asarray(chosen, bool)
    logprobs = np.full(len(tokens), -1.0) if logprobs is None else logprobs
    return Rollout(
        group=group,
        index=index,
        prompt_tokens_P=np.asarray(prompt, np.int32),
        tokens_T=np.asarray(tokens, np.int32),
        logprobs_T=np.where(chosen, logprobs, 0).astype(np.float32),
        chosen_T=chosen,
        stop=StopReason.STOP_TOKEN,
    )


@st.composite
def rollouts_strategy(draw):
    """Rollouts of at most 24 tokens. All tokens are different, so that each can be traced."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=16)), max_size=12))
    rollouts, token = [], 1
    for index, (prompt, chosen) in enumerate(shapes):
        ids = np.arange(token, token + prompt + len(chosen))
        token += len(ids)
        rollouts.append(make_rollout(ids[:prompt], ids[prompt:], chosen, -ids[prompt:] / 7.0, index=index))
    return rollouts


@settings(max_examples=150)
@given(rollouts_strategy(), st.integers(24, 60), st.integers(1, 4))
def test_every_chosen_token_appears_once_with_its_own_data(rollouts, row_tokens, rows):
    advantages = [index + 0.5 for index in range(len(rollouts))]
    batches = pack(rollouts, advantages, row_tokens=row_tokens, rows=rows)
    found = []
    for batch in batches:
        assert batch.tokens_BT.shape == (rows, row_tokens)
        for b, t in zip(*np.nonzero(batch.mask_BT), strict=True):
            found.append((batch.targets_BT[b, t], batch.sampler_logprobs_BT[b, t], batch.advantages_BT[b, t]))
        assert (batch.advantages_BT[~batch.mask_BT] == 0).all()
        assert (batch.sampler_logprobs_BT[~batch.mask_BT] == 0).all()
    expected = [
        (token, logprob, np.float32(advantage))
        for rollout, advantage in zip(rollouts, advantages, strict=True)
        for token, logprob in zip(rollout.tokens_T[rollout.chosen_T], rollout.logprobs_T[rollout.chosen_T], strict=True)
    ]
    assert sorted(found) == sorted(expected)


@settings(max_examples=150)
@given(rollouts_strategy(), st.integers(24, 60), st.integers(1, 4))
def test_segments_are_whole_sequences_shifted_by_one(rollouts, row_tokens, rows):
    batches = pack(rollouts, np.ones(len(rollouts)), row_tokens=row_tokens, rows=rows)
    sequences = []
    for batch in batches:
        for b in range(rows):
            segments_T = batch.segments_BT[b]
            used = np.count_nonzero(segments_T)
            assert (np.diff(segments_T[:used]) >= 0).all()  # contiguous, and numbered in order from 1
            assert sorted(set(segments_T[:used])) == list(range(1, segments_T.max() + 1))
            for array in (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.segments_BT, batch.mask_BT):
                assert not array[b, used:].any()  # padding
            for segment in range(1, segments_T.max() + 1):
                at = segments_T == segment
                np.testing.assert_array_equal(batch.positions_BT[b, at], np.arange(at.sum()))
                np.testing.assert_array_equal(batch.tokens_BT[b, at][1:], batch.targets_BT[b, at][:-1])
                sequences.append((*batch.tokens_BT[b, at], batch.targets_BT[b, at][-1]))
    expected = [(*r.prompt_tokens_P, *r.tokens_T) for r in rollouts if r.chosen_T.any()]
    assert sorted(sequences) == sorted(expected)


def test_mask_by_hand():
    """Prompt 5 6 7, answer 8 9 with 8 forced: inputs 5 6 7 8, targets 6 7 8 9. Only the last target counts for the loss."""
    (batch,) = pack([make_rollout([5, 6, 7], [8, 9], [False, True], [0.0, -2.0])], [3.0], row_tokens=6, rows=1)
    np.testing.assert_array_equal(batch.tokens_BT, [[5, 6, 7, 8, 0, 0]])
    np.testing.assert_array_equal(batch.targets_BT, [[6, 7, 8, 9, 0, 0]])
    np.testing.assert_array_equal(batch.positions_BT, [[0, 1, 2, 3, 0, 0]])
    np.testing.assert_array_equal(batch.segments_BT, [[1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.mask_BT, [[False, False, False, True, False, False]])
    np.testing.assert_array_equal(batch.sampler_logprobs_BT, [[0, 0, 0, -2, 0, 0]])
    np.testing.assert_array_equal(batch.advantages_BT, [[0, 0, 0, 3, 0, 0]])
    assert batch.routes_BTLX is None
    assert {name: array.dtype.name for name, array in vars(batch).items() if array is not None} == {
        "tokens_BT": "int32",
        "targets_BT": "int32",
        "positions_BT": "int32",
        "segments_BT": "int32",
        "mask_BT": "bool",
        "sampler_logprobs_BT": "float32",
        "advantages_BT": "float32",
        "temperatures_BT": "float32",
    }


def test_routes_are_packed_with_their_inputs():
    """Two rollouts in one row, then padding. At padding, too, a token's experts are different from each other."""
    rollouts = [make_rollout([5, 6], [7, 8], [True, True], [-1.0, -2.0]), make_rollout([5], [9], [True], [-1.0])]
    routes = [np.array([[[2, 1]], [[3, 0]], [[0, 2]]], np.uint8), np.array([[[1, 3]]], np.uint8)]
    rollouts = [dataclasses.replace(rollout, routes_SLX=own) for rollout, own in zip(rollouts, routes, strict=True)]
    (batch,) = pack(rollouts, [1.0, 2.0], row_tokens=6, rows=1)
    np.testing.assert_array_equal(batch.routes_BTLX[0, :, 0], [[2, 1], [3, 0], [0, 2], [1, 3], [0, 1], [0, 1]])
    assert batch.routes_BTLX.dtype == np.uint8
    with pytest.raises(LearningError, match=r"routes.*\b1\b.*\b3\b"):
        pack([dataclasses.replace(rollouts[0], routes_SLX=routes[1])], [1.0], row_tokens=6, rows=1)
    with pytest.raises(LearningError, match="routes"):
        pack([rollouts[0], dataclasses.replace(rollouts[1], routes_SLX=None)], [1.0, 2.0], row_tokens=6, rows=1)


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([3, 5, 2, 4, 2, 3], 8) == [[1, 0], [3, 5], [2, 4]]


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
def test_bins_are_a_partition_within_its_bound(lengths, capacity):
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= capacity for members in bins)
    fewest = -(-sum(lengths) // capacity)  # at least this many bins; at most one bin can be half full or less
    assert len(bins) <= 2 * fewest + 1


def test_no_rollouts_give_no_batches():
    assert pack([], [], row_tokens=8, rows=2) == []
    assert pack([make_rollout([1], [2], [False])], [1.0], row_tokens=8, rows=2) == []


def test_a_rollout_may_fill_a_row_but_not_exceed_it():
    rollout = make_rollout([1, 2, 3], [4, 5, 6], group=4, index=7)
    (batch,) = pack([rollout], [1.0], row_tokens=5, rows=1)
    assert (batch.segments_BT == 1).all()
    with pytest.raises(CapacityError, match=r"Rollout 7 of group 4 .*\b5\b.*\b4\b.*config\.train\.row_tokens"):
        pack([rollout], [1.0], row_tokens=4, rows=1)


def test_bad_input_is_refused():
    good = make_rollout([1], [2, 3])
    with pytest.raises(LearningError, match=r"advantage.*\b1\b.*\b2\b"):
        pack([good], [1.0, 2.0], row_tokens=8, rows=1)
    for bad in (np.nan, np.inf, 1e39):
        with pytest.raises(LearningError, match=r"Advantages.*float32"):
            pack([good], [bad], row_tokens=8, rows=1)
    with pytest.raises(LearningError, match="empty prompt"):
        pack([make_rollout([], [2, 3])], [1.0], row_tokens=8, rows=1)
    with pytest.raises(LearningError, match=r"log-probabilities.*finite"):
        pack([make_rollout([1], [2, 3], logprobs=[-1.0, -np.inf])], [1.0], row_tokens=8, rows=1)
    ragged = Rollout(0, 0, np.ones(1, np.int32), np.ones(2, np.int32), np.zeros(3, np.float32), np.ones(2, bool), StopReason.MAX_TOKENS)
    with pytest.raises(LearningError, match=r"temperature 0\.0"):
        pack([dataclasses.replace(good, temperature=0.0)], [1.0], row_tokens=8, rows=1)
    with pytest.raises(LearningError, match="chosen_T"):
        pack([ragged], [1.0], row_tokens=8, rows=1)
    with pytest.raises(ConfigError, match="rows"):
        pack([good], [1.0], row_tokens=8, rows=0)


def _tokens_of(batches):
    return sorted(int(t) for batch in batches for t in batch.targets_BT[batch.mask_BT])


@settings(max_examples=100)
@given(rollouts_strategy(), st.integers(1, 5), st.integers(24, 60), st.integers(1, 4))
def test_substeps_split_the_rollouts_evenly_and_in_order(rollouts, substeps, row_tokens, rows):
    advantages = [index + 0.5 for index in range(len(rollouts))]
    parts = pack_substeps(rollouts, advantages, substeps=substeps, row_tokens=row_tokens, rows=rows)
    usable = [r for r in rollouts if r.chosen_T.any()]
    assert len(parts) == min(substeps, len(usable))
    start, sizes = 0, []
    for batches in parts:
        advantages_here = {float(a) for b in batches for a in b.advantages_BT[b.mask_BT]}
        members = usable[start : start + len(advantages_here)]
        assert _tokens_of(batches) == sorted(int(t) for r in members for t in r.tokens_T[r.chosen_T])
        assert advantages_here == {r.index + 0.5 for r in members}
        start += len(members)
        sizes.append(len(members))
    assert start == len(usable)
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes or sizes[0] - sizes[-1] <= 1


def test_substeps_of_whole_groups():
    """Four groups of three in two substeps: groups 0 and 1, then 2 and 3."""
    rollouts = [make_rollout([1], [10 * group + index], group=group, index=index) for group in range(4) for index in range(3)]
    parts = pack_substeps(rollouts, np.ones(12), substeps=2, row_tokens=4, rows=2)
    assert [_tokens_of(batches) for batches in parts] == [[0, 1, 2, 10, 11, 12], [20, 21, 22, 30, 31, 32]]


def test_invalid_substeps_are_refused():
    with pytest.raises(ConfigError, match="substeps"):
        pack_substeps([make_rollout([1], [2])], [1.0], substeps=0, row_tokens=4, rows=1)
    with pytest.raises(LearningError, match=r"advantage.*\b1\b.*\(2,\)"):
        pack_substeps([make_rollout([1], [2])], [1.0, 2.0], substeps=1, row_tokens=4, rows=1)


@settings(max_examples=100)
@given(st.lists(st.integers(2, 1024), min_size=1, max_size=40), st.integers(1024, 2100), st.integers(1, 3), st.integers(1, 9))
def test_the_row_length_with_the_fewest_positions_is_chosen(sizes, row_tokens, rows, lengths):
    rollouts = [make_rollout([1], [2] * size) for size in sizes]
    options = row_lengths(row_tokens, lengths)
    assert options[0] == row_tokens
    assert all(row_tokens / 2 <= length <= row_tokens and (length % 128 == 0 or length == row_tokens) for length in options)
    positions = [
        sum(batch.tokens_BT.size for batch in pack(rollouts, np.ones(len(rollouts)), row_tokens=length, rows=rows))
        for length in options
        if length >= max(sizes)
    ]
    batches = pack(rollouts, np.ones(len(rollouts)), row_tokens=row_tokens, rows=rows, lengths=lengths)
    assert sum(batch.tokens_BT.size for batch in batches) == min(positions)
    assert filled_frac(batches) == pytest.approx(sum(sizes) / min(positions))


def test_a_step_of_the_report_s_size_has_little_padding():
    """128 rollouts of 8,192 tokens with a prompt of 1,500. Three fit a row of 34,192 tokens and leave a seventh of it empty."""
    rollouts = [make_rollout([1] * 1500, [2] * 8192) for _ in range(128)]
    filled = [filled_frac(pack(rollouts, np.ones(128), row_tokens=34_192, rows=1, lengths=lengths)) for lengths in (1, 8)]
    assert filled[0] < 0.86
    assert filled[1] > 0.95
