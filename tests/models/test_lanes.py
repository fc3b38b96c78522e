"""Experts in the layout of TPU kernels against packed ones, bit by bit; and when the model uses that layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from discover_jax.config import default_config
from discover_jax.engine import build_model
from discover_jax.exceptions import ConfigError
from discover_jax.kernels.kernel_set import PLATFORMS, Platform, find_kernel, kernel_set
from discover_jax.kernels.mxfp4_lanes import restore
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder
from discover_jax.models.folder_writer import save_folder
from discover_jax.models.synthetic import write_synthetic

CONFIG = ModelConfig(4, 128, 4, 2, 32, 4, 2, 64, 97, sliding_window=8)
LORA = LoraConfig(attention_rank=4, expert_rank=2, head_rank=3, alpha=8.0)
PACKED, LANES = (Model(CONFIG, LORA, dtype="bfloat16", experts=form) for form in ("packed", "lanes"))

# Operation by operation, it would compile dozens of functions.
_restore = jax.jit(restore, static_argnums=2)


def _as_packed(tree):
    """Converts a tree with this layout to one with blocks and scales."""
    changed = {}
    for name, node in tree.items():
        if isinstance(node, dict) and "lanes" in node:
            out = node["bias"].shape[-1]
            parts = [_restore(*pair, out) for pair in zip(*map(np.asarray, (node["lanes"], node["powers"])), strict=True)]
            changed[name] = {key: leaf for key, leaf in node.items() if key not in ("lanes", "powers")}
            changed[name] |= {key: np.stack(leaves) for key, leaves in zip(("blocks", "scales"), zip(*parts, strict=True), strict=True)}
        else:
            changed[name] = _as_packed(node) if isinstance(node, dict) else node
    return changed


def _positive_zeros(tree):
    """The tree with the code of 0 for that of -0 in blocks, as the layout has it."""
    changed = {name: _positive_zeros(node) if isinstance(node, dict) else node for name, node in tree.items()}
    if "blocks" in tree:
        blocks = np.asarray(tree["blocks"])
        low, high = (np.where(nibble == 8, 0, nibble) for nibble in (blocks & 15, blocks >> 4))
        changed["blocks"] = (low | high << 4).astype(np.uint8)
    return changed


def _assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), first, second)


@pytest.mark.slow
def test_random_weights_of_a_key_and_the_output_are_equal():
    packed, lanes = (model.init_frozen(jax.random.key(0)) for model in (PACKED, LANES))
    _assert_equal(_as_packed(lanes), _positive_zeros(packed))
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12)).astype(np.int32)
    rest = tokens_BT, jnp.broadcast_to(jnp.arange(12), (2, 12)), jnp.ones((2, 12), jnp.int32)
    lora = PACKED.init_lora(jax.random.key(1))
    _assert_equal(jax.jit(LANES.hidden)(lanes, lora, *rest), jax.jit(PACKED.hidden)(packed, lora, *rest))


def test_the_layout_is_loaded_from_and_saved_to_a_folder(tmp_path):
    write_synthetic(tmp_path / "first", CONFIG, seed=3)
    config, lanes = load_folder(tmp_path / "first", dtype="bfloat16", experts="lanes")
    _, packed = load_folder(tmp_path / "first", dtype="bfloat16", experts="packed")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), lanes) == jax.tree.map(lambda x: (x.shape, x.dtype), LANES.abstract_frozen())
    _assert_equal(_as_packed(lanes), _positive_zeros(packed))
    save_folder(tmp_path / "second", config, lanes)
    _assert_equal(load_folder(tmp_path / "second", dtype="bfloat16", experts="packed")[1], _positive_zeros(packed))


def test_scales_out_of_range_are_refused(tmp_path, monkeypatch):
    write_synthetic(tmp_path, CONFIG, seed=3)
    monkeypatch.setattr("discover_jax.kernels.mxfp4_lanes.LOWEST", 251)
    with pytest.raises(ConfigError, match=r"scales.*\b251\b"):
        load_folder(tmp_path, experts="lanes")


def test_the_model_uses_the_layout_on_tpus(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    # Any function can replace the kernel, which is not called.
    functions = {"decode_experts": ("discover_jax.kernels.experts", "gated")}
    monkeypatch.setitem(PLATFORMS, "tpu", Platform("jax", functions, experts=PLATFORMS["tpu"].experts))
    find_kernel.cache_clear()
    kernel_set.cache_clear()
    config = default_config()
    assert build_model(config, CONFIG, platform="tpu").experts == "lanes"
    assert not lines
    assert build_model(config, ModelConfig(4, 96, 4, 2, 32, 4, 2, 64, 97, sliding_window=8), platform="tpu").experts == "packed"
    assert "multiple of 64" in lines.pop()
    config.model.dtype = "float32"
    assert build_model(config, CONFIG, platform="tpu").experts == "packed"
    assert "bfloat16" in lines.pop()
    find_kernel.cache_clear()
    kernel_set.cache_clear()
