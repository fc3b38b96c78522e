"""Families of models: each maps its config.json and its tensors' names to a `ModelConfig`, a `Layout` and back."""

from typing import Any

from discover_jax.exceptions import ConfigError, WeightsError
from discover_jax.models.config import ModelConfig
from discover_jax.models.families import gpt_oss, llama, qwen2, qwen3
from discover_jax.models.families.family import Family
from discover_jax.models.families.fields import Fields
from discover_jax.models.layouts import Layout
from discover_jax.published import show

FAMILIES: dict[str, Family] = {family.name: family for family in (gpt_oss.FAMILY, llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)}
"""By the name that config.json has as `model_type`."""
SHAPES: dict[str, ModelConfig] = {name: shape for family in FAMILIES.values() for name, shape in family.shapes.items()}
"""Sizes of published models, by name."""


def family_of(config: ModelConfig) -> Family:
    """The family of a config."""
    return FAMILIES[config.family]


def read_model_config(content: dict[str, Any]) -> ModelConfig:
    """The config of the model that a config.json describes.

    Raises:
      WeightsError: the family or an option is unsupported, or a field is missing or has a wrong type; the message names it.
    """
    name = content.get("model_type")
    if gpt_oss.is_original(content):
        read = gpt_oss.from_original
    elif isinstance(name, str) and name in FAMILIES:
        read = FAMILIES[name].from_hf
    else:
        raise WeightsError(f"config.json has model_type = {show(name)}; supported: {', '.join(map(repr, FAMILIES))}.")
    try:
        return read(Fields(content))
    except ConfigError as error:  # sizes that contradict each other
        raise WeightsError(f"config.json describes a model that is not supported. {error}") from error


def find_layout(config: ModelConfig, names: set[str]) -> Layout | None:
    """The layout that has tensors of these names; None if no layout of the family has them."""
    return next((layout for layout in family_of(config).layouts(config) if layout.marker in names), None)


def config_content(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The content of config.json beside tensors in this layout."""
    return gpt_oss.to_original(config) if layout is gpt_oss.ORIGINAL else family_of(config).to_hf(config)
