"""Runs programs in sandboxes: the worker pool, the harness inside each sandbox, and the cache of verdicts."""

from discover_jax.execution.executor import Executor
from discover_jax.execution.grading import GradedTask
from discover_jax.execution.leases import lease_cores
from discover_jax.execution.limits import ResourceLimits

__all__ = ["Executor", "GradedTask", "ResourceLimits", "lease_cores"]
