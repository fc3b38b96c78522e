"""Chooses the chat format of a model."""

import os
from pathlib import Path

from discover_jax.exceptions import ConfigError
from discover_jax.text.chat import ChatFormat
from discover_jax.text.folder_tokenizer import read_json
from discover_jax.text.harmony import DEFAULT_EFFORT, Harmony
from discover_jax.text.template import Template
from discover_jax.text.tokenizer import load_tokenizer

HARMONY_FAMILY = "gpt_oss"


def family_of(folder: str | os.PathLike[str]) -> str | None:
    """The `model_type` in a folder's config.json; None without the file. The original layout, which only gpt-oss has, lacks the field.

    Raises:
      TokenizerError: config.json is damaged.
    """
    path = Path(folder) / "config.json"
    return read_json(path).get("model_type", HARMONY_FAMILY) if path.is_file() else None


def load_chat_format(folder: str | os.PathLike[str], family: str, reasoning_effort: str = DEFAULT_EFFORT) -> ChatFormat:
    """The chat format of a model: harmony for gpt-oss, otherwise the chat template of the folder.

    Args:
      folder: the folder of the tokenizer.
      family: the model's family, as `model_type` of config.json.
      reasoning_effort: "low", "medium" or "high". Only harmony has one.

    Raises:
      TokenizerError: the folder's tokenizer or chat template is missing or damaged.
      ConfigError: a reasoning effort that has no effect.
    """
    if family == HARMONY_FAMILY:
        return Harmony(load_tokenizer(folder), reasoning_effort)
    if reasoning_effort != DEFAULT_EFFORT:
        raise ConfigError(
            f"config.prompt.reasoning_effort = {reasoning_effort!r} has no effect: only prompts of gpt-oss state one, and this model is of"
            f" the family {family!r}. Remove the setting."
        )
    return Template(folder)
