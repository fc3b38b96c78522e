"""Training of the apprentice: a tiny model learns in a few steps, and the saved weights are the trained ones."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.apprentice import batches, corpus, train
from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder
from discover_jax.models.folder_writer import save_folder
from discover_jax.text.tokenizer import SentencePieceTokenizer

reply_loss = jax.jit(train.reply_loss, static_argnums=0)

SHIPPED = Path(corpus.__file__).parent / "weights" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(SHIPPED)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = dataclasses.replace(
        train.apprentice_config(tokenizer),
        num_layers=2,
        num_experts=2,
        width=32,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        mlp_width=32,
    )
    return Model(config, dtype=jnp.float32, experts="dense")


@pytest.fixture(scope="module")
def batch(tokenizer):
    return vars(batches.draw_batch(tokenizer, rows=1, row_tokens=512, seed=0, index=0))


def test_the_apprentice_is_small(tokenizer):
    model = Model(train.apprentice_config(tokenizer), dtype=jnp.float32, experts="dense")
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init_frozen, jax.random.key(0)))]
    assert 3_000_000 < sum(sizes) < 5_000_000


@pytest.mark.slow
def test_loss_falls_in_a_few_steps(model, batch):
    learner = train.init_learner(model, seed=0)
    losses = []
    for _ in range(12):
        learner, metrics = train.train_step(model, learner, batch, jnp.float32(1e-2))
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(model.config.vocab_size)) < 1.0  # a fresh model predicts about uniformly
    assert losses[-1] < 0.75 * losses[0]
    assert 0.0 < float(metrics["wrong"]) < 1.0


@pytest.mark.slow
def test_the_loss_includes_only_replies(model, batch):
    weights = train.init_learner(model, seed=0).weights
    altered = dict(batch)
    altered["targets_BT"] = np.where(batch["mask_BT"] == 1, batch["targets_BT"], 5)
    first, _ = reply_loss(model, weights, batch)
    second, _ = reply_loss(model, weights, altered)
    assert float(first) == float(second)
    altered["targets_BT"] = np.where(batch["mask_BT"] == 1, 5, batch["targets_BT"])
    assert float(reply_loss(model, weights, altered)[0]) != float(first)


@pytest.mark.slow
def test_the_saved_model_has_the_loss_of_training(model, batch, tmp_path):
    """Training rounds the experts to MXFP4, as saving does."""
    learner = train.init_learner(model, seed=0)
    for _ in range(3):
        learner, _ = train.train_step(model, learner, batch, jnp.float32(1e-2))
    trained, _ = reply_loss(model, jax.jit(train.rounded)(learner.weights), batch)
    unrounded, _ = reply_loss(model, learner.weights, batch)
    save_folder(tmp_path, model.config, learner.weights)
    config, loaded = load_folder(tmp_path)
    assert config == model.config
    saved, _ = reply_loss(model, loaded, batch)
    assert float(saved) == pytest.approx(float(trained), rel=1e-6)
    assert float(saved) != pytest.approx(float(unrounded), rel=1e-6)


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    rates = [train.learning_rate_at(progress) for progress in np.linspace(0, 1, 201)]
    peak = train.PEAK_LEARNING_RATE
    assert 0 < rates[0] < 0.01 * peak
    assert max(rates) == peak
    assert rates[-1] == 0.0
    assert rates[int(200 * (1 - train.DECAY)) - 1] == peak
    assert all(b <= a for a, b in itertools.pairwise(rates[20:]))
