"""The language model of a run, loaded as the config says: its handle, base weights and tokenizer."""

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
from discover_jax.models.folder import OnProgress, load_folder, read_config
from discover_jax.models.sharding import mesh_of_run
from discover_jax.text.tokenizer import Tokenizer, load_tokenizer

APPRENTICE = Path(__file__).parent / "apprentice" / "weights"
STOP_TOKEN = "<|return|>"


@dataclasses.dataclass(frozen=True)
class Policy:
    """The language model as it is at some step. Only `train_state` changes during a run.

    Attributes:
      model: handle of the architecture.
      frozen: base weights.
      tokenizer: of the weights.
      train_state: adapter and optimiser; None for the base model, which a search samples from.
    """

    model: Model
    frozen: Any
    tokenizer: Tokenizer
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
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.special(STOP_TOKEN),)

    def init_lora(self, seed: int) -> Any:
        """A fresh adapter, a function of the seed."""
        return self.model.init_lora(jax.random.key(seed))


def weights_folder(config: Any) -> Path | None:
    """The folder of the weights: the shipped one for `apprentice`, None for `random`, otherwise the path as given."""
    named = {"apprentice": APPRENTICE, "random": None}
    return named[config.model.weights] if config.model.weights in named else Path(config.model.weights).expanduser()


def check_tokenizer(config: Any, sizes: ModelConfig) -> Tokenizer:
    """The tokenizer of the config, checked against a model of these sizes.

    Raises:
      TokenizerError: it is missing or damaged, or has more ids than the model.
    """
    folder = Path(config.model.tokenizer).expanduser() if config.model.tokenizer else weights_folder(config)
    assert folder is not None, "validate() demands a tokenizer for random weights"
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise TokenizerError(
            f"The tokenizer of {folder} has {tokenizer.vocab_size:,} ids, but the model knows {sizes.vocab_size:,}. They do not belong"
            " together. Set config.model.tokenizer to the folder that came with the weights."
        )
    return tokenizer


def load_policy(config: Any, on_progress: OnProgress | None = None) -> Policy:
    """Reads tokenizer and weights, or draws random weights from the seed, on the devices of `config.mesh`.

    Args:
      config: validated.
      on_progress: called with the bytes read so far and the total.

    Raises:
      ShardingError: the mesh does not fit the devices, or the model does not fit the mesh.
      WeightsError, TokenizerError: a folder is missing or damaged, or the two do not belong together.
    """
    folder = weights_folder(config)
    sizes = SHAPES[config.model.shape] if folder is None else read_config(folder)
    tokenizer = check_tokenizer(config, sizes)
    mesh = mesh_of_run(config.mesh.data, config.mesh.expert, config.mesh.tensor)
    model = build_model(config, sizes, mesh)
    if folder is None:
        return Policy(model, model.init_frozen(jax.random.key(config.seed)), tokenizer)
    options = {"dtype": config.model.dtype, "experts": model.experts, "mesh": mesh}
    return Policy(model, load_folder(folder, on_progress=on_progress, **options)[1], tokenizer)
