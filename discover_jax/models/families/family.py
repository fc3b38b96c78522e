"""What a family of models declares, and checks that families share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from discover_jax.exceptions import WeightsError
from discover_jax.models.config import ModelConfig
from discover_jax.models.layouts import Layout

SIZE_NAMES = {
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
}
"""Fields of `ModelConfig` with the name that they have in every config.json."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      name: `model_type` in config.json.
      architecture: the class of `transformers` that runs the model.
      from_hf: content of config.json -> config; raises WeightsError.
      to_hf: config -> content of a config.json from which `transformers` builds the same model.
      layouts: config -> ways in which its tensors are stored; the first is the one to write by default.
      shapes: sizes of published models, by name.
    """

    name: str
    architecture: str
    from_hf: Callable[[dict[str, Any]], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    layouts: Callable[[ModelConfig], tuple[Layout, ...]]
    shapes: Mapping[str, ModelConfig]


def check_present(content: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises WeightsError if config.json lacks one of these fields."""
    if missing := [name for name in names if content.get(name) is None]:
        raise WeightsError(f"config.json lacks {', '.join(missing)}. Use the file that was published with the weights.")


def rope_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of rotary embedding: transformers 5 writes rope_parameters; earlier versions write rope_scaling and rope_theta."""
    fields = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})
    if content.get("rope_theta") is not None:
        fields.setdefault("rope_theta", content["rope_theta"])
    fields.setdefault("rope_type", fields.pop("type", "default"))  # old files write `type`
    return fields


def first_id(value: int | list[int]) -> int:
    """The first of one or several ids."""
    return value[0] if isinstance(value, list) else value
