"""The language model of a run, loaded as the config says: its handle, base weights, and chat format with its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from discover_jax.engine import build_model
from discover_jax.exceptions import TokenizerError
from discover_jax.learning.train_state import TrainState
from discover_jax.models.config import ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import SHAPES
from discover_jax.models.folder import load_folder, read_config
from discover_jax.models.progress import OnProgress
from discover_jax.models.sharding import mesh_of_run
from discover_jax.text.chat import ChatFormat
from discover_jax.text.formats import HARMONY_FAMILY, family_of, load_chat_format
from discover_jax.text.tokenizer import Tokenizer

APPRENTICE = Path(__file__).parent / "apprentice" / "weights"


@dataclasses.dataclass(frozen=True)
class Policy:
    """The language model as it is at some step. Only `train_state` changes during a run.

    Attributes:
      model: handle of the architecture.
      frozen: base weights.
      chat: chat format of the weights, with their tokenizer.
      train_state: adapter and optimiser; None for the base model, which a search samples from.
    """

    model: Model
    frozen: Any
    chat: ChatFormat
    train_state: TrainState | None = None

    @property
    def lora(self) -> Any:
        """The adapter; None for the base model."""
        return self.train_state.lora if self.train_state is not None else None

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps that the adapter has seen."""
        return int(self.train_state.step) if self.train_state is not None else 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self.chat.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.chat.stop_ids

    def init_lora(self, seed: int) -> Any:
        """A fresh adapter, a function of the seed."""
        return self.model.init_lora(jax.random.key(seed))


def weights_folder(config: Any) -> Path | None:
    """The folder of the weights: the shipped one for `apprentice`, None for `random`, otherwise the path as given."""
    named = {"apprentice": APPRENTICE, "random": None}
    return named[config.model.weights] if config.model.weights in named else Path(config.model.weights).expanduser()


def check_chat_format(config: Any, sizes: ModelConfig) -> ChatFormat:
    """The chat format and tokenizer of the config, checked against a model of these sizes.

    Raises:
      TokenizerError: the tokenizer or chat template is missing or damaged, or has more ids than the model.
      ConfigError: a setting has no effect with this chat format.
    """
    weights = weights_folder(config)
    folder = Path(config.model.tokenizer).expanduser() if config.model.tokenizer else weights
    assert folder is not None, "validate() demands a tokenizer for random weights"
    # Random weights know no chat format, so theirs is that of the tokenizer.
    family = (family_of(folder) or HARMONY_FAMILY) if weights is None else sizes.family
    chat = load_chat_format(folder, family, config.prompt.reasoning_effort, weights)
    if chat.tokenizer.vocab_size > sizes.vocab_size or chat.stop_ids[-1] >= sizes.vocab_size:
        raise TokenizerError(
            f"The tokenizer of {folder} has {chat.tokenizer.vocab_size:,} ids and the stop ids {chat.stop_ids}, but the model knows"
            f" {sizes.vocab_size:,}. They do not belong together. Set config.model.tokenizer to the folder that came with the weights."
        )
    if config.sampling.thinking_tokens:
        chat.answer_opening()  # raises if the format has no thinking
    return chat


def load_chat(config: Any) -> ChatFormat:
    """The chat format and tokenizer of the config. Of the weights, it reads only config.json.

    Raises:
      WeightsError: config.json is missing or damaged.
      TokenizerError, ConfigError: see `check_chat_format`.
    """
    folder = weights_folder(config)
    return check_chat_format(config, SHAPES[config.model.shape] if folder is None else read_config(folder))


def load_policy(config: Any, on_progress: OnProgress | None = None, chat: ChatFormat | None = None) -> Policy:
    """Reads chat format and weights, or draws random weights from the seed, on the devices of `config.mesh`.

    Args:
      config: validated.
      chat: from `load_chat`, if it is already loaded.
      on_progress: called with the bytes read so far and the total.

    Raises:
      ShardingError: the mesh does not fit the devices, or the model does not fit the mesh.
      WeightsError, TokenizerError: a folder is missing or damaged, or the two do not belong together.
    """
    folder = weights_folder(config)
    sizes = SHAPES[config.model.shape] if folder is None else read_config(folder)
    chat = chat or check_chat_format(config, sizes)
    mesh = mesh_of_run(config.mesh.data, config.mesh.expert, config.mesh.tensor)
    model = build_model(config, sizes, mesh)
    if folder is None:
        return Policy(model, model.init_frozen(jax.random.key(config.seed)), chat)
    options = {"dtype": config.model.dtype, "experts": model.experts, "mesh": mesh}
    return Policy(model, load_folder(folder, on_progress=on_progress, **options)[1], chat)
