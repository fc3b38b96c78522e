"""Sizes and constants of a gpt-oss model, its conversion from and to config.json, and the ranks of an adapter."""

import dataclasses
from typing import Any

from discover_jax.exceptions import ConfigError, WeightsError

_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "rms_eps": "rms_norm_eps",
    "swiglu_limit": "swiglu_limit",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}
_HF_ROPE_NAMES = {
    "rope_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_truncate": "truncate",
}
# config.json of the original layout. Sizes that it lacks are constants of gpt-oss.
_ORIGINAL_NAMES = {
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "num_experts": "num_experts",
    "experts_per_token": "experts_per_token",
    "expert_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "swiglu_limit": "swiglu_limit",
    "rope_theta": "rope_theta",
    "rope_factor": "rope_scaling_factor",
    "rope_original_length": "initial_context_length",
    "rope_beta_fast": "rope_ntk_beta",
    "rope_beta_slow": "rope_ntk_alpha",
}

REMAT = ("none", "layers", "pairs")
"""Rematerialisation policies of the update, see `Model.remat`."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of gpt-oss with any sizes. Defaults are the constants that the published models share.

    Attributes:
      num_layers: must be even. Layers with an even index use a sliding window; those with an odd index see all keys.
      sliding_window: keys that a query of a sliding layer sees, including its own.
      rope_*: constants of YaRN. `rope_truncate` rounds the bounds of its ramp; it is off in the published models.
      swiglu_limit, swiglu_alpha: clamp and slope of the experts' activation.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    vocab_size: int
    sliding_window: int = 128
    rope_theta: float = 150_000.0
    rope_factor: float = 32.0
    rope_original_length: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = False
    rms_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    eos_id: int = 200_002
    pad_id: int = 199_999

    def __post_init__(self):
        problems = []
        if self.num_layers < 2 or self.num_layers % 2:
            problems.append(
                f"num_layers = {self.num_layers}, but must be even and at least 2, because layers come in pairs (sliding, full)"
            )
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads = {self.num_heads}, but must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_size % 2:
            problems.append(f"head_size = {self.head_size}, but must be even, because rotary embedding pairs its halves")
        if not 1 <= self.experts_per_token <= self.num_experts:
            problems.append(f"experts_per_token = {self.experts_per_token}, but must be between 1 and num_experts = {self.num_experts}")
        if problems:
            raise ConfigError("Invalid sizes of a model: " + "; ".join(problems) + ".")

    @property
    def num_pairs(self) -> int:
        return self.num_layers // 2

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "ModelConfig":
        """From the content of a config.json of either layout.

        Raises:
          WeightsError: the architecture is not gpt-oss, or a size is missing.
        """
        # The original layout does not name the architecture. Only gpt-oss has both of these fields.
        original = "model_type" not in config and {"rope_scaling_factor", "num_experts"} <= config.keys()
        return cls.from_original(config) if original else cls.from_hf(config)

    @classmethod
    def from_original(cls, config: dict[str, Any]) -> "ModelConfig":
        """From the content of a config.json of the original layout.

        Raises:
          WeightsError: a size is missing.
        """
        optional = ("swiglu_limit", "rope_theta", "rope_ntk_beta", "rope_ntk_alpha", "initial_context_length")
        missing = [name for name in _ORIGINAL_NAMES.values() if name not in config and name not in optional]
        if missing:
            raise WeightsError(f"config.json lacks {', '.join(missing)}. Use the file that was published with the weights.")
        return cls(**{ours: config[name] for ours, name in _ORIGINAL_NAMES.items() if name in config})

    def to_original(self) -> dict[str, Any]:
        """The content of a config.json of the original layout, which has no fields for eos_id, pad_id and rope_truncate."""
        return {name: getattr(self, ours) for ours, name in _ORIGINAL_NAMES.items()}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """From the content of a config.json of Hugging Face's layout.

        Raises:
          WeightsError: the architecture is not gpt-oss, or a size is missing.
        """
        if config.get("model_type") != "gpt_oss":
            raise WeightsError(f"config.json has model_type = {config.get('model_type')!r}; only 'gpt_oss' is supported.")
        # transformers 5 writes rope_parameters; earlier versions write rope_scaling and rope_theta.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", "yarn") != "yarn":
            raise WeightsError(f"config.json has rope_type = {rope['rope_type']!r}; only 'yarn' is supported.")
        missing = [hf for hf in _HF_NAMES.values() if hf not in config and hf not in ("swiglu_limit", "rms_norm_eps", "pad_token_id")]
        if missing:
            raise WeightsError(f"config.json lacks {', '.join(missing)}. Use the file that was published with the weights.")
        pattern = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
        if config.get("layer_types", pattern) != pattern:
            raise WeightsError(
                "config.json has unsupported layer_types; they must alternate between sliding_attention and full_attention, in this order."
            )
        values = {ours: config[hf] for ours, hf in _HF_NAMES.items() if config.get(hf) is not None}
        values |= {ours: rope[hf] for ours, hf in _HF_ROPE_NAMES.items() if rope.get(hf) is not None}
        theta = rope.get("rope_theta", config.get("rope_theta"))
        if theta is not None:
            values["rope_theta"] = theta
        if isinstance(values.get("eos_id"), list):
            values["eos_id"] = values["eos_id"][0]
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json from which `transformers` builds the same model, with experts in MXFP4."""
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            **{hf: getattr(self, ours) for ours, hf in _HF_NAMES.items()},
            "rope_theta": self.rope_theta,
            "rope_scaling": {"rope_type": "yarn", **{hf: getattr(self, ours) for ours, hf in _HF_ROPE_NAMES.items()}},
            "max_position_embeddings": int(self.rope_factor * self.rope_original_length),
            "layer_types": ["sliding_attention", "full_attention"] * self.num_pairs,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
            },
        }


GPT_OSS_120B = ModelConfig(36, 2880, 64, 8, 64, 128, 4, 2880, 201_088)
GPT_OSS_20B = ModelConfig(24, 2880, 64, 8, 64, 32, 4, 2880, 201_088)
SHAPES = {"gpt-oss-120b": GPT_OSS_120B, "gpt-oss-20b": GPT_OSS_20B}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Ranks of the adapter. Targets of rank 0 have no adapter. Each product B A is scaled by alpha / rank."""

    attention_rank: int = 32
    expert_rank: int = 8
    head_rank: int = 32
    alpha: float = 32.0
