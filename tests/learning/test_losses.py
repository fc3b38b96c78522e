"""The token loss by hand, and reductions against plain loops over rollouts."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError
from discover_jax.learning.losses import LOSSES, REDUCTIONS, importance_sampling
from discover_jax.learning.packing import pack
from discover_jax.types import Rollout, StopReason


def test_importance_sampling_by_hand():
    """Ratio 3, advantage 2: loss -6; its slope in logp is again -6. Far ratios are not clipped."""
    at = np.float32(np.log(0.6)), np.float32(np.log(0.2)), np.float32(2.0)
    assert importance_sampling(*at) == pytest.approx(-6, rel=1e-6)
    assert jax.grad(importance_sampling)(*at) == pytest.approx(-6, rel=1e-6)
    assert importance_sampling(np.float32(0), np.float32(-10), np.float32(1)) == pytest.approx(-np.exp(10), rel=1e-5)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"loss 'dpo' is not known; allowed: importance_sampling"):
        LOSSES["dpo"]
    with pytest.raises(ConfigError, match=r"reduction 'mean' is not known; allowed: sequence_mean, sum, token_mean"):
        REDUCTIONS["mean"]


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(10, 30),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_reductions_equal_loops_over_rollouts(chosen_of, row_tokens, rows, seed):
    """Each token has its own loss; whatever the packing, the weighted sum is what the name says."""
    rng = np.random.default_rng(seed)
    losses = [rng.normal(size=len(chosen)).astype(np.float32) for chosen in chosen_of]
    rollouts = [
        # The loss travels in the place of the log-probability, so that it can be read off the packed batch.
        Rollout(0, i, np.ones(2, np.int32), np.ones(len(c), np.int32), np.where(c, loss, 0), np.array(c), StopReason.STOP_TOKEN)
        for i, (c, loss) in enumerate(zip(chosen_of, losses, strict=True))
    ]
    batches = pack(rollouts, np.ones(len(rollouts)), row_tokens=row_tokens, rows=rows)
    kept = [loss[np.array(c)].astype(np.float64) for c, loss in zip(chosen_of, losses, strict=True) if any(c)]
    expected = {"sum": 0.0, "token_mean": 0.0, "sequence_mean": 0.0}
    if kept:
        expected = {
            "sum": sum(k.sum() for k in kept),
            "token_mean": np.concatenate(kept).mean(),
            "sequence_mean": np.mean([k.mean() for k in kept]),
        }
    for name, reduce in REDUCTIONS.items():
        weights = reduce(batches)
        assert all(w.dtype == np.float32 and (w[~b.mask_BT] == 0).all() for w, b in zip(weights, batches, strict=True))
        total = sum(float((w * b.sampler_logprobs_BT).sum(dtype=np.float64)) for w, b in zip(weights, batches, strict=True))
        assert total == pytest.approx(expected[name], rel=1e-5, abs=1e-5)
