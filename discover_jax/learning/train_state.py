"""The part of a run that learning changes: the adapter, the optimiser's memory, and the number of optimiser steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree; checkpoints store it whole.

    Attributes:
      lora: the adapter, float32.
      opt_state: of the optax optimiser, shaped by `lora`.
      step: int32 scalar, optimiser steps done; a skipped update does not count.
    """

    lora: Any
    opt_state: Any
    step: jax.Array


def adam(
    learning_rate: float = 4e-5, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, max_grad_norm: float = 0.0
) -> optax.GradientTransformation:
    """Adam as in the report (section 5): constant rate, no warmup, no weight decay.

    `max_grad_norm` above 0 first scales gradients down to that global norm; 0, the default, leaves them alone.
    """
    optimizer = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer) if max_grad_norm > 0 else optimizer


def init_train_state(lora: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of `lora`. The state takes the adapter's buffers over: the first update frees them, so keep a copy if you need one."""
    return TrainState(lora, optimizer.init(lora), jnp.zeros((), jnp.int32))
