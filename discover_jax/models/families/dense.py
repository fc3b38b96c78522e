"""What the dense families share: names of config.json's fields and of tensors in Hugging Face's layout."""

from typing import Any

from discover_jax.exceptions import WeightsError
from discover_jax.models.config import ModelConfig
from discover_jax.models.families.family import MOST_LAYERS, SIZE_NAMES
from discover_jax.models.families.fields import Fields
from discover_jax.models.families.rope import original_length, rope_fields, theta_of
from discover_jax.models.layouts import HF_EMBEDDING, HF_FILE, HF_NAME, HF_PREFIX, Layout, ParamPath
from discover_jax.published import show

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
_THETA = 10_000.0
"""Default of transformers for rope_theta."""
_DERIVED = ("num_key_value_heads", "head_dim")
FIXED: dict[str, Any] = {"num_experts": 0, "experts_per_token": 0, "sliding_window": 0, "pattern": ("full",), "sinks": False}
"""Fields of `ModelConfig` that every dense model has."""


def from_hf(fields: Fields, *, family: str, derived: tuple[str, ...], **options: Any) -> ModelConfig:
    """The config of a dense model from its config.json, with the defaults of transformers.

    Args:
      family: its name.
      derived: which of num_key_value_heads and head_dim follow from other sizes if the file lacks them. Null always does.
      options: fields of `ModelConfig` that the family sets.

    Raises:
      WeightsError: a field is missing or has a wrong type, or an option is unsupported; the message names it.
    """
    absent = [name for name in _DERIVED if not fields.has(name) and (name in derived or name in fields.content)]
    fields.require(*(hf for hf in _NAMES.values() if hf != "rms_norm_eps" and hf not in absent))
    _check_options(fields, family)
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    values: dict[str, Any] = {
        "num_layers": fields.integer("num_hidden_layers", most=MOST_LAYERS),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads if "num_key_value_heads" in absent else fields.integer("num_key_value_heads"),
        "head_size": width // heads if "head_dim" in absent else fields.integer("head_dim"),
        "mlp_width": fields.integer("intermediate_size"),
        "vocab_size": fields.integer("vocab_size"),
        "rms_eps": fields.number("rms_norm_eps", 1e-6),
        "eos_id": fields.token_id("eos_token_id", _NO_ID),
        "pad_id": fields.token_id("pad_token_id", _NO_ID),
        "tied": fields.flag("tie_word_embeddings", False),
    }
    return ModelConfig(family=family, **values | FIXED | _rope(fields, family) | options)


def _check_options(fields: Fields, family: str) -> None:
    fields.only("hidden_act", "silu", family=family)
    for name, meaning in (("use_sliding_window", "a sliding window"), ("mlp_bias", "biases in the MLP")):
        if fields.flag(name, False):
            raise WeightsError(f"config.json has {name} = true; {family} supports only models without {meaning}.")
    kinds = fields.content.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise fields.error("layer_types", "a list of texts or null")
    if others := set(kinds or ()) - {"full_attention"}:
        raise WeightsError(f"config.json has layer_types {', '.join(sorted(others)[:5])}; {family} supports only full_attention.")
    quantised = fields.content.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise fields.error("quantization_config", "an object or null")
    if quantised:
        method = show(quantised.get("quant_method"))
        raise WeightsError(f"config.json has weights quantised by {method}; {family} supports only bf16, f16 and f32 weights.")


def _rope(fields: Fields, family: str) -> dict[str, Any]:
    rope = rope_fields(fields, _THETA)
    values: dict[str, Any] = {"rope_kind": "plain", "rope_theta": theta_of(fields, rope, _THETA)}
    if rope is None or rope.text("rope_type") == "default":
        return values
    rope.only("rope_type", "default", "llama3", family=family)
    rope.require("factor", "low_freq_factor", "high_freq_factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise WeightsError(f"config.json has high_freq_factor = {high:g}, which must be above low_freq_factor = {low:g}.")
    return values | {
        "rope_kind": "llama3",
        "rope_factor": rope.number("factor"),
        "rope_original_length": original_length(fields, rope),
        "rope_low_factor": low,
        "rope_high_factor": high,
    }


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
