"""The update of one step of a run, from waves of rollouts that arrive one after another: it begins before the last program has ended.

The waves arrive in a fixed order, and each is packed by itself, so the result does not depend on when they arrive.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from discover_jax.exceptions import ConfigError
from discover_jax.learning.kl import mean_gap
from discover_jax.learning.packing import Batch, pack, pack_substeps, values_of_tokens
from discover_jax.learning.passes import OnPass, Passes
from discover_jax.learning.statistics import joined_metrics
from discover_jax.learning.train_state import TrainState
from discover_jax.learning.update import GradientSum, Update
from discover_jax.types import Rollout, RolloutKey


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """How the rollouts of a step are divided.

    Attributes:
      waves: number of waves. With 1, the only wave has all rollouts of the update.
      substeps: optimiser steps. With one wave, they divide its rollouts; with several, each takes equally many whole waves.
      row_tokens, rows, lengths: see `pack`.

    Raises:
      ConfigError: the optimiser steps cannot take whole waves.
    """

    waves: int
    substeps: int
    row_tokens: int
    rows: int
    lengths: int

    def __post_init__(self) -> None:
        if self.waves > 1 and self.waves % self.substeps:
            raise ConfigError(f"waves must be a multiple of substeps = {self.substeps}, or 1; got {self.waves}.")

    @property
    def row_shape(self) -> dict[str, int]:
        """The arguments of `pack`."""
        return {"row_tokens": self.row_tokens, "rows": self.rows, "lengths": self.lengths}


class StepUpdate:
    """The update of one step. With one wave, it is `Update.update_in_substeps`.

    With several waves, the gradient of each is added when it arrives:

    - The reduction's divisor is only known at the end, so the sum is divided then.
    - The KL's mean must be known before the first wave. So `measure_base` runs the base model on all rollouts of the step, before any
      program must have ended. The mean is over all of them, also over those that the update leaves out.

    Up to the order of float32 sums, the result is otherwise that of one wave.

    Args:
      update: jitted functions.
      frozen: base weights.
      state: adapter and optimiser before the step. The first optimiser step donates its buffers. None for the base model: then no
        wave may have a rollout.
      plan: how the rollouts are divided.
      on_pass: see `Update.update_in_substeps`. The total grows with each wave.
    """

    def __init__(self, update: Update, frozen: Any, state: Any, plan: UpdatePlan, on_pass: OnPass | None = None):
        self._update, self._frozen, self._state, self._plan, self._on_pass = update, frozen, state, plan, on_pass
        self._passes = Passes(0, on_pass)
        self._gaps: dict[RolloutKey, np.ndarray] = {}
        self._kl: dict[str, float] = {}
        self._arrived = 0
        self._steps: list[dict[str, float]] = []
        self._filled = self._positions = 0
        self._begin_substep()

    def _begin_substep(self) -> None:
        self._sum: GradientSum | None = None
        self._units = 0

    @property
    def measures_ahead(self) -> bool:
        """Whether `measure_base` must be called before the first wave."""
        return self._plan.waves > 1 and self._update.knows_kl

    def measure_base(self, rollouts: Sequence[Rollout]) -> None:
        """Measures the KL to the base model on all rollouts of the step.

        Raises:
          LearningError: a log-probability of the base model is not finite.
        """
        batches = pack(rollouts, np.zeros(len(rollouts)), **self._plan.row_shape)
        self._passes.expect(len(batches))
        gaps = values_of_tokens(rollouts, self._update.base_gaps(self._frozen, batches, self._passes), **self._plan.row_shape)
        self._gaps = {(rollout.group, rollout.index): gap_T for rollout, gap_T in zip(rollouts, gaps, strict=True)}
        self._kl = {"kl_base/mean": mean_gap([gap_T[rollout.chosen_T] for rollout, gap_T in zip(rollouts, gaps, strict=True)])}

    def packed(self, rollouts: Sequence[Rollout], advantages: Sequence[float]) -> list[list[Batch]]:
        """The batches of the next wave, for `add`: a list for each optimiser step that it belongs to."""
        shape = self._plan.row_shape
        if self._plan.waves == 1:
            return pack_substeps(rollouts, advantages, substeps=self._plan.substeps, **shape)
        return [pack(rollouts, self._penalised(rollouts, advantages), **shape)]

    def _penalised(self, rollouts: Sequence[Rollout], advantages: Sequence[float]) -> Sequence[Any]:
        """The advantages with the KL penalty, as `kl.shape_advantages` adds it."""
        coefficient = self._update.kl_coefficient
        if not coefficient:
            return advantages
        gaps = [self._gaps[rollout.group, rollout.index].astype(np.float64) for rollout in rollouts]
        # The advantage is rounded first, as in a batch.
        pairs = zip(advantages, gaps, strict=True)
        return [np.float32(advantage) + coefficient * (self._kl["kl_base/mean"] - gap_T) for advantage, gap_T in pairs]

    def add(self, parts: Sequence[Sequence[Batch]]) -> None:
        """Adds the next wave, from `packed`. Takes an optimiser step once it has all of its waves.

        Raises:
          LearningError: see `Update.update_in_substeps`.
        """
        self._arrived += 1
        if self._plan.waves == 1:
            self._state, metrics = self._update.update_in_substeps(self._frozen, self._state, parts, self._on_pass)
            self._steps = [] if metrics["update/skipped"] else [metrics]
            return
        for batches in parts:
            self._add(batches)
        if self._arrived % (self._plan.waves // self._plan.substeps) == 0:
            self._end_substep()

    def _add(self, batches: Sequence[Batch]) -> None:
        if not batches:
            return
        self._passes.expect(len(batches))
        before = self._sum if self._sum is not None else self._update.zero(self._state.lora)
        self._sum = self._update.add(self._frozen, self._state.lora, before, batches, self._passes, units=1)
        self._units += self._update.units(batches)
        self._filled += sum(int(np.count_nonzero(batch.segments_BT)) for batch in batches)
        self._positions += sum(batch.segments_BT.size for batch in batches)

    def _end_substep(self) -> None:
        if self._sum is not None:
            gradient, metrics = self._update.read(self._sum, self._units, self._passes)
            self._state, metrics = self._update.apply(self._state, gradient, metrics)
            self._steps.append(metrics)
        self._begin_substep()

    def finish(self) -> tuple[TrainState, dict[str, float]]:
        """The state after all waves, and the metrics of `Update.update_in_substeps`.

        Raises:
          ConfigError: waves are missing.
        """
        if self._arrived != self._plan.waves:
            raise ConfigError(f"The step has {self._plan.waves} waves; {self._arrived} were added.")
        if not self._steps:
            return self._state, {"tokens": 0.0, "update/skipped": 1.0}
        if self._plan.waves == 1:
            return self._state, self._steps[0]
        filled = self._filled / self._positions
        return self._state, joined_metrics(self._steps) | self._kl | {"update/skipped": 0.0, "update/filled_frac": filled}
