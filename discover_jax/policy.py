"""What a run needs of the language model: the handle, its base weights, and its tokenizer, found by the config."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from discover_jax.models.config import LoraConfig
from discover_jax.models.folder import load_folder
from discover_jax.models.gpt_oss import Model
from discover_jax.text.tokenizer import Tokenizer, load_tokenizer

APPRENTICE = Path(__file__).parent / "apprentice" / "weights"
STOP_TOKEN = "<|return|>"


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its frozen weights; the adapter travels apart, since it alone changes."""

    model: Model
    frozen: Any
    tokenizer: Tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.special(STOP_TOKEN),)

    def init_lora(self, seed: int) -> Any:
        """A fresh adapter, a function of the seed."""
        return self.model.init_lora(jax.random.key(seed))


def weights_folder(config: Any) -> Path:
    """Where the weights lie: the shipped folder for `apprentice`, else the path as given."""
    return APPRENTICE if config.model.weights == "apprentice" else Path(config.model.weights).expanduser()


def load_policy(config: Any) -> Policy:
    """Reads tokenizer and weights.

    Raises:
      WeightsError, TokenizerError: a folder is missing or damaged; the message says what to do.
    """
    folder = weights_folder(config)
    tokenizer = load_tokenizer(Path(config.model.tokenizer).expanduser() if config.model.tokenizer else folder)
    sizes, frozen = load_folder(folder, dtype=config.model.dtype, experts=config.model.experts)
    model = Model(sizes, LoraConfig(**config.lora), dtype=config.model.dtype, experts=config.model.experts, remat=config.model.remat)
    return Policy(model, frozen, tokenizer)
