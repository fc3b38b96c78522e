"""Checks of what a run needs on a host: packages, weights, tokenizer, disk. The doctor and the preflight of several hosts share them.

Each returns what it found, and what later checks need. They raise a DiscoverError that says what to do.
"""

import importlib.metadata
import math
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import jax
from packaging.requirements import Requirement

from discover_jax.exceptions import ConfigError, RunError, WeightsError
from discover_jax.extras import install_command
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import SHAPES
from discover_jax.models.folder import check_folder
from discover_jax.policy import check_chat_format, weights_folder
from discover_jax.text.chat import ChatFormat
from discover_jax.text.prompts import installed_packages

_OPTIONAL = ("lightgbm", "catboost")
"""Packages for programs, of the extra `boosters`."""


def check_packages() -> tuple[str, None]:
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("discover_jax") or []]
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("discover_jax is not installed in this Python. Run `pip install -e .` or `make` in its folder.") from error
    problems, found = [], []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}; it must be {requirement.specifier}")
        if requirement.name in ("jax", "flax", "optax", "orbax-checkpoint", "transformers"):
            found.append(f"{requirement.name} {version}")
    optional = ", ".join(installed_packages(_OPTIONAL)) or f"none of {', '.join(_OPTIONAL)} ({install_command('boosters')})"
    if problems:
        raise ConfigError(f"{'; '.join(problems)}. Install the versions in constraints/, as the Makefile does.")
    return f"Python {platform.python_version()}, {', '.join(found)}; more for programs: {optional}", None


def check_weights(config: Any) -> tuple[str, ModelConfig]:
    folder = weights_folder(config)
    if folder is None:
        sizes = SHAPES[config.model.shape]
        return f"random weights with the shape of {config.model.shape}: the model cannot write useful programs", sizes
    sizes, size = check_folder(folder)
    if sizes.num_experts and config.model.experts == "packed" and sizes.width % 32:
        raise WeightsError(
            f"config.model.experts='packed' (MXFP4) needs a width that is a multiple of 32; got {sizes.width}. Set it to 'dense'."
        )
    return f"{folder}: {sizes.describe()}, {size / 1e6:,.0f} MB, all tensors present", sizes


def check_tokenizer(config: Any, sizes: ModelConfig) -> tuple[str, ChatFormat]:
    chat = check_chat_format(config, sizes)
    return f"{type(chat.tokenizer).__name__}, {chat.tokenizer.vocab_size:,} ids; chat format: {chat.describe()}", chat


def check_disk(config: Any, sizes: ModelConfig, workdir: Path) -> tuple[str, None]:
    existing = Path(os.path.abspath(workdir))
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        raise RunError(f"{workdir} is not writable (checked {existing}). Choose another --workdir.")
    adapter = Model(sizes, LoraConfig(**config.lora)).abstract_lora()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapter))
    # Float32 values and Adam's two moments. While a checkpoint is written, there is one more than config.checkpoint.keep.
    needed = 12 * parameters * (config.checkpoint.keep + 1) + (1 << 30)
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.0f} GB free at {existing}; checkpoints of {12 * parameters / 1e6:,.0f} MB, {config.checkpoint.keep} kept"
    if free < needed:
        raise RunError(
            f"{text}. About {needed / 1e9:.0f} GB are needed. Free some space, lower config.checkpoint.keep, or choose another --workdir."
        )
    return text, None
