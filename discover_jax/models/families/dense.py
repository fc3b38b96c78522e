"""What the dense families share: names of config.json's fields and of tensors in Hugging Face's layout."""

from typing import Any

from discover_jax.exceptions import WeightsError
from discover_jax.models.config import ModelConfig
from discover_jax.models.families.family import SIZE_NAMES, check_present, first_id, rope_fields
from discover_jax.models.layouts import HF_EMBEDDING, HF_FILE, HF_NAME, HF_PREFIX, Layout, ParamPath

_NAMES = {
    **SIZE_NAMES,
    "mlp_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "rms_eps": "rms_norm_eps",
}
_LLAMA3_NAMES = {
    "rope_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_low_factor": "low_freq_factor",
    "rope_high_factor": "high_freq_factor",
}
_NO_ID = -1
FIXED: dict[str, Any] = {"num_experts": 0, "experts_per_token": 0, "sliding_window": 0, "pattern": ("full",), "sinks": False}
"""Fields of `ModelConfig` that every dense model has."""


def from_hf(content: dict[str, Any], *, family: str, eps: float, **options: Any) -> ModelConfig:
    """The config of a dense model from the content of its config.json.

    Args:
      family: its name.
      eps: value of rms_norm_eps where the file has none.
      options: fields of `ModelConfig` that the family sets.

    Raises:
      WeightsError: a field is missing, or an option is unsupported; the message names it.
    """
    check_present(content, (hf for hf in _NAMES.values() if hf not in ("num_key_value_heads", "head_dim", "rms_norm_eps")))
    _check_options(content, family)
    values: dict[str, Any] = {ours: content[hf] for ours, hf in _NAMES.items() if content.get(hf) is not None}
    defaults: dict[str, Any] = {
        "num_kv_heads": values["num_heads"],
        "head_size": values["width"] // values["num_heads"],
        "rms_eps": eps,
        "eos_id": first_id(content["eos_token_id"]) if content.get("eos_token_id") is not None else _NO_ID,
        "pad_id": content["pad_token_id"] if content.get("pad_token_id") is not None else _NO_ID,
        "tied": bool(content.get("tie_word_embeddings", False)),
    }
    return ModelConfig(family=family, **defaults | values | FIXED | _rope(content, family) | options)


def _check_options(content: dict[str, Any], family: str) -> None:
    if content.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"config.json has hidden_act = {content['hidden_act']!r}; {family} supports only 'silu'.")
    if content.get("use_sliding_window"):
        raise WeightsError(f"config.json has use_sliding_window = true; {family} supports only models without a sliding window.")
    if others := set(content.get("layer_types") or ()) - {"full_attention"}:
        raise WeightsError(f"config.json has layer_types {', '.join(sorted(others))}; {family} supports only full_attention.")
    if content.get("mlp_bias"):
        raise WeightsError(f"config.json has mlp_bias = true; {family} supports only projections without biases in the MLP.")
    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method")
        raise WeightsError(f"config.json has weights quantised by {method!r}; {family} supports only bf16, f16 and f32 weights.")


def _rope(content: dict[str, Any], family: str) -> dict[str, Any]:
    fields = rope_fields(content)
    kind = {"default": "plain", "llama3": "llama3"}.get(fields["rope_type"])
    if kind is None:
        raise WeightsError(f"config.json has rope_type = {fields['rope_type']!r}; {family} supports 'default' and 'llama3'.")
    values: dict[str, Any] = {"rope_kind": kind, "rope_theta": float(fields.get("rope_theta", 10_000.0))}
    if kind == "llama3":
        check_present(fields, _LLAMA3_NAMES.values())
        values |= {ours: fields[hf] for ours, hf in _LLAMA3_NAMES.items()}
    return values


def to_hf(config: ModelConfig, architecture: str, **options: Any) -> dict[str, Any]:
    """The content of a config.json from which `transformers` builds the same model; `options` are more fields of the family."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_kind == "llama3":
        rope |= {"rope_type": "llama3", **{hf: getattr(config, ours) for ours, hf in _LLAMA3_NAMES.items()}}
    ids = {"eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    return {
        "architectures": [architecture],
        "model_type": config.family,
        **{hf: getattr(config, ours) for ours, hf in _NAMES.items()},
        **{name: value for name, value in ids.items() if value != _NO_ID},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_kind == "llama3" else None,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        **options,
    }


def layout(config: ModelConfig) -> Layout:
    """Hugging Face's names of the tensors that a dense model has."""
    biased = [letter for letter in "qkvo" if (config.o_bias if letter == "o" else config.qkv_bias)]
    layers: dict[str, tuple[ParamPath, ...]] = {
        "input_layernorm.weight": (("attention", "norm"),),
        **{f"self_attn.{letter}_proj.weight": (("attention", letter, "weight"),) for letter in "qkvo"},
        **{f"self_attn.{letter}_proj.bias": (("attention", letter, "bias"),) for letter in biased},
        **({f"self_attn.{letter}_norm.weight": (("attention", f"{letter}_norm"),) for letter in "qk"} if config.qk_norm else {}),
        "post_attention_layernorm.weight": (("mlp", "norm"),),
        **{f"mlp.{name}_proj.weight": (("mlp", name, "weight"),) for name in ("gate", "up", "down")},
    }
    singles: dict[str, ParamPath] = {HF_EMBEDDING: ("embedding",), "model.norm.weight": ("norm",)}
    if not config.tied:
        singles["lm_head.weight"] = ("head", "weight")
    return Layout(HF_NAME, singles, layers, HF_PREFIX, HF_FILE, marker=HF_EMBEDDING)
