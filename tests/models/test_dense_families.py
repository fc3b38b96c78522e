"""Dense families against transformers and peft; both load the same random folder."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.exceptions import WeightsError
from discover_jax.models.adapter import load_peft, read_lora_config, save_peft
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import FAMILIES, SHAPES, family_of, read_model_config
from discover_jax.models.folder import load_folder
from discover_jax.models.synthetic import write_synthetic

_SMALL = {"num_layers": 3, "width": 48, "num_heads": 6, "num_kv_heads": 2, "head_size": 8, "mlp_width": 40, "vocab_size": 61}
_DENSE = {"num_experts": 0, "experts_per_token": 0, "pattern": ("full",), "sinks": False, "sliding_window": 0, "o_bias": False}
_IDS = {"eos_id": 1, "pad_id": 0}
CONFIGS = {
    "qwen2, tied": ModelConfig(**_SMALL, **_DENSE, **_IDS, family="qwen2", rope_kind="plain", rope_theta=1e6, tied=True),
    "qwen3": ModelConfig(
        **_SMALL | {"head_size": 16}, **_DENSE, **_IDS, family="qwen3", rope_kind="plain", qkv_bias=False, qk_norm=True, rms_eps=1e-6
    ),
    "llama 3": ModelConfig(
        **_SMALL,
        **_DENSE,
        **_IDS,
        family="llama",
        qkv_bias=False,
        rope_kind="llama3",
        rope_theta=500.0,
        rope_factor=4.0,
        rope_original_length=32,
    ),
    "llama, plain and tied": ModelConfig(
        **_SMALL | {"num_heads": 9, "num_kv_heads": 3, "width": 72},
        **_DENSE,
        **_IDS,
        family="llama",
        qkv_bias=False,
        rope_kind="plain",
        rope_theta=10_000.0,
        tied=True,
    ),
}
LORA = LoraConfig(attention_rank=4, expert_rank=0, head_rank=3, alpha=6.0, mlp_rank=5)
LENGTH = 45


_SLOW = ("qwen3", "llama, plain and tied")


@pytest.fixture(scope="module", autouse=True)
def _references():
    """Not at the top of the file: each worker imports all files, but only one runs the tests that need torch (see `TORCH` in conftest)."""
    global torch, transformers
    torch = pytest.importorskip("torch", reason="parity needs torch (make test installs it; PARITY=0 leaves it out)")
    transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in CONFIGS])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    write_synthetic(path, CONFIGS[request.param], seed=5)
    return path


def _reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _tokens(config, length=LENGTH, rows=2):
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, frozen, lora, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return model.logits(frozen, lora, model.hidden(frozen, lora, tokens_BT, positions_BT, jnp.ones_like(positions_BT)))


def test_config_json_round_trips(folder):
    config, _ = load_folder(folder)
    assert config in CONFIGS.values()
    assert read_model_config(family_of(config).to_hf(config)) == config


def test_logits_equal_transformers(folder):
    config, frozen = load_folder(folder)
    tokens_BT = _tokens(config)
    with torch.no_grad():
        expected = _reference(folder)(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    found = np.asarray(_logits(Model(config, LoraConfig(0, 0, 0)), frozen, None, tokens_BT))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_prefill_in_chunks_and_decode_equal_the_full_forward(folder):
    config, frozen = load_folder(folder)
    model = Model(config, LORA)
    rng = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)), model.abstract_lora())
    tokens_BT = _tokens(config)
    expected = np.asarray(_logits(model, frozen, lora, tokens_BT))
    page, prompt = 8, 29
    cache = model.init_cache(2, 64, page_size=page)
    prefill, decode, logits = jax.jit(model.prefill), jax.jit(model.decode), jax.jit(model.logits)
    for start in range(0, prompt, 16):
        count = min(16, prompt - start)
        chunk_BC = np.zeros((2, 16), np.int32)
        chunk_BC[:, :count] = tokens_BT[:, start : start + count]
        hidden_BD, cache, routes = prefill(frozen, lora, chunk_BC, jnp.full(2, count, jnp.int32), cache)
        assert routes.shape == (2, 16, config.num_layers, 0)
    for position in range(prompt, LENGTH):
        found = logits(frozen, lora, hidden_BD)
        np.testing.assert_allclose(found, expected[:, position - 1], atol=1e-4, rtol=1e-4)
        hidden_BD, cache, _ = decode(frozen, lora, tokens_BT[:, position], cache)


@pytest.mark.filterwarnings("ignore:.*(tie_word|tied|save_embedding_layers|config file)")
def test_adapter_gradients_and_export_equal_peft(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config, frozen = load_folder(folder)
    model = Model(config, LORA)
    rng = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)), model.abstract_lora())
    save_peft(tmp_path, lora, config, LORA, str(folder))
    assert read_lora_config(tmp_path, config) == LORA
    for ours, again in zip(jax.tree.leaves(lora), jax.tree.leaves(load_peft(tmp_path, model)), strict=True):
        np.testing.assert_array_equal(ours, again)

    theirs = peft.PeftModel.from_pretrained(_reference(folder), tmp_path, is_trainable=True).eval()
    tokens_BT = _tokens(config)
    logits_BTV = theirs(torch.tensor(tokens_BT, dtype=torch.long)).logits
    np.testing.assert_allclose(_logits(model, frozen, lora, tokens_BT), logits_BTV.detach().numpy(), atol=2e-4, rtol=1e-4)
    weights_BTV = np.random.default_rng(1).normal(size=logits_BTV.shape).astype(np.float32)
    (logits_BTV * torch.tensor(weights_BTV)).sum().backward()
    gradient = jax.grad(lambda lora: (_logits(model, frozen, lora, tokens_BT) * weights_BTV).sum())(lora)
    expected = {name: value.grad.numpy() for name, value in theirs.named_parameters() if value.grad is not None}
    compared = 0
    for layer in range(config.num_layers):
        for group, matrix, name in [("attention", m, f"self_attn.{m}_proj") for m in "qkvo"] + [
            ("mlp", m, f"mlp.{m}_proj") for m in ("gate", "up", "down")
        ]:
            for side, leaf in (("A", "lora_a"), ("B", "lora_b")):
                found = np.asarray(gradient["layers"]["full"][group][matrix][leaf][layer])
                wanted = expected[f"base_model.model.model.layers.{layer}.{name}.lora_{side}.default.weight"]
                np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max(), rtol=1e-3, err_msg=f"{layer} {name} {side}")
                compared += 1
    for side, leaf in (("A", "lora_a"), ("B", "lora_b")):
        wanted = expected[f"base_model.model.lm_head.lora_{side}.default.weight"]
        np.testing.assert_allclose(gradient["head"][leaf], wanted, atol=1e-3 * np.abs(wanted).max(), rtol=1e-3)
    assert compared == config.num_layers * 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope_type = 'yarn'.*llama3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "mistral"}, "'mistral'.*gpt_oss.*llama.*qwen2.*qwen3"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"intermediate_size": None}, "intermediate_size"),
    ],
)
def test_unsupported_options_are_named(tmp_path, change, message):
    config = CONFIGS["qwen2, tied"]
    write_synthetic(tmp_path, config, seed=1)
    content = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message):
        load_folder(tmp_path)


def test_published_shapes_have_the_published_sizes():
    """Parameters in billions, embedding included, from the model cards."""
    billions = {
        "qwen2.5-coder-0.5b": 0.494,
        "qwen2.5-coder-1.5b": 1.544,
        "qwen2.5-coder-7b": 7.616,
        "qwen2.5-coder-32b": 32.764,
        "qwen3-8b": 8.191,
        "llama-3.1-8b": 8.030,
    }
    for name, expected in billions.items():
        leaves = jax.tree.leaves(Model(SHAPES[name], LoraConfig(0, 0, 0)).abstract_frozen())
        assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(expected, abs=5e-4), name
    assert {family_of(shape).name for shape in SHAPES.values()} == set(FAMILIES)


def test_weights_of_another_file_are_ignored_with_an_index_and_refused_without(tmp_path):
    import safetensors.numpy

    config = dataclasses.replace(CONFIGS["llama 3"], num_layers=1)
    write_synthetic(tmp_path, config, seed=2)
    expected = load_folder(tmp_path)[1]
    stale = {"model.norm.weight": np.zeros(config.width, np.float32)}
    safetensors.numpy.save_file(stale, tmp_path / "old.safetensors")
    (tmp_path / "._model.safetensors").write_bytes(b"a file of another system")
    with pytest.raises(WeightsError, match=r"model\.norm\.weight.*model\.safetensors.*old\.safetensors"):
        load_folder(tmp_path)
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for ours, again in zip(jax.tree.leaves(expected), jax.tree.leaves(load_folder(tmp_path)[1]), strict=True):
        np.testing.assert_array_equal(ours, again)
