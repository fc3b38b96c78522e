"""config.json: every setting counts as in transformers or is refused by name, and wrong types are errors of this project."""

import copy
import dataclasses
import json
import os

import numpy as np
import pytest

from discover_jax.exceptions import DiscoverError, WeightsError
from discover_jax.models.families import FAMILIES, SHAPES, family_of, gpt_oss, read_model_config
from discover_jax.models.folder import read_config
from discover_jax.models.frequencies import rope_frequencies

_MODELS = {"gpt_oss": "gpt-oss-20b", "llama": "llama-3.1-8b", "qwen2": "qwen2.5-coder-0.5b", "qwen3": "qwen3-8b"}
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ABSENT = object()
"""Stands for a field that is taken away."""


@pytest.fixture(scope="module", autouse=True)
def _references():
    """Not at the top of the file: each worker imports all files, but only one runs the tests that need torch (see `TORCH` in conftest)."""
    global transformers
    transformers = pytest.importorskip("transformers", reason="the reference")


def content_of(family, **changes):
    """The published config.json of a family's model, with changes."""
    shape = SHAPES[_MODELS[family]]
    content = copy.deepcopy(family_of(shape).to_hf(shape)) | changes
    if "rope_scaling" in changes or "rope_parameters" in changes:
        content = {name: value for name, value in content.items() if not name.startswith("rope_") or name in changes}
    return {name: value for name, value in content.items() if value is not _ABSENT}


def reference_frequencies(content):
    """Frequencies and the factor of cosines and sines in transformers."""
    torch = pytest.importorskip("torch", reason="transformers computes them with torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.AutoConfig.for_model(**content)
    config.standardize_rope_params()
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        found, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config, device=torch.device("cpu"))
    else:
        found, factor = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
    return found.numpy(), factor


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {}),
        ("gpt_oss", {"rope_scaling": None}),  # transformers' default is the published YaRN
        ("gpt_oss", {"rope_scaling": None, "rope_theta": 5e5}),
        ("gpt_oss", {"rope_scaling": _YARN}),  # truncate is true by default
        ("gpt_oss", {"rope_scaling": _YARN | {"truncate": False}}),
        ("gpt_oss", {"rope_scaling": _YARN | {"truncate": True, "beta_fast": 20, "beta_slow": 2}}),
        ("gpt_oss", {"rope_scaling": _YARN | {"beta_fast": None, "beta_slow": 0}}),
        ("gpt_oss", {"rope_scaling": _YARN | {"factor": None}, "max_position_embeddings": 65_536}),
        ("gpt_oss", {"rope_scaling": {"type": "yarn", "factor": 2}, "max_position_embeddings": 8192}),
        ("gpt_oss", {"rope_scaling": {"type": "yarn", "factor": 2}, "max_position_embeddings": _ABSENT}),
        ("gpt_oss", {"rope_scaling": _YARN, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        ("gpt_oss", {"rope_parameters": _YARN | {"rope_theta": 1e6}, "rope_theta": 1e4}),
        ("gpt_oss", {"rope_scaling": _YARN | {"original_max_position_embeddings": 3}}),  # both bounds of the ramp are below 0
        ("gpt_oss", {"rope_scaling": _YARN | {"attention_factor": 1.3465735902799727}}),
        ("gpt_oss", {"rope_scaling": _YARN | {"mscale": 0.0, "mscale_all_dim": 1.0}}),
        ("gpt_oss", {"rope_scaling": _YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}}),
        ("llama", {}),
        ("llama", {"rope_scaling": None}),
        ("llama", {"rope_scaling": None, "rope_theta": 7e4}),
        ("llama", {"rope_parameters": _LLAMA3 | {"rope_theta": 3e5, "factor": 32}}),
        ("llama", {"rope_scaling": {k: v for k, v in _LLAMA3.items() if k[0] != "o"}, "max_position_embeddings": 4096}),
        ("qwen2", {"rope_scaling": {"type": "default"}, "rope_parameters": None}),
        ("qwen3", {"rope_parameters": {}}),
    ],
)
def test_frequencies_equal_those_of_transformers(family, changes):
    content = content_of(family, **changes)
    expected, expected_factor = reference_frequencies(copy.deepcopy(content))
    found, factor = rope_frequencies(read_model_config(content))
    np.testing.assert_allclose(found, expected, rtol=3e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gpt_oss", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ("gpt_oss", {"rope_scaling": {"factor": 2.0}}, "'default'"),
        ("gpt_oss", {"rope_parameters": {}}, "'default'"),
        ("gpt_oss", {"rope_scaling": _YARN | {"attention_factor": 1.0}}, "attention_factor"),
        ("gpt_oss", {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale"),
        ("gpt_oss", {"rope_scaling": _YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("gpt_oss", {"rope_scaling": _YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast"),
        ("gpt_oss", {"rope_parameters": {"full_attention": _YARN, "sliding_attention": _YARN}}, "sliding_attention"),
        ("gpt_oss", {"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ("gpt_oss", {"original_max_position_embeddings": 77}, "original_max_position_embeddings"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias"),
        ("gpt_oss", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quant_method"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 24}, "layer_types"),
        ("gpt_oss", {"num_hidden_layers": 23}, "layer"),
        ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"rope_scaling": _LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ("qwen2", {"rope_scaling": _YARN}, "'yarn'"),
        ("qwen2", {"num_key_value_heads": _ABSENT}, "num_key_value_heads"),  # transformers' default belongs to another size
        ("qwen3", {"head_dim": _ABSENT}, "head_dim"),
    ],
)
def test_unsupported_settings_are_refused_by_name(family, changes, named):
    with pytest.raises(WeightsError, match=named):
        read_model_config(content_of(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "field", "expected"),
    [
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha", 1.5),
        ("gpt_oss", {"swiglu_alpha": _ABSENT}, "swiglu_alpha", 1.702),
        ("gpt_oss", {"swiglu_limit": _ABSENT}, "swiglu_limit", 7.0),
        ("gpt_oss", {"sliding_window": _ABSENT}, "sliding_window", 128),
        ("gpt_oss", {"layer_types": None}, "num_layers", 24),
        ("gpt_oss", {"rms_norm_eps": _ABSENT}, "rms_eps", 1e-5),
        ("llama", {"rms_norm_eps": _ABSENT}, "rms_eps", 1e-6),
        ("llama", {"num_key_value_heads": _ABSENT}, "num_kv_heads", 32),
        ("llama", {"head_dim": None}, "head_size", 128),
        ("llama", {"attention_bias": True}, "qkv_bias", True),
        ("qwen2", {"num_key_value_heads": None}, "num_kv_heads", 14),
        ("qwen2", {"layer_types": None}, "num_layers", 24),
        ("qwen2", {"tie_word_embeddings": _ABSENT}, "tied", False),
    ],
)
def test_defaults_are_those_of_transformers(family, changes, field, expected):
    content = content_of(family, **changes)
    assert getattr(read_model_config(content), field) == expected
    name = {"num_layers": "num_hidden_layers", "rms_eps": "rms_norm_eps", "num_kv_heads": "num_key_value_heads", "head_size": "head_dim"}
    theirs = transformers.AutoConfig.for_model(**content).to_dict()
    theirs |= {"qkv_bias": theirs.get("attention_bias"), "tied": theirs.get("tie_word_embeddings")}
    if not (family == "qwen2" and field == "num_kv_heads" and theirs["num_key_value_heads"] is None):
        assert theirs[name.get(field, field)] == expected


def test_written_settings_are_read_back():
    config = dataclasses.replace(gpt_oss.GPT_OSS_20B, swiglu_alpha=1.25, swiglu_limit=3.0, sliding_window=64, rope_truncate=True)
    assert read_model_config(gpt_oss.to_hf(config)) == config


_WRONG = ["96", "", True, False, None, -1, 0, 0.5, float("nan"), float("inf"), 10**400, 2**63, [], [1], {}, {"a": {}}, [[]]]


@pytest.mark.parametrize("family", [*FAMILIES, "original"])
def test_any_value_of_any_field_is_read_or_refused(family):
    """Values of wrong types and sizes in each field, also within the fields of rotary embedding."""
    if family == "original":
        content = gpt_oss.to_original(gpt_oss.GPT_OSS_20B)
    else:
        content = content_of(family) | {"num_hidden_layers": 2, "layer_types": None, "partial_rotary_factor": 1.0}
    places = [(name,) for name in content]
    places += [(name, inner) for name, value in content.items() if isinstance(value, dict) for inner in value]
    refused = 0
    for place in places:
        for value in _WRONG:
            changed = copy.deepcopy(content)
            inside = changed if len(place) == 1 else changed[place[0]]
            inside[place[-1]] = value
            try:
                config = read_model_config(changed)
            except DiscoverError:
                refused += 1
            else:
                frequencies, factor = rope_frequencies(config)
                assert np.isfinite(frequencies).all()
                assert np.isfinite(factor)
    assert refused > len(places) * 4
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
        for value in ("96", True, 96.0, 0, -2, 10**9, [96], {"a": 1}):
            with pytest.raises(WeightsError, match=name):
                read_model_config(content | {name: value})


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '"x"', "", "{", "[" * 100_000, '{"a": ' * 50_000, "\ufeff{}", '{"model_type": ["gpt_oss"]}', "{}"]
)
def test_other_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"config\.json"):
        read_config(tmp_path)


def test_files_that_never_end_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(WeightsError, match="FIFO"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match="device"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(WeightsError, match="directory"):
        read_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"Cannot read .*config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(content_of("qwen2")))
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors.*FIFO"):
        read_config(tmp_path)
