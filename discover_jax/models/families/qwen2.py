"""Qwen2 and Qwen2.5, also Qwen2.5-Coder: dense, biases on q, k and v."""

from typing import Any

from discover_jax.models.config import ModelConfig
from discover_jax.models.families import dense
from discover_jax.models.families.family import Family
from discover_jax.models.families.fields import Fields

_OPTIONS: dict[str, Any] = {"qkv_bias": True, "o_bias": False}


def from_hf(fields: Fields) -> ModelConfig:
    """See `dense.from_hf`."""
    return dense.from_hf(fields, family=FAMILY.name, derived=("head_dim",), **_OPTIONS)


def _shape(num_layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, vocab_size: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=width // heads,
        mlp_width=mlp_width,
        vocab_size=vocab_size,
        rope_theta=1e6,
        rope_kind="plain",
        rms_eps=1e-6,
        eos_id=151_645,
        pad_id=151_643,
        family="qwen2",
        tied=tied,
        **dense.FIXED | _OPTIONS,
    )


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    from_hf=from_hf,
    to_hf=lambda config: dense.to_hf(config, FAMILY.architecture, use_sliding_window=False),
    layouts=lambda config: (dense.layout(config),),
    shapes={
        "qwen2.5-coder-0.5b": _shape(24, 896, 14, 2, 4_864, 151_936, tied=True),
        "qwen2.5-coder-1.5b": _shape(28, 1_536, 12, 2, 8_960, 151_936, tied=True),
        "qwen2.5-coder-7b": _shape(28, 3_584, 28, 4, 18_944, 152_064, tied=False),
        "qwen2.5-coder-32b": _shape(64, 5_120, 40, 8, 27_648, 152_064, tied=False),
    },
)
