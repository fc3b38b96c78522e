"""What a family of models declares, and names that families share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from discover_jax.models.config import ModelConfig
from discover_jax.models.families.fields import Fields
from discover_jax.models.layouts import Layout

SIZE_NAMES = {
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
}
"""Fields of `ModelConfig` with the name that they have in every config.json."""
MOST_LAYERS = 10_000
"""Layers of a model that are believed: there is a list of the tensors of all layers."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      name: `model_type` in config.json.
      architecture: the class of `transformers` that runs the model.
      from_hf: fields of config.json -> config; raises WeightsError.
      to_hf: config -> content of a config.json from which `transformers` builds the same model.
      layouts: config -> ways in which its tensors are stored; the first is the one to write by default.
      shapes: sizes of published models, by name.
    """

    name: str
    architecture: str
    from_hf: Callable[[Fields], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    layouts: Callable[[ModelConfig], tuple[Layout, ...]]
    shapes: Mapping[str, ModelConfig]
