"""Tiled experts against packed ones, bit by bit: values, decoding, gradients, folders; and when the model uses tiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import AbstractMesh

from discover_jax.config import default_config
from discover_jax.engine import build_model
from discover_jax.exceptions import ConfigError
from discover_jax.kernels.kernel_set import PLATFORMS, Platform, find_kernel, kernel_set
from discover_jax.kernels.mxfp4_tiles import HIGHEST, SLABS, restore
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder
from discover_jax.models.folder_writer import save_folder
from discover_jax.models.synthetic import write_synthetic

CONFIG = ModelConfig(4, 128, 4, 2, 32, 4, 2, 64, 97, sliding_window=8)
LORA = LoraConfig(attention_rank=4, expert_rank=2, head_rank=3, alpha=8.0)
PACKED, TILED = (Model(CONFIG, LORA, dtype="bfloat16", experts=form) for form in ("packed", "tiled"))

# Operation by operation, it would compile dozens of functions.
_restore = jax.jit(restore, static_argnames="paired")


def _as_packed(tree):
    """Converts a tree with tiles to one with blocks and scales."""
    changed = {}
    for name, node in tree.items():
        if isinstance(node, dict) and "words" in node:
            rest = {key: leaf for key, leaf in node.items() if key not in ("words", "factors")}
            parts = [
                _restore(*pair, paired=SLABS[name].paired) for pair in zip(*map(np.asarray, (node["words"], node["factors"])), strict=True)
            ]
            changed[name] = rest | {
                key: np.stack(leaves) for key, leaves in zip(("blocks", "scales"), zip(*parts, strict=True), strict=True)
            }
        else:
            changed[name] = _as_packed(node) if isinstance(node, dict) else node
    return changed


def _assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), first, second)


@pytest.fixture(scope="module")
def frozen():
    """Weights in both forms, from the same key."""
    return [model.init_frozen(jax.random.key(0)) for model in (PACKED, TILED)]


@pytest.fixture(scope="module")
def lora():
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: jax.device_put((0.05 * rng.normal(size=leaf.shape)).astype(leaf.dtype)), PACKED.abstract_lora())


def _tokens(rows, length):
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@pytest.mark.slow
def test_random_weights_of_a_key_are_equal_in_value_and_size(frozen):
    packed, tiled = frozen
    assert tiled["pairs"]["full"]["experts"]["down"]["words"].dtype == jnp.int32
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) == sum(leaf.nbytes for leaf in jax.tree.leaves(tiled))
    _assert_equal(_as_packed(tiled), packed)


@pytest.mark.slow  # the loaded and saved tiles are compared bit by bit
def test_prefill_and_decode_are_equal(frozen, lora):
    tokens_BT, lengths_B = _tokens(3, 14), jnp.array([10, 3, 1])

    def run(model, frozen, lora):
        hidden_BD, cache, _ = jax.jit(model.prefill)(frozen, lora, tokens_BT[:, :10], lengths_B, model.init_cache(3, 14, page_size=2))
        decode, seen = jax.jit(model.decode), [hidden_BD]
        for position in range(10, 14):
            hidden_BD, cache, _ = decode(frozen, lora, tokens_BT[:, position], cache)
            seen.append(hidden_BD)
        return np.asarray(jnp.stack(seen), np.float32)

    packed = run(PACKED, frozen[0], lora)
    np.testing.assert_array_equal(run(TILED, frozen[1], TILED.cast(lora)), packed)  # the sampler casts the adapter to bfloat16
    assert packed.std() > 0.1


def _gradient(model):
    tokens_BT = _tokens(2, 12)
    positions_BT, segments_BT = jnp.broadcast_to(jnp.arange(12), (2, 12)), jnp.ones((2, 12), jnp.int32)

    def loss(lora, frozen):
        logits_BTV = model.logits(frozen, lora, model.hidden(frozen, lora, tokens_BT, positions_BT, segments_BT))
        return -jax.nn.log_softmax(logits_BTV)[..., 0].mean()

    return jax.jit(jax.grad(loss))


@pytest.mark.slow  # test_experts_update covers the kernels' gradients
def test_gradients_are_equal(frozen, lora):
    packed, tiled = (_gradient(model)(lora, weights) for model, weights in zip((PACKED, TILED), frozen, strict=True))
    _assert_equal(tiled, packed)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(packed)) > 1e-4


@pytest.mark.slow  # measures the references
def test_backward_pass_uses_no_more_memory_than_for_packed_experts():
    # With 32 experts, memory shows whether more than one is unpacked at a time.
    sizes = ModelConfig(2, 256, 4, 2, 32, 32, 2, 256, 97, sliding_window=8)
    packed, tiled = (
        _gradient(model).lower(model.abstract_lora(), model.abstract_frozen()).compile().memory_analysis().temp_size_in_bytes
        for model in (Model(sizes, LORA, dtype="bfloat16", experts=form) for form in ("packed", "tiled"))
    )
    assert tiled < 1.1 * packed


@pytest.mark.parametrize("layout", [pytest.param("huggingface", marks=pytest.mark.slow), "original"])
def test_tiles_are_loaded_from_and_saved_to_a_folder(tmp_path, layout):
    write_synthetic(tmp_path / "first", CONFIG, seed=3, layout=layout)
    seen = []
    config, tiled = load_folder(tmp_path / "first", dtype="bfloat16", experts="tiled", on_progress=lambda *counts: seen.append(counts))
    _, packed = load_folder(tmp_path / "first", dtype="bfloat16", experts="packed")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tiled) == jax.tree.map(lambda x: (x.shape, x.dtype), TILED.abstract_frozen())
    _assert_equal(_as_packed(tiled), packed)
    assert seen[-1][0] == seen[-1][1]
    save_folder(tmp_path / "second", config, tiled, layout=layout)
    _assert_equal(load_folder(tmp_path / "second", dtype="bfloat16", experts="packed")[1], packed)


def test_scales_out_of_range_of_tiles_are_refused(tmp_path, monkeypatch):
    write_synthetic(tmp_path, CONFIG, seed=3)
    monkeypatch.setattr("discover_jax.kernels.mxfp4_tiles.LOWEST", HIGHEST)
    with pytest.raises(ConfigError, match=rf"scales.*\b{HIGHEST}\b"):
        load_folder(tmp_path, experts="tiled")


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    find_kernel.cache_clear()
    kernel_set.cache_clear()
    yield lines
    find_kernel.cache_clear()
    kernel_set.cache_clear()


def _form(sizes=CONFIG, mesh=None, **changes):
    config = default_config()
    for name, value in changes.items():
        config.model[name] = value
    return build_model(config, sizes, mesh, platform="gpu").experts


def test_the_model_uses_tiles_if_a_kernel_reads_them(logged, monkeypatch):
    # Any function can replace the kernel, which is not called.
    monkeypatch.setitem(PLATFORMS, "gpu", Platform("jax", {"decode_experts": ("discover_jax.kernels.experts", "gated")}))
    assert _form() == "tiled"
    assert _form(experts="dense") == "dense"
    assert build_model(default_config(), CONFIG).experts == "packed"  # the CPU has no kernel
    assert not logged
    assert _form(dtype="float32") == "packed"
    assert "bfloat16" in logged.pop()
    assert _form(sizes=ModelConfig(4, 96, 4, 2, 32, 4, 2, 64, 97, sliding_window=8)) == "packed"
    assert re.search(r"\b128\b.*\b96\b", logged.pop())
    assert _form(mesh=AbstractMesh((1, 1, 2), ("data", "expert", "tensor"))) == "packed"
    assert all("decode_experts" in line and "config.mesh.tensor = 2" in line for line in logged)


def test_platforms_without_a_kernel_use_packed_experts(logged, monkeypatch):
    monkeypatch.setitem(PLATFORMS, "gpu", Platform("jax", {}))
    assert _form() == "packed"
    assert not logged
