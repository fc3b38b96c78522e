"""Qwen3, dense models: no biases, queries and keys are normed."""

from typing import Any

from discover_jax.models.config import ModelConfig
from discover_jax.models.families import dense
from discover_jax.models.families.family import Family
from discover_jax.models.families.fields import Fields

_OPTIONS: dict[str, Any] = {"qkv_bias": False, "o_bias": False, "qk_norm": True}

QWEN3_8B = ModelConfig(
    num_layers=36,
    width=4_096,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    mlp_width=12_288,
    vocab_size=151_936,
    rope_theta=1e6,
    rope_kind="plain",
    rms_eps=1e-6,
    eos_id=151_645,
    pad_id=151_643,
    family="qwen3",
    **dense.FIXED | _OPTIONS,
)


def from_hf(fields: Fields) -> ModelConfig:
    """See `dense.from_hf`. The size of a head is not derived: in this family it is not width / heads."""
    fields.require("head_dim")
    biased = fields.flag("attention_bias", False)
    return dense.from_hf(fields, family=FAMILY.name, derived=(), **_OPTIONS | {"qkv_bias": biased, "o_bias": biased})


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    from_hf=from_hf,
    to_hf=lambda config: dense.to_hf(config, FAMILY.architecture, attention_bias=config.qkv_bias, use_sliding_window=False),
    layouts=lambda config: (dense.layout(config),),
    shapes={"qwen3-8b": QWEN3_8B},
)
