"""The train state: the adapter, the optimiser state and the number of optimiser steps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from discover_jax.models.sharding import replicated, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree that checkpoints store whole.

    Attributes:
      lora: the adapter, float32.
      opt_state: state of the optax optimiser, with the shapes of `lora`.
      step: int32 scalar, number of optimiser steps, without skipped updates.
    """

    lora: Any
    opt_state: Any
    step: jax.Array


@functools.cache  # one object for equal settings, so that jax traces its `init` once for each shape of adapter
def adam(
    learning_rate: float = 4e-5, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, max_grad_norm: float = 0.0
) -> optax.GradientTransformation:
    """Adam as in the report (section 5): constant learning rate, no warm-up, no weight decay.

    `max_grad_norm` above 0 clips gradients to that global norm first; 0, the default, does not clip.
    """
    optimizer = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer) if max_grad_norm > 0 else optimizer


def abstract_train_state(lora: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of a state, for restoring a checkpoint. Moments have the adapter's layout; scalars are replicated.

    Args:
      lora: an adapter, or `Model.abstract_lora()`. Without a mesh the state has no shardings.
      optimizer: the run's optimiser.
    """
    lora = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on_mesh(leaf)), lora)
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(lora) if leaf.sharding is not None]
    everywhere = replicated(meshes[0] if meshes else None)

    def moment(leaf: Any, of_lora: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of_lora.sharding)

    def scalar(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    without_layouts = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lora)
    opt_state = jax.eval_shape(optimizer.init, without_layouts)  # traced once for all meshes
    opt_state = optax.tree_utils.tree_map_params(optimizer, moment, opt_state, lora, transform_non_params=scalar)
    return TrainState(lora, opt_state, scalar(jax.ShapeDtypeStruct((), jnp.int32)))


def init_train_state(lora: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0. It owns the adapter's buffers, which the first update frees; keep a copy if you need one."""
    layouts = shardings(abstract_train_state(lora, optimizer))
    if not jax.tree.leaves(layouts):
        return TrainState(lora, optimizer.init(lora), jnp.zeros((), jnp.int32))
    # Replicate scalars: the first update returns them on all devices, so the second would compile again if they started on one.
    begin = jax.jit(lambda lora: (optimizer.init(lora), jnp.zeros((), jnp.int32)), out_shardings=(layouts.opt_state, layouts.step))
    return TrainState(lora, *begin(lora))


def _on_mesh(leaf: Any) -> NamedSharding | None:
    sharding = leaf.sharding
    return sharding if isinstance(sharding, NamedSharding) else None
