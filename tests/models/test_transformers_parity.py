"""The model against transformers' GptOssForCausalLM; both load the same folder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.models.config import ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder
from discover_jax.models.synthetic import write_synthetic

_SMALL = ModelConfig(
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    num_experts=4,
    experts_per_token=2,
    mlp_width=32,
    vocab_size=97,
    sliding_window=16,
    eos_id=1,
    pad_id=0,
)
CONFIGS = {
    "grouped": _SMALL,
    "every expert active": dataclasses.replace(_SMALL, num_experts=3, experts_per_token=3),
    "one expert active, four layers": dataclasses.replace(_SMALL, num_layers=4, num_experts=8, experts_per_token=1),
    "one key head": dataclasses.replace(_SMALL, num_heads=8, num_kv_heads=1, head_size=16, width=96, mlp_width=64),
    "no grouping, wide experts": dataclasses.replace(_SMALL, num_kv_heads=4, mlp_width=128, swiglu_limit=0.5),
    "other rotary constants": dataclasses.replace(
        _SMALL, rope_theta=10_000.0, rope_factor=4.0, rope_original_length=32, rope_beta_fast=8.0, head_size=64
    ),
    "rounded ramp": dataclasses.replace(_SMALL, rope_truncate=True, rope_original_length=64, rope_factor=2.0, rms_eps=1e-3),
    "published window": dataclasses.replace(_SMALL, sliding_window=128, num_layers=4),
}


@pytest.fixture(scope="module", autouse=True)
def _references():
    """Not at the top of the file: each worker imports all files, but only one runs the tests that need torch (see `TORCH` in conftest)."""
    global torch, transformers
    torch = pytest.importorskip("torch", reason="parity needs torch (make test installs it; PARITY=0 leaves it out)")
    transformers = pytest.importorskip("transformers")


def reference(path, dtype=None):
    """transformers' model of the folder, with eager implementations and its own dequantisation."""
    return transformers.GptOssForCausalLM.from_pretrained(
        path,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=dtype or torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def reference_logits(model, tokens_BT):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens_BT))).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def logits(model, frozen, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD = model.hidden(frozen, None, tokens_BT, positions_BT, jnp.ones_like(positions_BT))
    return model.logits(frozen, None, hidden_BTD)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(model, frozen, tokens_BT, lengths_B, capacity):
    length = tokens_BT.shape[1]
    padded_BC = jnp.pad(tokens_BT, ((0, 0), (0, -length % 16)))
    return model.prefill(frozen, None, padded_BC, lengths_B, model.init_cache(len(tokens_BT), capacity, page_size=16))


@functools.partial(jax.jit, static_argnums=0)
def decode(model, frozen, tokens_B, cache):
    return model.decode(frozen, None, tokens_B, cache)


@functools.partial(jax.jit, static_argnums=0)
def head(model, frozen, hidden_BD):
    return model.logits(frozen, None, hidden_BD)


def random_tokens(config, rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


_QUICK = ("grouped", "other rotary constants", "rounded ramp")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow]) for name in CONFIGS])
def test_logits_equal_transformers(tmp_path, name):
    config = CONFIGS[name]
    write_synthetic(tmp_path, config, seed=len(name))
    tokens_BT = random_tokens(config, 2, 3 * config.sliding_window + 5 if config.sliding_window < 64 else 200)
    expected = reference_logits(reference(tmp_path), tokens_BT)
    assert expected.std() > 0.5  # otherwise the comparison would test little
    for experts in ("packed", "dense") if name == "grouped" else ("packed",):
        read, frozen = load_folder(tmp_path, experts=experts)
        assert read == config
        np.testing.assert_allclose(logits(Model(read, experts=experts), frozen, tokens_BT), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "length",
    [pytest.param(127, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow), 129, pytest.param(130, marks=pytest.mark.slow)],
)
def test_sliding_window_has_128_keys(tmp_path, length):
    """The whole sequence in one forward pass; then its last four tokens one at a time from the cache."""
    config = CONFIGS["published window"]
    write_synthetic(tmp_path, config, seed=3)
    tokens_BT = random_tokens(config, 1, length + 2)
    expected = reference_logits(reference(tmp_path), tokens_BT)
    _, frozen = load_folder(tmp_path, experts="packed")
    model = Model(config, experts="packed")
    np.testing.assert_allclose(logits(model, frozen, tokens_BT), expected, atol=1e-4, rtol=0)
    hidden_BD, cache, _ = prefill(model, frozen, tokens_BT[:, :-4], jnp.array([length - 2]), 256)
    for position in range(length - 2, length + 2):
        np.testing.assert_allclose(head(model, frozen, hidden_BD), expected[:, position - 1], atol=1e-4, rtol=0)
        hidden_BD, cache, _ = decode(model, frozen, tokens_BT[:, position], cache)
    np.testing.assert_allclose(head(model, frozen, hidden_BD), expected[:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["grouped", pytest.param("every expert active", marks=pytest.mark.slow)])
def test_bfloat16_error_is_at_most_that_of_transformers(tmp_path, name):
    config = CONFIGS[name]
    write_synthetic(tmp_path, config, seed=11)
    tokens_BT = random_tokens(config, 4, 150)
    exact = reference_logits(reference(tmp_path), tokens_BT)
    theirs = reference_logits(reference(tmp_path, torch.bfloat16), tokens_BT)
    _, frozen = load_folder(tmp_path, dtype="bfloat16", experts="packed")
    ours = logits(Model(config, dtype="bfloat16", experts="packed"), frozen, tokens_BT)
    our_error, their_error = (np.sqrt(np.mean(np.square(np.asarray(got) - exact))) for got in (ours, theirs))
    assert 0 < our_error <= their_error


def test_dequantised_experts_give_equal_logits(tmp_path):
    """transformers writes the folder: experts [E, in, out] in its own type."""
    write_synthetic(tmp_path / "mxfp4", _SMALL, seed=5)
    model = reference(tmp_path / "mxfp4")
    # Copy into a model that was never packed: transformers 5.23 saves a dequantised model under the names of packed tensors.
    plain = transformers.GptOssForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    tokens_BT = random_tokens(_SMALL, 2, 40)
    config, frozen = load_folder(tmp_path / "plain")
    np.testing.assert_allclose(logits(Model(config), frozen, tokens_BT), reference_logits(model, tokens_BT), atol=1e-4, rtol=0)


def test_the_shipped_apprentice_gives_equal_logits():
    """The shipped weights are an ordinary gpt-oss folder, which transformers can load."""
    from discover_jax.policy import APPRENTICE

    config, frozen = load_folder(APPRENTICE)
    tokens_BT = random_tokens(config, 1, 180)
    np.testing.assert_allclose(
        logits(Model(config), frozen, tokens_BT), reference_logits(reference(APPRENTICE), tokens_BT), atol=2e-4, rtol=0
    )
