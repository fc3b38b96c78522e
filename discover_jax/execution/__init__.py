"""Runs programs in sandboxes: the worker pool, the harness inside each sandbox, and the cache of verdicts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discover_jax.execution.executor import Executor
    from discover_jax.execution.grading import GradedTask
    from discover_jax.execution.leases import lease_cores
    from discover_jax.execution.limits import ResourceLimits

__all__ = ["Executor", "GradedTask", "ResourceLimits", "lease_cores"]
_MODULES = {"Executor": "executor", "GradedTask": "grading", "lease_cores": "leases", "ResourceLimits": "limits"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use. The process of each slot also imports this package, but not the executor's many modules."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
