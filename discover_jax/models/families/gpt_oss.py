"""gpt-oss: experts in MXFP4, attention with sinks, every other layer with a sliding window, YaRN."""

from collections.abc import Mapping
from typing import Any

from discover_jax.exceptions import WeightsError
from discover_jax.models.config import ModelConfig
from discover_jax.models.families.family import SIZE_NAMES, Family, check_present, first_id, rope_fields
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


def from_original(content: dict[str, Any]) -> ModelConfig:
    """From the content of a config.json of the original layout.

    Raises:
      WeightsError: a size is missing.
    """
    optional = ("swiglu_limit", "rope_theta", "rope_ntk_beta", "rope_ntk_alpha", "initial_context_length")
    check_present(content, (name for name in _ORIGINAL_NAMES.values() if name not in optional))
    return ModelConfig(**{ours: content[name] for ours, name in _ORIGINAL_NAMES.items() if name in content})


def to_original(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of the original layout, which has no fields for eos_id, pad_id and rope_truncate."""
    return {name: getattr(config, ours) for ours, name in _ORIGINAL_NAMES.items()}


def from_hf(content: dict[str, Any]) -> ModelConfig:
    """From the content of a config.json of Hugging Face's layout.

    Raises:
      WeightsError: an option is unsupported, or a size is missing.
    """
    rope = rope_fields(content)
    if rope["rope_type"] not in ("yarn", "default"):
        raise WeightsError(f"config.json has rope_type = {rope['rope_type']!r}; gpt_oss supports only 'yarn'.")
    check_present(content, (hf for hf in _NAMES.values() if hf not in ("swiglu_limit", "rms_norm_eps", "pad_token_id")))
    pattern = _LAYER_TYPES * (content["num_hidden_layers"] // 2)
    if content.get("layer_types", pattern) != pattern:
        raise WeightsError(
            "config.json has unsupported layer_types; they must alternate between sliding_attention and full_attention, in this order."
        )
    values: dict[str, Any] = {ours: content[hf] for ours, hf in _NAMES.items() if content.get(hf) is not None}
    values |= {ours: rope[hf] for ours, hf in _ROPE_NAMES.items() if rope.get(hf) is not None}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    values["eos_id"] = first_id(values["eos_id"])
    return ModelConfig(**values)


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
