"""gpt-oss: experts in MXFP4, attention with sinks, every other layer with a sliding window, YaRN."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from discover_jax.exceptions import WeightsError
from discover_jax.models.config import ModelConfig
from discover_jax.models.families.family import MOST_LAYERS, SIZE_NAMES, Family
from discover_jax.models.families.fields import Fields
from discover_jax.models.families.rope import rope_fields, theta_of, yarn_values
from discover_jax.models.layouts import HF_EMBEDDING, HF_FILE, HF_NAME, HF_PREFIX, MATRICES, Layout

_NAMES = {
    **SIZE_NAMES,
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "mlp_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "rms_eps": "rms_norm_eps",
    "swiglu_limit": "swiglu_limit",
    "swiglu_alpha": "swiglu_alpha",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}
_ROPE_NAMES = {
    "rope_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_truncate": "truncate",
}
# config.json of the original layout. Sizes that it lacks are constants of gpt-oss.
_ORIGINAL_NAMES = {
    **SIZE_NAMES,
    "num_experts": "num_experts",
    "experts_per_token": "experts_per_token",
    "mlp_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "swiglu_limit": "swiglu_limit",
    "rope_theta": "rope_theta",
    "rope_factor": "rope_scaling_factor",
    "rope_original_length": "initial_context_length",
    "rope_beta_fast": "rope_ntk_beta",
    "rope_beta_slow": "rope_ntk_alpha",
}
_LAYER_TYPES = ["sliding_attention", "full_attention"]

GPT_OSS_120B = ModelConfig(36, 2880, 64, 8, 64, 128, 4, 2880, 201_088)
GPT_OSS_20B = ModelConfig(24, 2880, 64, 8, 64, 32, 4, 2880, 201_088)

_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING
}
_THETA, _MAX_LENGTH = 150_000.0, 131_072
"""Defaults of transformers for rope_theta and max_position_embeddings."""


_ATTENTION = {f"self_attn.{name}_proj.{kind}": (("attention", name, kind),) for name in "qkvo" for kind in ("weight", "bias")}
_HF_LAYERS = {
    "input_layernorm.weight": (("attention", "norm"),),
    **_ATTENTION,
    "self_attn.sinks": (("attention", "sinks"),),
    "post_attention_layernorm.weight": (("experts", "norm"),),
    "mlp.router.weight": (("experts", "router", "weight"),),
    "mlp.router.bias": (("experts", "router", "bias"),),
    **{f"mlp.experts.{matrix}_proj_bias": (("experts", matrix, "bias"),) for matrix in MATRICES},
}
_HF_SINGLES = {HF_EMBEDDING: ("embedding",), "model.norm.weight": ("norm",), "lm_head.weight": ("head", "weight")}
_HF = {"singles": _HF_SINGLES, "prefix": HF_PREFIX, "file": HF_FILE}

HUGGINGFACE = Layout(
    HF_NAME,
    marker=HF_EMBEDDING,
    layers=_HF_LAYERS
    | {f"mlp.experts.{matrix}_proj_{form}": (("experts", matrix, form),) for matrix in MATRICES for form in ("blocks", "scales")},
    **_HF,
)
HUGGINGFACE_DENSE = Layout(
    "huggingface, dequantised",
    marker=HF_PREFIX.format(layer=0) + "mlp.experts.gate_up_proj",
    writable=False,
    layers=_HF_LAYERS | {f"mlp.experts.{matrix}_proj": (("experts", matrix, "weight"),) for matrix in MATRICES},
    transposed=True,
    **_HF,
)
ORIGINAL = Layout(
    "original",
    marker="embedding.weight",
    singles={"embedding.weight": ("embedding",), "norm.scale": ("norm",), "unembedding.weight": ("head", "weight")},
    layers={
        "attn.norm.scale": (("attention", "norm"),),
        **{f"attn.qkv.{kind}": tuple(("attention", name, kind) for name in "qkv") for kind in ("weight", "bias")},
        **{f"attn.out.{kind}": (("attention", "o", kind),) for kind in ("weight", "bias")},
        "attn.sinks": (("attention", "sinks"),),
        "mlp.norm.scale": (("experts", "norm"),),
        **{f"mlp.gate.{kind}": (("experts", "router", kind),) for kind in ("weight", "bias")},
        **{
            f"mlp.mlp{number}_weight.{form}": (("experts", matrix, form),)
            for number, matrix in enumerate(MATRICES, 1)
            for form in ("blocks", "scales")
        },
        **{f"mlp.mlp{number}_bias": (("experts", matrix, "bias"),) for number, matrix in enumerate(MATRICES, 1)},
    },
    prefix="block.{layer}.",
    file="model--{number:05d}-of-{count:05d}.safetensors",
)


def is_original(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original layout, which does not name the architecture. Only gpt-oss has both of these fields."""
    return "model_type" not in content and {"rope_scaling_factor", "num_experts"} <= content.keys()


def from_original(fields: Fields) -> ModelConfig:
    """From a config.json of the original layout.

    Raises:
      WeightsError: an option is unsupported, or a field is missing or has a wrong type.
    """
    fields.require(*(name for ours, name in _ORIGINAL_NAMES.items() if ours not in _DEFAULTS or ours == "sliding_window"))
    _check_options(fields)
    return _config(fields, _ORIGINAL_NAMES)


def to_original(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of the original layout, which has no fields for eos_id, pad_id and rope_truncate."""
    return {name: getattr(config, ours) for ours, name in _ORIGINAL_NAMES.items()}


def from_hf(fields: Fields) -> ModelConfig:
    """From a config.json of Hugging Face's layout, with the defaults of transformers' GptOssConfig.

    Raises:
      WeightsError: an option is unsupported, or a field is missing or has a wrong type.
    """
    fields.require(*(name for ours, name in _NAMES.items() if ours not in _DEFAULTS))
    _check_options(fields)
    config = _config(fields, _NAMES)
    pattern = _LAYER_TYPES * (config.num_layers // 2)
    if fields.content.get("layer_types") not in (None, pattern):
        raise WeightsError(
            f"config.json has unsupported layer_types; {config.num_layers} layers must alternate between sliding_attention and"
            " full_attention, in this order."
        )
    rope = rope_fields(fields, _THETA)
    if rope is None:  # then the published models' YaRN, which the defaults of ModelConfig are
        return dataclasses.replace(config, rope_theta=theta_of(fields, None, _THETA))
    rope.only("rope_type", "yarn", family="gpt_oss")
    return dataclasses.replace(config, rope_theta=theta_of(fields, rope, _THETA), **yarn_values(fields, rope, _MAX_LENGTH))


def _config(fields: Fields, names: Mapping[str, str]) -> ModelConfig:
    """The config of the fields with these names. Those of rotary embedding are read if they are among them."""
    values: dict[str, Any] = {}
    for ours, name in names.items():
        if ours in ("eos_id", "pad_id"):
            values[ours] = fields.token_id(name, _DEFAULTS[ours])
        elif isinstance(default := _DEFAULTS.get(ours, 0), float):
            values[ours] = fields.number(name, default, above=1 if ours == "rope_theta" else 0)
        else:
            most = {"most": MOST_LAYERS} if ours == "num_layers" else {}
            values[ours] = fields.integer(name, default or None, **most)
    return ModelConfig(**values)


def _check_options(fields: Fields) -> None:
    """Raises WeightsError for options that other models of the architecture could have and that are not supported."""
    fields.only("hidden_act", "silu", family="gpt_oss")
    fields.only("attention_bias", True, family="gpt_oss")
    fields.only("tie_word_embeddings", False, family="gpt_oss")
    quantised = fields.content.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise fields.error("quantization_config", "an object or null")
    if quantised:
        Fields(quantised, "quantization_config.").only("quant_method", "mxfp4", family="gpt_oss")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json from which `transformers` builds the same model, with experts in MXFP4."""
    return {
        "architectures": [FAMILY.architecture],
        "model_type": FAMILY.name,
        **{hf: getattr(config, ours) for ours, hf in _NAMES.items()},
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": "yarn", **{hf: getattr(config, ours) for ours, hf in _ROPE_NAMES.items()}},
        "max_position_embeddings": int(config.rope_factor * config.rope_original_length),
        "layer_types": _LAYER_TYPES * config.num_repeats,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        },
    }


FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    layouts=lambda _: (ORIGINAL, HUGGINGFACE_DENSE, HUGGINGFACE),
    shapes={"gpt-oss-120b": GPT_OSS_120B, "gpt-oss-20b": GPT_OSS_20B},
)
