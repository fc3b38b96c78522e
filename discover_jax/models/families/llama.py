"""Llama 3.x and models of the same architecture, such as SmolLM2: dense, usually without biases."""

from discover_jax.models.config import ModelConfig
from discover_jax.models.families import dense
from discover_jax.models.families.family import Family
from discover_jax.models.families.fields import Fields

LLAMA_3_1_8B = ModelConfig(
    num_layers=32,
    width=4_096,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    mlp_width=14_336,
    vocab_size=128_256,
    rope_theta=500_000.0,
    rope_kind="llama3",
    rope_factor=8.0,
    rope_original_length=8_192,
    rope_low_factor=1.0,
    rope_high_factor=4.0,
    rms_eps=1e-5,
    eos_id=128_001,
    pad_id=-1,
    family="llama",
    qkv_bias=False,
    o_bias=False,
    **dense.FIXED,
)


def from_hf(fields: Fields) -> ModelConfig:
    """See `dense.from_hf`."""
    biased = fields.flag("attention_bias", False)
    return dense.from_hf(fields, family=FAMILY.name, derived=("num_key_value_heads", "head_dim"), qkv_bias=biased, o_bias=biased)


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    from_hf=from_hf,
    to_hf=lambda config: dense.to_hf(config, FAMILY.architecture, attention_bias=config.qkv_bias),
    layouts=lambda config: (dense.layout(config),),
    shapes={"llama-3.1-8b": LLAMA_3_1_8B},
)
