"""One model serves sampler and trainer: on the same weights their log-probabilities agree to rounding, on others they do not."""

import dataclasses

import jax
import numpy as np
import pytest

from discover_jax.learning.packing import pack
from discover_jax.learning.train_state import adam
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.gpt_oss import Model
from discover_jax.sampling.sampler import Sampler
from discover_jax.types import Prompt


def test_gap_between_sampler_and_trainer_is_rounding():
    """Rollouts longer than the window, from prefill and cached decode; then packed rows, the whole sequence at once."""
    model = Model(ModelConfig(2, 32, 4, 2, 16, 4, 2, 32, 53, sliding_window=8), LoraConfig(2, 2, 2, 4.0))
    frozen = model.init_frozen(jax.random.key(0))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), model.abstract_lora())
    prompts = [Prompt(g, "seed", "", rng.integers(0, 53, n).astype(np.int32)) for g, n in enumerate([4, 13])]
    sampler = Sampler(
        model, slots=6, max_prompt_tokens=16, max_new_tokens=24, temperature=0.7, temperature_spread=0.4, stop_ids=[1], launch_steps=8
    )
    rollouts = list(sampler.sample(frozen, lora, prompts, 3, seed=0, step=0))
    assert max(len(rollout.tokens_T) for rollout in rollouts) > 8
    batches = pack(rollouts, np.ones(len(rollouts)), row_tokens=48, rows=1)
    update = Update(model, adam())
    metrics = update.measure(frozen, lora, batches)
    assert metrics["tokens"] == sum(len(rollout.tokens_T) for rollout in rollouts)
    assert metrics["logprob_gap/mean"] < 2e-6
    assert metrics["logprob_gap/max"] < 2e-5
    assert metrics["ratio/min"] == pytest.approx(1, abs=2e-5)
    assert metrics["ratio/max"] == pytest.approx(1, abs=2e-5)

    other = jax.tree.map(lambda leaf: 1.1 * leaf, lora)
    assert update.measure(frozen, other, batches)["logprob_gap/mean"] > 1e-3
    warmer = [dataclasses.replace(rollout, temperature=1.1 * rollout.temperature) for rollout in rollouts]
    assert update.measure(frozen, lora, pack(warmer, np.ones(len(warmer)), row_tokens=48, rows=1))["logprob_gap/mean"] > 1e-3
