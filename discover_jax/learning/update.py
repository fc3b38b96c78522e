"""The update: sums the adapter's gradient over microbatches of packed rollouts, then takes one optimiser step.

All microbatches of an optimiser step have one shape. One jitted function adds the gradient of a microbatch to the sum; another applies
the sum. A third, compiled only if the KL to the base model is measured, runs the forward pass without the adapter.

The weights of the reduction come from all microbatches of the optimiser step (see `losses`). Up to the order of float32 sums, the result
depends neither on how rollouts are packed nor on the number of microbatches. If the microbatches arrive in waves (see `step_update`), the
sum is divided at the end instead.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.kernels.spread import rows_axes
from discover_jax.learning.kl import shape_advantages
from discover_jax.learning.losses import DEFAULT_LIMITS, LIMITED, LOSSES, REDUCTIONS, RatioLimits
from discover_jax.learning.objective import Objective
from discover_jax.learning.packing import Batch, empty_batch, filled_frac
from discover_jax.learning.passes import UNCOUNTED, OnPass, Passes
from discover_jax.learning.statistics import Statistics, joined_metrics, metrics_of
from discover_jax.learning.train_state import TrainState, abstract_train_state
from discover_jax.models.decoder import Model
from discover_jax.models.rounding import EXACT_ROUNDING
from discover_jax.models.sharding import lay_out, replicated, sharding_for, shardings
from discover_jax.types import LoweredFunction


@dataclasses.dataclass(frozen=True)
class GradientSum:
    """The gradient of the microbatches of an optimiser step so far.

    Attributes:
      gradient: of the weighted sum of token losses, a tree like the adapter. The next microbatch takes its buffers.
      statistics: of each microbatch, on the devices.
    """

    gradient: Any
    statistics: Sequence[Statistics] = ()


def _norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves taken as one vector."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.float32(0)))


def _divided(tree: Any, divisor: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf / divisor, tree)


def _chosen(batches: Sequence[Batch]) -> int:
    return sum(int(np.count_nonzero(batch.mask_BT)) for batch in batches)


class Update:
    """The jitted update of one model with one optimiser and one loss. It has jitted functions but no training state.

    Args:
      optimizer: an optax optimiser, e.g. `train_state.adam()`.
      loss: a name in LOSSES.
      reduction: a name in REDUCTIONS.
      chunk_tokens: positions of a microbatch whose logits are in memory at the same time.
      limits: limits on the ratio, for the losses that have one.
      kl_coefficient: lambda of the penalty on the KL to the base model (see `kl`); 0 for no penalty.
      measure_kl: whether to log the KL to the base model even without a penalty. It costs one more forward pass per microbatch.
      routes: shape [L, X] and dtype of recorded routes, for `lowered_functions`; None if batches have no routes.

    Raises:
      ConfigError: a name is unknown or a number is out of range.
    """

    def __init__(
        self,
        model: Model,
        optimizer: optax.GradientTransformation,
        *,
        loss: str = "importance_sampling",
        reduction: str = "sum",
        chunk_tokens: int = 1024,
        limits: RatioLimits = DEFAULT_LIMITS,
        kl_coefficient: float = 0.0,
        measure_kl: bool = False,
        routes: jax.ShapeDtypeStruct | None = None,
    ):
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1; got {chunk_tokens!r}.")
        if not 0 <= kl_coefficient < float("inf"):
            raise ConfigError(f"kl_coefficient must be finite and at least 0; got {kl_coefficient!r}.")
        self._optimizer = optimizer
        self._reduction = REDUCTIONS[reduction]
        self._kl_coefficient = kl_coefficient
        self._knows_kl = measure_kl or kl_coefficient > 0
        self._mesh = model.mesh
        self._routes = routes

        # Without a mesh the layouts are None and jit chooses them. On a mesh, results keep the layout of the arguments; otherwise jit
        # would compile every function twice.
        layouts = shardings(abstract_train_state(model.abstract_lora(), optimizer))
        objective = Objective(model, LOSSES[loss], LIMITED.get(loss), limits, chunk_tokens)
        jit = functools.partial(jax.jit, compiler_options=EXACT_ROUNDING)
        self._accumulate = jit(objective.accumulate, donate_argnums=0, out_shardings=(layouts.lora, None))
        self._apply = jax.jit(self._applied, donate_argnums=0, out_shardings=layouts)
        self._base_gap = jit(objective.base_gap, out_shardings=replicated(self._mesh))  # read by the host of every process
        self._norm = jax.jit(_norm)
        self._divided = jax.jit(_divided, donate_argnums=0, out_shardings=layouts.lora)
        self._forward = jit(objective.measure)

    def _applied(self, state: TrainState, gradient: Any) -> TrainState:
        changes, opt_state = self._optimizer.update(gradient, state.opt_state, state.lora)
        return TrainState(optax.apply_updates(state.lora, changes), opt_state, state.step + 1)

    def _place(self, arrays: Any) -> Any:
        """Arrays [B, T, ...] on the devices, with their rows split over the mesh if there is one."""
        return jax.tree.map(lambda x: lay_out(x, self._layout(x)), arrays)

    def _layout(self, x: Any) -> NamedSharding | None:
        if self._mesh is None:
            return None
        if axes := rows_axes(x.shape[0], self._mesh):
            return NamedSharding(self._mesh, PartitionSpec(axes))
        return sharding_for(("batch", "positions", "layers", "choices")[: x.ndim], x.shape, self._mesh)  # it raises ShardingError

    def gradient(self, frozen: Any, lora: Any, batches: Sequence[Batch], passes: Passes = UNCOUNTED) -> tuple[Any, dict[str, float]]:
        """Gradient of the reduced loss with respect to `lora`. At least one token must be chosen.

        Returns:
          A tree like `lora`, and the metrics of `update` except `kl_base/mean` and `update/skipped`.
        """
        return self.read(self.add(frozen, lora, self.zero(lora), batches, passes), 1, passes)

    def zero(self, lora: Any) -> GradientSum:
        """The sum over no microbatch."""
        return GradientSum(jax.tree.map(jnp.zeros_like, lora))

    def units(self, batches: Sequence[Batch]) -> int:
        """See `losses.Reduction`."""
        return self._reduction.units(batches)

    def add(
        self, frozen: Any, lora: Any, total: GradientSum, batches: Sequence[Batch], passes: Passes = UNCOUNTED, *, units: int | None = None
    ) -> GradientSum:
        """Queues the gradient of microbatches and returns its sum with `total`, which must not be used again.

        Args:
          units: number that the weights are divided by; None: the units of these batches, which are the whole optimiser step.
        """
        gradient, statistics = total.gradient, list(total.statistics)
        for batch, weights_BT in zip(batches, self._reduction(batches, units), strict=True):
            gradient, of_batch = self._accumulate(gradient, lora, frozen, *self._place((batch, weights_BT)))
            statistics.append(of_batch)
            passes.queued(of_batch)
        return GradientSum(gradient, statistics)

    def read(self, total: GradientSum, units: int, passes: Passes = UNCOUNTED) -> tuple[Any, dict[str, float]]:
        """Gradient and metrics of a sum, as `gradient` returns them. At least one token must be chosen.

        Args:
          total: must not be used again.
          units: number that the sum is still to be divided by; 0 or 1 leaves it as it is.
        """
        divided = units > 1
        gradient = self._divided(total.gradient, np.float32(units)) if divided else total.gradient
        norm, statistics = jax.device_get((self._norm(gradient), list(total.statistics)))
        passes.read()
        metrics = metrics_of(statistics) | {"grad_norm": float(norm)}
        if divided:
            metrics["loss"] /= units
        return gradient, metrics

    def shape(
        self, frozen: Any, substeps: Sequence[Sequence[Batch]], passes: Passes = UNCOUNTED
    ) -> tuple[list[list[Batch]], dict[str, float]]:
        """Adds the KL penalty to the advantages of all batches of a step; see `kl.shape_advantages`.

        Returns:
          The batches, and `kl_base/mean`. If the KL is neither measured nor penalised: the unchanged batches, and no metric.
        """
        if not self._knows_kl:
            return [list(batches) for batches in substeps], {}
        batches = [batch for batches in substeps for batch in batches]
        shaped, mean = shape_advantages(batches, self.base_gaps(frozen, batches, passes), self._kl_coefficient)
        remaining = iter(shaped)
        return [[next(remaining) for _ in batches] for batches in substeps], {"kl_base/mean": mean}

    @property
    def knows_kl(self) -> bool:
        """Whether the KL to the base model is measured."""
        return self._knows_kl

    @property
    def kl_coefficient(self) -> float:
        return self._kl_coefficient

    def base_gaps(self, frozen: Any, batches: Sequence[Batch], passes: Passes = UNCOUNTED) -> list[np.ndarray]:
        """log p_sampler - log p_base of each token of each batch [B, T], in nats; 0 where masked."""
        return passes.gather(self._base_gap(frozen, self._place(batch)) for batch in batches)

    def update(self, frozen: Any, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, dict[str, float]]:
        """One optimiser step on all batches; see `update_in_substeps`."""
        return self.update_in_substeps(frozen, state, [batches])

    def update_in_substeps(
        self,
        frozen: Any,
        state: TrainState,
        substeps: Sequence[Sequence[Batch]],
        on_pass: OnPass | None = None,
    ) -> tuple[TrainState, dict[str, float]]:
        """Several optimiser steps, each on its own batches. The buffers of `state` are donated: use only the returned state.

        Args:
          frozen: base weights.
          state: adapter and optimiser before the first step.
          substeps: from `pack_substeps`. Substeps without a chosen token are skipped. If all are (every group is constant), the state
            is unchanged.
          on_pass: called after each pass over a microbatch: one for the gradient and, if the KL is measured, one for the base model.

        Returns:
          The new state, and metrics as floats. They are over chosen tokens, with the weights before each optimiser step:

          - `loss`
          - `logprob_gap/mean`, `logprob_gap/max`: |trainer - sampler|, in nats
          - `ratio/min`, `ratio/max`: trainer / sampler
          - `ratio/limited_frac`: fraction of tokens on which the loss's limit acts; only for losses that have one
          - `entropy`: nats per token
          - `grad_norm`: before clipping
          - `tokens`: number of chosen tokens
          - `kl_base/mean`: mean of sampler - base, in nats per token; only if the KL is measured
          - `update/filled_frac`: fraction of positions that are not padding
          - `update/skipped`: 1 if the update was skipped, else 0

          With several substeps: the sum of tokens, the extremes of ratios, means over tokens of entropy and limited_frac, means over
          substeps of loss and grad_norm, and the log-probability gap of the first substep, which has the sampler's weights.

          A skipped update has only `tokens` = 0 and `update/skipped` = 1, and `state` stays valid.

        Raises:
          LearningError: the loss, the gradient or a log-probability of the base model is not finite. If this happens in the first
            substep, `state` is still valid. In a later one `state` is lost: continue from the last checkpoint.
          ShardingError: the rows of a batch are not divisible by the mesh's data axis.
        """
        substeps = [batches for batches in substeps if _chosen(batches)]
        if not substeps:
            return state, {"tokens": 0.0, "update/skipped": 1.0}
        passes = Passes(sum(len(batches) for batches in substeps) * (1 + self._knows_kl), on_pass)
        substeps, kl_metrics = self.shape(frozen, substeps, passes)
        rows = []
        for batches in substeps:
            state, metrics = self._optimizer_step(frozen, state, batches, passes)
            rows.append(metrics)
        filled = filled_frac([batch for batches in substeps for batch in batches])
        return state, joined_metrics(rows) | kl_metrics | {"update/skipped": 0.0, "update/filled_frac": filled}

    def _optimizer_step(
        self, frozen: Any, state: TrainState, batches: Sequence[Batch], passes: Passes
    ) -> tuple[TrainState, dict[str, float]]:
        return self.apply(state, *self.gradient(frozen, state.lora, batches, passes))

    def apply(self, state: TrainState, gradient: Any, metrics: dict[str, float]) -> tuple[TrainState, dict[str, float]]:
        """One optimiser step with a gradient and its metrics. The buffers of `state` are donated.

        Raises:
          LearningError: the loss or the gradient is not finite; `state` is still valid.
        """
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            raise LearningError(
                f"The loss or gradient of optimiser step {int(state.step)} is not finite: loss {metrics['loss']}, gradient norm"
                f" {metrics['grad_norm']}, ratios {metrics['ratio/min']} to {metrics['ratio/max']}, largest log-probability gap"
                f" {metrics['logprob_gap/max']}. The step was not applied. Ratios far from 1 mean that sampler and trainer disagree;"
                " otherwise, check the scale of the rewards and the weights."
            )
        return self._apply(state, gradient), metrics

    def measure(self, frozen: Any, lora: Any, batches: Sequence[Batch], on_pass: OnPass | None = None) -> dict[str, float]:
        """The metrics of `update` that need no gradient, for rollouts that no update uses: those of constant groups or of a search run.

        Args:
          frozen: base weights.
          lora: the adapter, or None if the policy is the base model; then the KL is not measured.
          batches: packed rollouts.
          on_pass: as for `update_in_substeps`.

        Returns:
          Log-probability gap, ratios, entropy, tokens, KL and `update/filled_frac`; empty if no token was chosen.
        """
        if _chosen(batches) == 0:
            return {}
        passes = Passes(len(batches) * (1 + (self._knows_kl and lora is not None)), on_pass)
        metrics = metrics_of(passes.gather(self._forward(lora, frozen, self._place(batch)) for batch in batches))
        metrics["update/filled_frac"] = filled_frac(batches)
        return metrics | self.shape(frozen, [batches], passes)[1] if lora is not None else metrics

    def lowered_functions(self, frozen: Any, state: TrainState, rows: int, row_tokens: int) -> Iterator[LoweredFunction]:
        """The jitted functions of `update`, lowered but not run.

        Args:
          frozen, state: abstract arrays, with the layouts of the real ones.
          rows, row_tokens: shape of a microbatch.

        Raises:
          ShardingError: the rows are not divisible by the mesh's data axis.
        """
        batch, weights_BT = self._abstract_batch(rows, row_tokens)
        yield from self._lowered_base_functions(frozen, batch)
        live = {"gradient": state.lora}
        yield LoweredFunction("gradient", self._accumulate.lower(state.lora, state.lora, frozen, batch, weights_BT), live)
        yield LoweredFunction("apply", self._apply.lower(state, state.lora), live)

    def lowered_measuring_functions(self, frozen: Any, lora: Any, rows: int, row_tokens: int) -> Iterator[LoweredFunction]:
        """The jitted functions of `measure`; see `lowered_functions`. `lora` may be None."""
        batch, _ = self._abstract_batch(rows, row_tokens)
        yield LoweredFunction("measure", self._forward.lower(lora, frozen, batch), {})
        if lora is not None:
            yield from self._lowered_base_functions(frozen, batch)

    def _lowered_base_functions(self, frozen: Any, batch: Batch) -> Iterator[LoweredFunction]:
        if self._knows_kl:
            yield LoweredFunction("base", self._base_gap.lower(frozen, batch), {})

    def _abstract_batch(self, rows: int, row_tokens: int) -> tuple[Batch, jax.ShapeDtypeStruct]:
        """A microbatch and its weights, with the layouts of `_place`."""
        batch = empty_batch(rows, row_tokens, self._routes)
        batch, weights_BT = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._layout(x)), arrays)
            for arrays in (batch, batch.advantages_BT)
        )
        return batch, weights_BT
