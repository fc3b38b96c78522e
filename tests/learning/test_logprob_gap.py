"""Sampler and trainer use one model: with the same weights their log-probabilities agree to rounding; with other weights they differ."""

import dataclasses

import jax
import numpy as np
import pytest

from discover_jax.config import default_config
from discover_jax.kernels.kernel_set import kernel_set
from discover_jax.learning.packing import pack
from discover_jax.learning.train_state import adam
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.policy import load_policy
from discover_jax.sampling.sampler import Sampler
from discover_jax.types import Prompt


@jax.default_matmul_precision("highest")  # GPUs use a lower precision by default
def test_gap_between_sampler_and_trainer_is_rounding(random_weights):
    """Rollouts longer than the sliding window: the sampler uses prefill and cached decode, the trainer whole packed sequences."""
    model = Model(ModelConfig(2, 32, 4, 2, 16, 4, 2, 32, 53, sliding_window=8), LoraConfig(2, 2, 2, 4.0))
    frozen = random_weights(model.abstract_frozen())
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: np.float32(0.15 * rng.normal(size=leaf.shape)), model.abstract_lora())
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


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_on_a_gpu_fused_and_packed_experts_agree():
    """In bfloat16 the gap is no larger than if both sides compute the experts by the reference."""
    pytest.importorskip("jax_triton", reason="needs the extra `kernels`")
    gaps = gaps_of_forms()
    assert gaps["packed"] > 0
    assert gaps["tiled"] < 1.5 * gaps["packed"] + 1e-3


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_on_a_gpu_the_fused_kernels_of_a_layer_have_the_gap_of_separate_ones():
    pytest.importorskip("jax_triton", reason="needs the extra `kernels`")
    from discover_jax.kernels.layer_decode import fused

    sizes, kernels = ModelConfig(4, 256, 8, 2, 64, 8, 2, 128, 211, sliding_window=128), kernel_set("gpu")
    separate = Model(sizes, LoraConfig(4, 8, 4, 8.0), dtype="bfloat16", experts="tiled", kernels=kernels)
    models = {"separate": separate, "fused": dataclasses.replace(separate, kernels=dataclasses.replace(kernels, layer=fused()))}
    rng, frozen = np.random.default_rng(0), separate.init_frozen(jax.random.key(0))
    lora = jax.tree.map(lambda leaf: np.float32(0.03 * rng.normal(size=leaf.shape)), separate.abstract_lora())
    prompts = [Prompt(0, "seed", "", rng.integers(0, 211, 9).astype(np.int32))]
    update, gaps = Update(separate, adam()), {}
    for name, model in models.items():
        sampler = Sampler(model, slots=16, max_prompt_tokens=16, max_new_tokens=64, temperature=1.0, stop_ids=[1])
        batches = pack(list(sampler.sample(frozen, lora, prompts, 16, seed=0, step=0)), np.ones(16), row_tokens=96, rows=4)
        gaps[name] = update.measure(frozen, lora, batches)["logprob_gap/mean"]
    assert 0 < gaps["fused"] < 1.3 * gaps["separate"] + 5e-4


def gaps_of_forms():
    """Mean gap between rollouts that were sampled with each form of the experts and their log-probabilities in the packed form."""
    sizes = ModelConfig(4, 256, 4, 2, 32, 8, 2, 128, 211, sliding_window=8)
    models = {form: Model(sizes, LoraConfig(4, 8, 4, 8.0), dtype="bfloat16", experts=form) for form in ("packed", "tiled")}
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: np.float32(0.03 * rng.normal(size=leaf.shape)), models["packed"].abstract_lora())
    prompts = [Prompt(0, "seed", "", rng.integers(0, 211, 9).astype(np.int32))]
    update, gaps = Update(models["packed"], adam()), {}
    for form, model in models.items():
        sampler = Sampler(model, slots=16, max_prompt_tokens=16, max_new_tokens=64, temperature=1.0, stop_ids=[1])
        rollouts = list(sampler.sample(model.init_frozen(jax.random.key(0)), lora, prompts, 16, seed=0, step=0))
        batches = pack(rollouts, np.ones(len(rollouts)), row_tokens=96, rows=4)
        gaps[form] = update.measure(models["packed"].init_frozen(jax.random.key(0)), lora, batches)["logprob_gap/mean"]
    return gaps


@pytest.mark.slow
def test_with_recorded_routes_the_gap_is_rounding_even_if_experts_are_nearly_tied():
    """Random bfloat16 weights, eight layers, 4 of 32 experts: sampler and update often choose differently between nearly tied experts."""
    sizes = ModelConfig(8, 64, 8, 2, 16, 32, 4, 32, 503, sliding_window=32)
    model = Model(sizes, LoraConfig(4, 0, 4, 8.0), dtype="bfloat16", experts="packed")
    frozen, lora = model.init_frozen(jax.random.key(1)), model.init_lora(jax.random.key(1))
    rng = np.random.default_rng(1)
    prompts = [Prompt(group, "seed", "", rng.integers(0, 503, 40).astype(np.int32)) for group in range(3)]
    sampler = Sampler(model, slots=12, max_prompt_tokens=40, max_new_tokens=24, temperature=1.0, stop_ids=[503])
    rollouts = list(sampler.sample(frozen, lora, prompts, 4, seed=0, step=0))
    (batch,) = pack(rollouts, np.ones(12), row_tokens=256, rows=3)
    assert batch.routes_BTLX.shape == (3, 256, 8, 4)
    update = Update(model, adam(), measure_kl=True)
    replayed = update.measure(frozen, lora, [batch])
    rerouted = update.measure(frozen, lora, [dataclasses.replace(batch, routes_BTLX=None)])
    assert replayed["tokens"] == 288
    assert replayed["logprob_gap/mean"] < 0.001
    assert replayed["logprob_gap/mean"] < 0.7 * rerouted["logprob_gap/mean"]
    assert replayed["logprob_gap/max"] < 0.05 < rerouted["logprob_gap/max"]
    assert replayed["kl_base/mean"] == rerouted["kl_base/mean"]  # the base model uses its own expert routing


@pytest.mark.slow  # a float32 test of the gap runs in every suite
def test_in_bfloat16_the_gap_of_a_trained_model_stays_small():
    """The apprentice, at the temperature of its training. Without `EXACT_ROUNDING` the mean is 0.006."""
    config = default_config()
    config.model.dtype = "bfloat16"
    policy = load_policy(config)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: np.float32(0.02 * rng.normal(size=leaf.shape)), policy.model.abstract_lora())
    text = "Improve the program.\nimport pandas as pd\nfrom sklearn.linear_model import LogisticRegression\n"
    prompts = [Prompt(0, "seed", "", np.asarray(policy.tokenizer.encode(text), np.int32))]
    sampler = Sampler(policy.model, slots=8, max_prompt_tokens=128, max_new_tokens=100, temperature=1.0, stop_ids=policy.stop_ids)
    rollouts = list(sampler.sample(policy.frozen, lora, prompts, 8, seed=0, step=0))
    measured = Update(policy.model, adam()).measure(policy.frozen, lora, pack(rollouts, np.ones(8), row_tokens=256, rows=4))
    assert measured["tokens"] > 500
    assert 1e-5 < measured["logprob_gap/mean"] < 0.003
