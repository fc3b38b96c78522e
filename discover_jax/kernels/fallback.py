"""Why a kernel does not support its arguments, and log messages that it uses the reference instead."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

SLOWER = "reference, which is many times slower"


@functools.cache
def warn_reference(operation: str, reason: str, platform: str = "gpu") -> None:
    """Logs once that an operation uses the reference although it has a kernel, and why."""
    logging.warning("kernel of %s on %s: %s, because %s", operation, platform, SLOWER, reason)


@functools.cache
def note_reference(operation: str, reason: str, platform: str = "gpu") -> None:
    """Logs once (`--verbosity=0`) that some calls of an operation use the reference, because it is as fast or faster there."""
    logging.info("kernel of %s on %s: reference for some calls, because %s", operation, platform, reason)


def attention_refusal(what: str, arrays: Sequence[jax.Array], dtypes: Sequence[Any], head_sizes: Sequence[int]) -> str:
    """Why a kernel of attention does not support these arrays [..., H]; empty if it does. It needs the same type of all of them.

    Args:
      what: what the arrays are.
      dtypes, head_sizes: those that the kernel supports.
    """
    given = [array.dtype for array in arrays]
    if len(set(given)) > 1 or given[0] not in dtypes:
        supported = " or ".join(jnp.dtype(dtype).name for dtype in dtypes) + (", the same for all" if len(dtypes) > 1 else "")
        return f"{what} are {', '.join(map(str, given))}; the kernel supports {supported}"
    if (head_size := arrays[0].shape[-1]) not in head_sizes:
        return f"the head size is {head_size}; the kernel supports {' or '.join(map(str, head_sizes))}"
    return ""


def experts_update_refusal(x_TD: jax.Array, arrays: Sequence[Mapping[str, jax.Array]], layer: jax.Array | None) -> str:
    """Why no kernel of the update's experts supports these arguments of `MixtureOfExperts`; empty if its own conditions decide.

    Args:
      x_TD, layer: as given.
      arrays: those of both matrices.
    """
    if x_TD.dtype != jnp.bfloat16:
        return f"activations are {x_TD.dtype}; the kernel supports bfloat16"
    if layer is not None:
        return "the kernel supports the weights of one layer, not of a stack"
    if len({"lora_a" in own for own in arrays}) > 1:
        return "only one of the experts' two matrices has an adapter"
    return ""
