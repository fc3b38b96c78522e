"""The jitted part of a run as its config asks for it: model, sampler, optimiser, update. Runs and dry runs build theirs here alike."""

from collections.abc import Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from discover_jax.learning.losses import RatioLimits
from discover_jax.learning.train_state import adam
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.gpt_oss import Model
from discover_jax.sampling.sampler import Sampler, SecondPhase


def build_model(config: Any, sizes: ModelConfig, mesh: Mesh | None = None) -> Model:
    """The handle of a model of these sizes, with the adapter's ranks and the form of the weights from the config.

    Args:
      config: validated.
      sizes: of the weights' folder, or of `config.model.shape`.
      mesh: devices over which parameters are laid out; None for the default device.
    """
    form = {"dtype": config.model.dtype, "experts": config.model.experts, "remat": config.model.remat}
    return Model(sizes, LoraConfig(**config.lora), mesh=mesh, **form)


def build_sampler(config: Any, model: Model, stop_ids: Sequence[int], second_phase: SecondPhase | None = None) -> Sampler:
    """The sampler of a run."""
    return Sampler(
        model,
        slots=config.sampling.slots,
        max_prompt_tokens=config.sampling.max_prompt_tokens,
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        temperature_spread=config.sampling.temperature_spread,
        stop_ids=stop_ids,
        second_phase=second_phase,
    )


def build_optimizer(config: Any) -> optax.GradientTransformation:
    """The optimiser of the adapter."""
    return adam(
        config.train.learning_rate,
        b1=config.train.adam_b1,
        b2=config.train.adam_b2,
        eps=config.train.adam_eps,
        max_grad_norm=config.train.max_grad_norm,
    )


def build_update(config: Any, model: Model, optimizer: optax.GradientTransformation) -> Update:
    """The update of a run."""
    return Update(
        model,
        optimizer,
        loss=config.train.loss,
        reduction=config.train.reduction,
        limits=RatioLimits(config.train.clip_low, config.train.clip_high, config.train.truncate),
        kl_coefficient=config.train.kl_coefficient,
        measure_kl=config.train.measure_kl,
    )


def row_tokens(config: Any) -> int:
    """Places of a packed row of the update: as set, or the longest rollout with its prompt."""
    return config.train.row_tokens or config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
