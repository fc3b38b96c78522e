"""What a sandbox is made from: its backend, folders, cores and limits."""

import dataclasses
from pathlib import Path

from discover_jax.execution import bubblewrap, memory
from discover_jax.execution.limits import ResourceLimits

PRELOAD = (
    "pandas",
    "sklearn.compose",
    "sklearn.ensemble",
    "sklearn.impute",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "sklearn.preprocessing",
    "xgboost",
)
BACKENDS = ("bubblewrap", "unsafe-subprocess")


@dataclasses.dataclass(frozen=True)
class SandboxSpec:
    """How to create the sandboxes of one slot.

    Attributes:
      backend: one of BACKENDS.
      host: what bubblewrap needs; None for the unsafe backend.
      cgroups: where to create control groups; None: memory is limited on a best-effort basis.
      public: folder that programs see as data/.
      limits: of one program.
      slot, cores: number of the slot, and the CPUs leased to it.
      uid: leased uid of its programs; None: this process's own, if it is not root.
      preload: modules that a sandbox imports before it is ready, in addition to numpy.
      calls: whether its programs' functions are called one by one, instead of run() once for a submission.
    """

    backend: str
    host: bubblewrap.Host | None
    cgroups: memory.Cgroups | None
    public: Path
    limits: ResourceLimits
    slot: int
    cores: tuple[int, ...]
    uid: int | None
    preload: tuple[str, ...] = PRELOAD
    calls: bool = False
