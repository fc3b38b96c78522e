"""Chooses the chat format of a model."""

import os
from pathlib import Path

from discover_jax.exceptions import ConfigError, TokenizerError
from discover_jax.published import is_there, show
from discover_jax.text.chat import ChatFormat
from discover_jax.text.folder_tokenizer import read_json, read_stop_ids
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
    if not is_there(path):
        return None
    family = read_json(path).get("model_type", HARMONY_FAMILY)
    if not isinstance(family, str):
        raise TokenizerError(
            f"{path} has model_type = {show(family)}; it must be a text. Use the file that was published with the weights."
        )
    return family


def load_chat_format(
    folder: str | os.PathLike[str],
    family: str,
    reasoning_effort: str = DEFAULT_EFFORT,
    weights: str | os.PathLike[str] | None = None,
) -> ChatFormat:
    """The chat format of a model: harmony for gpt-oss, otherwise the chat template of the folder.

    Args:
      folder: the folder of the tokenizer.
      family: the model's family, as `model_type` of config.json.
      reasoning_effort: "low", "medium" or "high". Only harmony has one.
      weights: the folder of the weights, if that is another one; only harmony needs it. The ids in both folders' generation_config.json
        end a reply.

    Raises:
      TokenizerError: the folder's tokenizer or chat template is missing or damaged.
      ConfigError: a reasoning effort that has no effect.
    """
    if family == HARMONY_FAMILY:
        stop_ids = {index for each in (folder, weights) if each is not None for index in read_stop_ids(Path(each))}
        return Harmony(load_tokenizer(folder), reasoning_effort, stop_ids=stop_ids)
    if reasoning_effort != DEFAULT_EFFORT:
        raise ConfigError(
            f"config.prompt.reasoning_effort = {reasoning_effort!r} has no effect: only prompts of gpt-oss state one, and this model is of"
            f" the family {family!r}. Remove the setting."
        )
    return Template(folder)
