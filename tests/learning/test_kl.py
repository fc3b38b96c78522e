"""The KL penalty on advantages, compared with a loop over tokens for any packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.exceptions import LearningError
from discover_jax.learning.kl import shape_advantages
from discover_jax.learning.packing import pack
from discover_jax.types import Rollout, StopReason


def _rollouts(chosen_of, rng):
    """Rollouts whose log-probabilities are all different, so that they identify tokens."""
    return [
        Rollout(0, i, np.ones(2, np.int32), np.ones(len(c), np.int32), np.float32(np.where(c, -rng.uniform(1, 9, len(c)), 0)), np.array(c),
                StopReason.STOP_TOKEN)
        for i, c in enumerate(chosen_of)
    ]  # fmt: skip


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(10, 30),
    st.integers(1, 3),
    st.floats(0.0, 3.0),
    st.integers(0, 2**31),
)
def test_shaping_equals_a_loop_over_tokens(chosen_of, row_tokens, rows, coefficient, seed):
    rng = np.random.default_rng(seed)
    rollouts, advantages = _rollouts(chosen_of, rng), rng.normal(size=len(chosen_of))
    gap_of = {float(lp): rng.normal() for r in rollouts for lp in r.logprobs_T[r.chosen_T]}
    mean = sum(gap_of.values()) / max(len(gap_of), 1)
    expected = {
        float(lp): a + coefficient * (mean - gap_of[float(lp)])
        for r, a in zip(rollouts, advantages, strict=True)
        for lp in r.logprobs_T[r.chosen_T]
    }
    batches = pack(rollouts, advantages, row_tokens=row_tokens, rows=rows)
    gaps = [np.vectorize(lambda lp: gap_of.get(float(lp), np.nan))(b.sampler_logprobs_BT) for b in batches]  # NaN where masked
    shaped, found_mean = shape_advantages(batches, gaps, coefficient)
    assert found_mean == pytest.approx(mean, abs=1e-6)
    found = {}
    for before, batch in zip(batches, shaped, strict=True):
        assert batch.advantages_BT.dtype == np.float32
        assert (batch.advantages_BT[~batch.mask_BT] == 0).all()
        assert batch.tokens_BT is before.tokens_BT
        found |= dict(zip(batch.sampler_logprobs_BT[batch.mask_BT].tolist(), batch.advantages_BT[batch.mask_BT].tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    total = sum(advantage * r.chosen_T.sum() for advantage, r in zip(advantages, rollouts, strict=True))
    assert sum(found.values()) == pytest.approx(total, rel=1e-4, abs=1e-4)  # the penalty sums to zero over the tokens


def test_no_batches_stay_no_batches():
    assert shape_advantages([], [], 0.5) == ([], 0.0)


def test_a_base_model_that_gives_a_token_probability_0_is_refused():
    batches = pack(_rollouts([[True, True]], np.random.default_rng(0)), [1.0], row_tokens=8, rows=1)
    gaps = [np.where(batch.mask_BT, np.inf, 0.0) for batch in batches]
    for coefficient in (0.0, 0.1):
        with pytest.raises(LearningError, match=r"(?s)2 of 2 .*config\.train\.kl_coefficient"):
            shape_advantages(batches, gaps, coefficient)
