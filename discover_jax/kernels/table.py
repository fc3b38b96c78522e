"""The one table of accelerator kernels: (operation, platform) -> implementation. The plain-JAX reference is the entry that always works."""

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from discover_jax.exceptions import ConfigError
from discover_jax.kernels.attention import paged_attention_reference, prefill_attention_reference
from discover_jax.kernels.experts import moe_reference
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference
from discover_jax.kernels.pages import copy_page, write_pages, write_token
from discover_jax.kernels.projections import project_reference
from discover_jax.kernels.spread import SPREAD, can_spread

REFERENCE = "reference"

KERNELS: dict[tuple[str, str], Callable[..., Any]] = {
    ("write_token", REFERENCE): write_token,
    ("write_pages", REFERENCE): write_pages,
    ("copy_page", REFERENCE): copy_page,
    ("paged_attention", REFERENCE): paged_attention_reference,
    ("prefill_attention", REFERENCE): prefill_attention_reference,
    ("packed_attention", REFERENCE): packed_attention_reference,
    ("windowed_attention", REFERENCE): windowed_attention_reference,
    ("experts", REFERENCE): moe_reference,
    ("decode_projections", REFERENCE): project_reference,
    ("decode_experts", REFERENCE): moe_reference,
}
"""`write_token` and `paged_attention` are of one token a row, `write_pages` and `prefill_attention` of several. `packed_attention`,
`windowed_attention` and `experts` are of whole sequences, with derivatives; `decode_experts` and `decode_projections` of one token a
row, or of a prompt's chunk."""

OPTIONAL: dict[tuple[str, str], tuple[str, str]] = {
    ("decode_experts", "gpu"): ("discover_jax.kernels.experts_decode", "moe_decode"),
    ("paged_attention", "gpu"): ("discover_jax.kernels.attention_decode", "paged_attention"),
    ("experts", "gpu"): ("discover_jax.kernels.experts_update", "moe_update"),
    ("packed_attention", "gpu"): ("discover_jax.kernels.attention_update", "packed_attention"),
    ("windowed_attention", "gpu"): ("discover_jax.kernels.attention_update", "windowed_attention"),
    ("decode_projections", "gpu"): ("discover_jax.kernels.projections_decode", "project"),
}
"""Entries that need packages of the extra `kernels`: module and function."""


def _optional(operation: str, platform: str) -> Callable[..., Any] | None:
    """The entry, or None, said in the log with the reason, if a package is missing."""
    module, function = OPTIONAL[operation, platform]
    try:
        importlib.import_module("jax_triton")  # it also says whether jax itself is one for GPUs
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        missing = error.name or "jax_triton"
        logging.warning(
            "kernel of %s on %s: reference, which is many times slower, because the package %s cannot be imported (%s)."
            " Install discover_jax[kernels].",
            *(operation, platform, missing, error),
        )
        return None


@functools.cache
def _entry(operation: str, platform: str) -> Callable[..., Any]:
    if (operation, REFERENCE) not in KERNELS:
        known = sorted({name for name, _ in KERNELS})
        raise ConfigError(f"No kernel computes {operation!r}; known operations: {', '.join(known)}.")
    if (operation, platform) not in KERNELS and (operation, platform) in OPTIONAL:
        found = _optional(operation, platform)
        if found is None:
            return KERNELS[operation, REFERENCE]
        logging.info("kernel of %s on %s: %s", operation, platform, platform)
        return found
    chosen = platform if (operation, platform) in KERNELS else REFERENCE
    where = "several devices" if platform == REFERENCE else platform
    logging.info("kernel of %s on %s: %s", operation, where, chosen)  # once: the result is cached
    return KERNELS[operation, chosen]


_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Within it, `choose` takes another platform than the default one: functions are lowered for a machine that is not here."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


@contextlib.contextmanager
def spread_over(mesh: Mesh | None) -> Iterator[None]:
    """Within it, arrays may lie on all devices of a mesh, and `choose` takes what runs there; None: they lie on one."""
    token = _mesh.set(mesh if mesh is not None and mesh.size > 1 else None)
    try:
        yield
    finally:
        _mesh.reset(token)


@functools.cache
def say_reference(operation: str, reason: str) -> None:
    """Says in the log, once, that the reference computes an operation although there is a kernel, and why."""
    logging.warning("kernel of %s on gpu: reference, which is many times slower, because %s", operation, reason)


def choose(operation: str) -> Callable[..., Any]:
    """The implementation of an operation for the platform; which one it is, is logged once.

    On a mesh it is spread over the devices (see `spread`), or where that cannot be the reference, which XLA splits.

    Raises:
      ConfigError: no such operation.
    """
    platform, mesh = _platform.get() or jax.default_backend(), _mesh.get()
    if mesh is None:
        return _entry(operation, platform)
    if can_spread(operation, mesh):
        return SPREAD[operation](_entry(operation, platform), mesh)
    return _entry(operation, REFERENCE)
