"""Decoding by the kernels of a whole layer equals decoding by separate operations, and is refused for models that they do not support."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from discover_jax.exceptions import ConfigError
from discover_jax.kernels import layer_tpu
from discover_jax.kernels.kernel_set import REFERENCE, kernel_set
from discover_jax.kernels.layer_parts import LayerKernels
from discover_jax.kernels.spread import SPREAD_LAYER
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model

LORA = LoraConfig(attention_rank=4, expert_rank=2, head_rank=3, alpha=8.0)


def _emptied(cache):
    """The cache with the last of four rows empty."""
    return dataclasses.replace(cache, lengths_B=jax.device_put(np.asarray(cache.lengths_B) * np.array([1, 1, 1, 0], np.int32)))


def _decoded(model, frozen, lora, prompt=10, page=None):
    """Hidden states, routes and cache after a prompt, one row empty, and four tokens."""
    tokens_BT = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, prompt + 4)).astype(np.int32)
    cache = jax.jit(model.init_cache, static_argnums=(0, 1, 2))(4, 128 * 2, page or (prompt if prompt < 16 else 16))
    _, cache, _ = jax.jit(model.prefill)(frozen, lora, tokens_BT[:, :prompt], np.array([prompt, 3, 1, 2]), cache)
    cache = _emptied(cache)
    decode, seen = jax.jit(model.decode), []
    for position in range(prompt, prompt + 4):
        hidden_BD, cache, routes_BLX = decode(frozen, lora, tokens_BT[:, position], cache)
        cache = _emptied(cache)
        seen.append((np.asarray(hidden_BD)[:3], np.asarray(routes_BLX)[:3]))
    return jax.tree.map(
        lambda x: np.asarray(x, np.float32), (seen, cache.pool, [np.asarray(x)[:, :3] for x in (cache.ring_k_LBKWH, cache.ring_v_LBKWH)])
    )


def _random_lora(model):
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: jax.device_put((0.05 * rng.normal(size=leaf.shape)).astype(leaf.dtype)), model.abstract_lora())


@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_references_of_a_layer_decode_like_separate_operations(adapted, random_weights):
    model = Model(ModelConfig(2, 32, 4, 2, 8, 4, 2, 16, 97, sliding_window=8), LORA)  # one layer of each attention
    fused = dataclasses.replace(model, kernels=dataclasses.replace(REFERENCE, layer=LayerKernels()))
    frozen, lora = random_weights(model.abstract_frozen()), _random_lora(model) if adapted else None
    expected = _decoded(model, frozen, lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), _decoded(fused, frozen, lora), expected)
    assert np.abs(expected[0][-1][0]).max() > 0.1


TPU_SIZES = ModelConfig(2, 64, 4, 2, 64, 8, 4, 64, 97, sliding_window=128)


def _interpreted():
    """The TPU kernels of a layer, in Pallas's interpreter."""
    parts = {field.name: getattr(layer_tpu.KERNELS, field.name) for field in dataclasses.fields(LayerKernels)}
    options = {"interpret": pltpu.InterpretParams(uninitialized_memory="nan")}
    return {name: functools.partial(part, **options) for name, part in parts.items() if callable(part)}


@pytest.mark.slow
def test_tpu_kernels_of_a_layer_decode_like_separate_operations():
    """The adapter of experts is laid out within the step."""
    model = Model(TPU_SIZES, LORA, experts="lanes")
    fused = dataclasses.replace(model, kernels=dataclasses.replace(REFERENCE, layer=LayerKernels(**_interpreted())))
    frozen, lora = model.init_frozen(jax.random.key(0)), _random_lora(model)
    found, expected = (_decoded(one, frozen, lora, prompt=128, page=128) for one in (fused, model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    assert np.abs(expected[0][-1][0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1 2", "2 2"])
def test_parts_of_a_layer_spread_over_devices_decode_like_separate_operations(mesh):
    """Rows with and without tokens, pages of each device, and experts that exchange their tokens."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, str(Path(__file__).with_name("tpu_layer_program.py")), *mesh.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < 1e-4
    assert found["largest"] > 0.1


def test_more_rows_than_a_layer_supports_use_separate_operations():
    def refuse(*_, **__):
        raise AssertionError("the layer's kernels were called")

    model = Model(ModelConfig(2, 32, 4, 2, 8, 4, 2, 16, 97, sliding_window=8), LORA)
    refusing = dict.fromkeys(SPREAD_LAYER, refuse)
    frozen, tokens = model.abstract_frozen(), np.zeros(3, np.int32)
    for most, called in ((2, False), (3, True)):
        layer = LayerKernels(**refusing, most_rows=most)
        fused = dataclasses.replace(model, kernels=dataclasses.replace(REFERENCE, layer=layer))
        decode = functools.partial(jax.eval_shape, fused.decode, frozen, None, tokens, jax.eval_shape(lambda: model.init_cache(3, 16, 16)))
        if called:
            with pytest.raises(AssertionError, match="were called"):
                decode()
        else:
            decode()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (ModelConfig(2, 32, 4, 2, 8, 0, 0, 64, 97, family="qwen2"), "None.*without experts"),
        (ModelConfig(2, 32, 4, 2, 8, 0, 0, 64, 97, family="qwen3", qk_norm=True), "None.*norms of queries and keys"),
    ],
)
def test_unsupported_models_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Model(sizes, LoraConfig(4, 0, 0, 8.0), kernels=dataclasses.replace(REFERENCE, layer=LayerKernels()))


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("names", ["norm", "rotation", "router", "norm,rotation,router"])
def test_fused_kernels_on_a_gpu_decode_like_separate_ones(names):
    from discover_jax.kernels.layer_decode import fused

    sizes = ModelConfig(4, 256, 8, 2, 64, 16, 4, 128, 97, sliding_window=128)
    kernels = kernel_set("gpu")
    model = Model(sizes, LORA, dtype="bfloat16", experts="tiled", kernels=kernels)
    frozen, lora = model.init_frozen(jax.random.key(0)), model.cast(_random_lora(model))
    other = dataclasses.replace(model, kernels=dataclasses.replace(kernels, layer=fused(names.split(","))))
    got, expected = (_decoded(one, frozen, lora, prompt=16) for one in (other, model))
    for (hidden, routes), (right, right_routes) in zip(got[0], expected[0], strict=True):
        same = (routes == right_routes).all(axis=(1, 2))  # rounding may change an expert between nearly tied ones
        assert same.any()
        assert np.linalg.norm(hidden[same] - right[same]) < 0.03 * np.linalg.norm(right[same])
