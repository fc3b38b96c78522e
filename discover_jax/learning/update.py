"""The update: sums the adapter's gradient over microbatches of packed rollouts, then takes one optimiser step.

All microbatches of an optimiser step have one shape. One jitted function adds the gradient of a microbatch to the sum; another applies
the sum. A third, compiled only if the KL to the base model is measured, runs the forward pass without the adapter.

The weights of the reduction come from all microbatches of the optimiser step (see `losses`). Up to the order of float32 sums, the result
depends neither on how rollouts are packed nor on the number of microbatches.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.kernels.spread import rows_axes
from discover_jax.learning.kl import shape_advantages
from discover_jax.learning.logprobs import token_logprobs
from discover_jax.learning.losses import DEFAULT_LIMITS, LIMITED, LOSSES, REDUCTIONS, RatioLimits
from discover_jax.learning.packing import Batch, empty_batch, filled_frac
from discover_jax.learning.train_state import TrainState, abstract_train_state
from discover_jax.models.rounding import EXACT_ROUNDING
from discover_jax.models.sharding import lay_out, replicated, sharding_for, shardings
from discover_jax.types import LoweredFunction

Statistics = dict[str, jax.Array]


def _statistics(logprobs_BT: jax.Array, entropy_BT: jax.Array, batch: Batch) -> Statistics:
    """Sums and extremes over the chosen tokens of one microbatch; neutral elements if it has none."""
    mask_BT = batch.mask_BT
    gap_BT = jnp.where(mask_BT, logprobs_BT - batch.sampler_logprobs_BT, 0.0)
    return {
        "gap_sum": jnp.abs(gap_BT).sum(),
        "gap_max": jnp.abs(gap_BT).max(),
        "log_ratio_min": jnp.where(mask_BT, gap_BT, jnp.inf).min(),
        "log_ratio_max": jnp.where(mask_BT, gap_BT, -jnp.inf).max(),
        "entropy_sum": jnp.where(mask_BT, entropy_BT, 0.0).sum(),
        "tokens": mask_BT.sum(dtype=jnp.int32),
    }


def _metrics(statistics: Sequence[Statistics]) -> dict[str, float]:
    """Metrics from the statistics of all microbatches. At least one token must be chosen."""
    stacked = {key: np.asarray([each[key] for each in statistics], np.float64) for key in statistics[0]}
    tokens = stacked["tokens"].sum()
    with np.errstate(over="ignore"):  # an infinite ratio is logged, not raised
        ratio_min, ratio_max = np.exp(stacked["log_ratio_min"].min()), np.exp(stacked["log_ratio_max"].max())
    metrics = {
        "tokens": tokens,
        "logprob_gap/mean": stacked["gap_sum"].sum() / tokens,
        "logprob_gap/max": stacked["gap_max"].max(),
        "ratio/min": ratio_min,
        "ratio/max": ratio_max,
        "entropy": stacked["entropy_sum"].sum() / tokens,
    }
    if "loss" in stacked:
        metrics["loss"] = stacked["loss"].sum()
    if "limited" in stacked:
        metrics["ratio/limited_frac"] = stacked["limited"].sum() / tokens
    return {key: float(value) for key, value in metrics.items()}


def _joined(substeps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combines the metrics of all optimiser steps; see `Update.update_in_substeps`."""
    if len(substeps) == 1:
        return substeps[0]
    tokens = [row["tokens"] for row in substeps]
    # Only the first substep has the sampler's weights, so only its gap shows whether sampler and trainer agree.
    joined = {"tokens": sum(tokens), **{name: substeps[0][name] for name in ("logprob_gap/mean", "logprob_gap/max")}}
    for name in substeps[0].keys() - joined.keys():
        values = [row[name] for row in substeps]
        if name in ("ratio/min", "ratio/max"):
            joined[name] = min(values) if name == "ratio/min" else max(values)
        else:
            of_tokens = name in ("entropy", "ratio/limited_frac")
            joined[name] = float(np.average(values, weights=tokens if of_tokens else None))
    return joined


def _norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves taken as one vector."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.float32(0)))


def _chosen(batches: Sequence[Batch]) -> int:
    return sum(int(np.count_nonzero(batch.mask_BT)) for batch in batches)


OnPass = Callable[[int, int], None]
"""(finished, total) passes over microbatches -> None."""


class _Passes:
    """Counts the passes over microbatches that the devices have finished, and calls `on_pass` after each.

    It waits for a pass only once the next one is queued, so the devices never wait for the host.
    """

    def __init__(self, total: int, on_pass: OnPass | None):
        self._total, self._on_pass = total, on_pass
        self._finished = 0
        self._queued: Any = None

    def queued(self, result: Any) -> None:
        """Registers a pass that was queued. `result` is any array that it computes."""
        if self._on_pass is None:
            return
        before, self._queued = self._queued, result
        if before is not None:
            jax.block_until_ready(before)
            self._count(self._on_pass)

    def gather(self, started: Iterable[Any]) -> list[Any]:
        """The results of passes, on the host. Iterating over `started` queues the passes."""
        results = []
        for result in started:
            results.append(result)
            self.queued(result)
        results = jax.device_get(results)
        self.read()
        return results

    def read(self) -> None:
        """Counts the last queued pass as finished, because the host has read its result."""
        if self._on_pass is not None and self._queued is not None:
            self._queued = None
            self._count(self._on_pass)

    def _count(self, on_pass: OnPass) -> None:
        self._finished += 1
        on_pass(self._finished, self._total)


_UNCOUNTED = _Passes(0, None)


class Update:
    """The jitted update of one model with one optimiser and one loss. It has jitted functions but no training state.

    Args:
      model: a `discover_jax.models.gpt_oss.Model`.
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
        model: Any,
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
        token_loss, limited = LOSSES[loss], LIMITED.get(loss)
        self._weights = REDUCTIONS[reduction]
        self._kl_coefficient = kl_coefficient
        self._knows_kl = measure_kl or kl_coefficient > 0
        self._mesh = model.mesh
        self._routes = routes

        def forward(lora: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Statistics]:
            logprobs_BT, entropy_BT = token_logprobs(model, frozen, lora, batch, chunk_tokens=chunk_tokens)
            return logprobs_BT, jax.lax.stop_gradient(_statistics(logprobs_BT, entropy_BT, batch))

        def weighted_loss(lora: Any, frozen: Any, batch: Batch, weights_BT: jax.Array) -> tuple[jax.Array, Statistics]:
            logprobs_BT, statistics = forward(lora, frozen, batch)
            # Set the ratio of masked tokens to 1 before the loss, so that no overflow at padding reaches the gradient.
            sampler_BT, advantages_BT = jnp.asarray(batch.sampler_logprobs_BT), jnp.asarray(batch.advantages_BT)
            logprobs_BT = jnp.where(batch.mask_BT, logprobs_BT, sampler_BT)
            if limited is not None:
                ratios_BT = jnp.exp(jax.lax.stop_gradient(logprobs_BT) - sampler_BT)
                statistics["limited"] = (batch.mask_BT & limited(ratios_BT, advantages_BT, limits)).sum(dtype=jnp.int32)
            return jnp.sum(weights_BT * token_loss(logprobs_BT, sampler_BT, advantages_BT, limits)), statistics

        def accumulate(gradient: Any, lora: Any, frozen: Any, batch: Batch, weights_BT: jax.Array) -> tuple[Any, Statistics]:
            (value, statistics), new = jax.value_and_grad(weighted_loss, has_aux=True)(lora, frozen, batch, weights_BT)
            return jax.tree.map(jnp.add, gradient, new), statistics | {"loss": value}

        def base_gap(frozen: Any, batch: Batch) -> jax.Array:
            batch = dataclasses.replace(batch, routes_BTLX=None)  # the KL reference model uses its own expert routing
            base_BT, _ = token_logprobs(model, frozen, None, batch, chunk_tokens=chunk_tokens)
            return jnp.where(batch.mask_BT, batch.sampler_logprobs_BT - base_BT, 0.0)

        def apply(state: TrainState, gradient: Any) -> TrainState:
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.lora)
            return TrainState(optax.apply_updates(state.lora, changes), opt_state, state.step + 1)

        # Without a mesh the layouts are None and jit chooses them. On a mesh, results keep the layout of the arguments; otherwise jit
        # would compile every function twice.
        state = abstract_train_state(model.abstract_lora(), optimizer)
        layouts = shardings(state)
        jit = functools.partial(jax.jit, compiler_options=EXACT_ROUNDING)
        self._accumulate = jit(accumulate, donate_argnums=0, out_shardings=(layouts.lora, None))
        self._apply = jax.jit(apply, donate_argnums=0, out_shardings=layouts)
        self._base_gap = jit(base_gap, out_shardings=replicated(self._mesh))  # read by the host of every process
        self._norm = jax.jit(_norm)
        self._forward = jit(lambda lora, frozen, batch: forward(lora, frozen, batch)[1])

    def _place(self, arrays: Any) -> Any:
        """Arrays [B, T, ...] on the devices, with their rows split over the mesh if there is one."""
        return jax.tree.map(lambda x: lay_out(x, self._layout(x)), arrays)

    def _layout(self, x: Any) -> NamedSharding | None:
        if self._mesh is None:
            return None
        if axes := rows_axes(x.shape[0], self._mesh):
            return NamedSharding(self._mesh, PartitionSpec(axes))
        return sharding_for(("batch", "positions", "layers", "choices")[: x.ndim], x.shape, self._mesh)  # it raises ShardingError

    def gradient(self, frozen: Any, lora: Any, batches: Sequence[Batch], passes: _Passes = _UNCOUNTED) -> tuple[Any, dict[str, float]]:
        """Gradient of the reduced loss with respect to `lora`. At least one token must be chosen.

        Returns:
          A tree like `lora`, and the metrics of `update` except `kl_base/mean` and `update/skipped`.
        """
        gradient = jax.tree.map(jnp.zeros_like, lora)
        statistics = []
        for batch, weights_BT in zip(batches, self._weights(batches), strict=True):
            gradient, of_batch = self._accumulate(gradient, lora, frozen, *self._place((batch, weights_BT)))
            statistics.append(of_batch)
            passes.queued(of_batch)
        norm, statistics = jax.device_get((self._norm(gradient), statistics))
        passes.read()
        return gradient, _metrics(statistics) | {"grad_norm": float(norm)}

    def shape(
        self, frozen: Any, substeps: Sequence[Sequence[Batch]], passes: _Passes = _UNCOUNTED
    ) -> tuple[list[list[Batch]], dict[str, float]]:
        """Adds the KL penalty to the advantages of all batches of a step; see `kl.shape_advantages`.

        Returns:
          The batches, and `kl_base/mean`. If the KL is neither measured nor penalised: the unchanged batches, and no metric.
        """
        if not self._knows_kl:
            return [list(batches) for batches in substeps], {}
        batches = [batch for batches in substeps for batch in batches]
        shaped, mean = shape_advantages(batches, self._base_gaps(frozen, batches, passes), self._kl_coefficient)
        remaining = iter(shaped)
        return [[next(remaining) for _ in batches] for batches in substeps], {"kl_base/mean": mean}

    def _base_gaps(self, frozen: Any, batches: Sequence[Batch], passes: _Passes) -> list[np.ndarray]:
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
          - `ratio/limited_frac`: tokens on which the loss's limit acts; only for losses that have one
          - `entropy`: nats per token
          - `grad_norm`: before clipping
          - `tokens`
          - `kl_base/mean`: mean of sampler - base, in nats per token; only if the KL is measured
          - `update/filled_frac`: positions that are not padding
          - `update/skipped`

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
        passes = _Passes(sum(len(batches) for batches in substeps) * (1 + self._knows_kl), on_pass)
        substeps, kl_metrics = self.shape(frozen, substeps, passes)
        rows = []
        for batches in substeps:
            state, metrics = self._optimizer_step(frozen, state, batches, passes)
            rows.append(metrics)
        filled = filled_frac([batch for batches in substeps for batch in batches])
        return state, _joined(rows) | kl_metrics | {"update/skipped": 0.0, "update/filled_frac": filled}

    def _optimizer_step(
        self, frozen: Any, state: TrainState, batches: Sequence[Batch], passes: _Passes
    ) -> tuple[TrainState, dict[str, float]]:
        gradient, metrics = self.gradient(frozen, state.lora, batches, passes)
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
        passes = _Passes(len(batches) * (1 + (self._knows_kl and lora is not None)), on_pass)
        metrics = _metrics(passes.gather(self._forward(lora, frozen, self._place(batch)) for batch in batches))
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
