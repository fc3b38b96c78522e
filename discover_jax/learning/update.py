"""The update: gradients of the adapter summed over microbatches of packed rollouts, then one optimiser step.

All microbatches of a run have one shape, so two functions are compiled: one that adds a microbatch's gradient, one that applies
the sum. Weights of the reduction are computed over all microbatches beforehand (see losses), so the result depends neither on
how rollouts are packed nor on how many microbatches there are, up to the order of float32 sums. A third one, compiled only where
the KL to the base is wanted, reads the microbatches with the adapter left out.
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
    """Sums and extremes over the chosen tokens of one microbatch; neutral elements where there are none."""
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
    """Statistics of all microbatches as the numbers to log; needs at least one chosen token."""
    stacked = {key: np.asarray([each[key] for each in statistics], np.float64) for key in statistics[0]}
    tokens = stacked["tokens"].sum()
    with np.errstate(over="ignore"):  # report an infinite ratio instead of failing here
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
    """Metrics of several optimiser steps as one row; of one, as they are."""
    if len(substeps) == 1:
        return substeps[0]
    tokens = [row["tokens"] for row in substeps]
    # From the second substep on, the trainer's weights are no longer the sampler's: only the first can tell whether the two agree.
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
    """Euclidean norm over all leaves together."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.float32(0)))


def _chosen(batches: Sequence[Batch]) -> int:
    return sum(int(np.count_nonzero(batch.mask_BT)) for batch in batches)


Tell = Callable[[int, int], None]
"""Takes the number of passes over microbatches that are done, and of all."""


class _Passes:
    """Tells how many of the passes over microbatches the devices have done.

    A pass is waited for only once the next one is in their queue, so that they never wait for the host.
    """

    def __init__(self, total: int, tell: Tell | None):
        self._total, self._tell = total, tell
        self._done = 0
        self._queued: Any = None

    def queued(self, result: Any) -> None:
        """Another pass was started; `result` is some of what it gives."""
        if self._tell is None:
            return
        before, self._queued = self._queued, result
        if before is not None:
            jax.block_until_ready(before)
            self._count(self._tell)

    def gather(self, started: Iterable[Any]) -> list[Any]:
        """What passes give, on the host; iterating starts them."""
        results = []
        for result in started:
            results.append(result)
            self.queued(result)
        results = jax.device_get(results)
        self.read()
        return results

    def read(self) -> None:
        """The host has read what all passes so far gave."""
        if self._tell is not None and self._queued is not None:
            self._queued = None
            self._count(self._tell)

    def _count(self, tell: Tell) -> None:
        self._done += 1
        tell(self._done, self._total)


_UNTOLD = _Passes(0, None)


class Update:
    """The jitted update of one model with one optimiser and one loss. It holds jitted functions but no state of training.

    Args:
      model: a `discover_jax.models.gpt_oss.Model`.
      optimizer: an optax optimiser, e.g. `train_state.adam()`.
      loss: a name in LOSSES.
      reduction: a name in REDUCTIONS.
      chunk_tokens: places of a microbatch whose logits exist at once.
      limits: of the losses that limit ratios.
      kl_coefficient: lambda of the penalty on the KL to the base model (see kl.py); 0: none.
      measure_kl: logs the KL to the base even without a penalty, which costs one more forward pass a microbatch.
      routes: shape [L, X] and type of the routes that batches bring, for `lowered_functions`; None if they bring none.

    Raises:
      ConfigError: an unknown name, or a number out of range.
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
            # Where masked the ratio is set to 1 before the loss, so that no overflow at padding can reach a gradient.
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

        # Without a mesh the layouts are None, so jit chooses them. On a mesh results must keep the layout of the arguments, or every
        # function would be compiled twice.
        state = abstract_train_state(model.abstract_lora(), optimizer)
        layouts = shardings(state)
        jit = functools.partial(jax.jit, compiler_options=EXACT_ROUNDING)
        self._accumulate = jit(accumulate, donate_argnums=0, out_shardings=(layouts.lora, None))
        self._apply = jax.jit(apply, donate_argnums=0, out_shardings=layouts)
        self._base_gap = jit(base_gap, out_shardings=replicated(self._mesh))  # read by the host of every process
        self._norm = jax.jit(_norm)
        self._forward = jit(lambda lora, frozen, batch: forward(lora, frozen, batch)[1])

    def _place(self, arrays: Any) -> Any:
        """Arrays [B, T, ...] with their rows split over the mesh, if there is one."""
        return jax.tree.map(lambda x: lay_out(x, self._layout(x)), arrays)

    def _layout(self, x: Any) -> NamedSharding | None:
        if self._mesh is None:
            return None
        if axes := rows_axes(x.shape[0], self._mesh):
            return NamedSharding(self._mesh, PartitionSpec(axes))
        return sharding_for(("batch", "positions", "layers", "choices")[: x.ndim], x.shape, self._mesh)  # it raises ShardingError

    def gradient(self, frozen: Any, lora: Any, batches: Sequence[Batch], passes: _Passes = _UNTOLD) -> tuple[Any, dict[str, float]]:
        """Gradient of the reduced loss with respect to `lora`, with the batches' advantages. At least one token must be chosen.

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
        self, frozen: Any, substeps: Sequence[Sequence[Batch]], passes: _Passes = _UNTOLD
    ) -> tuple[list[list[Batch]], dict[str, float]]:
        """All batches of a step with advantages reshaped by the KL to the base, and `kl_base/mean`; unchanged if the KL is off.

        The mean that the penalty is measured from is over the chosen tokens of all substeps together, as in the reference code.
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
        """One optimiser step on all batches together: `update_in_substeps` with one."""
        return self.update_in_substeps(frozen, state, [batches])

    def update_in_substeps(
        self,
        frozen: Any,
        state: TrainState,
        substeps: Sequence[Sequence[Batch]],
        tell: Tell | None = None,
    ) -> tuple[TrainState, dict[str, float]]:
        """Several optimiser steps, each on its own batches. The buffers of `state` are donated: use only the returned state.

        Args:
          frozen: base weights.
          state: adapter and optimiser before the first step.
          substeps: from `pack_substeps`; all batches have one shape. Substeps without a chosen token are skipped. If none is left
            (every group is constant), the state is unchanged.
          tell: called after each pass over a microbatch: one for the gradient and, if wanted, one for the KL to the base.

        Returns:
          The new state, and host floats over chosen tokens, measured on the weights before each optimiser step: `loss`, `logprob_gap/mean`
          and `/max` (|trainer - sampler|, nats), `ratio/min` and `/max` (trainer / sampler), `ratio/limited_frac` (tokens on which a limit
          of the loss acts; only for losses that have one), `entropy` (nats a token), `grad_norm` (before any clipping), `tokens`,
          `kl_base/mean` (mean of sampler - base, nats a token; if wanted), `update/filled_frac` (positions that are no padding),
          `update/skipped`. Of several substeps: sum of tokens, extremes of ratios, means over tokens of entropy and limited_frac, means
          over substeps of loss and grad_norm, and the log-probability gap of the first one, whose weights are the sampler's. A skipped
          update has only `tokens` = 0 and `update/skipped` = 1, and `state` stays valid.

        Raises:
          LearningError: loss or gradient is not finite, or the base model's log-probabilities are not. In the first substep `state` is
            still valid; in a later one it is lost, and only the last checkpoint remains.
          ShardingError: the rows of a batch are not divisible by the mesh's data axis.
        """
        substeps = [batches for batches in substeps if _chosen(batches)]
        if not substeps:
            return state, {"tokens": 0.0, "update/skipped": 1.0}
        passes = _Passes(sum(len(batches) for batches in substeps) * (1 + self._knows_kl), tell)
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
                f"The gradient of optimiser step {int(state.step)} is not finite: loss {metrics['loss']}, norm {metrics['grad_norm']},"
                f" ratios {metrics['ratio/min']} to {metrics['ratio/max']}, log-probability gap at most {metrics['logprob_gap/max']}."
                " It was not applied. Ratios far from 1 mean that sampler and trainer disagree. Otherwise check the scale of rewards"
                " and weights."
            )
        return self._apply(state, gradient), metrics

    def measure(self, frozen: Any, lora: Any, batches: Sequence[Batch], tell: Tell | None = None) -> dict[str, float]:
        """The log-probability gap, ratios, entropy, tokens, KL and filling of `update`, without gradient or change; empty if no token was
        chosen.

        For rollouts that take part in no update: those of constant groups, or of a search without training. `lora` may be None: the policy
        then is the base model, and its KL is not measured. `tell` is that of `update_in_substeps`.
        """
        if _chosen(batches) == 0:
            return {}
        passes = _Passes(len(batches) * (1 + (self._knows_kl and lora is not None)), tell)
        metrics = _metrics(passes.gather(self._forward(lora, frozen, self._place(batch)) for batch in batches))
        metrics["update/filled_frac"] = filled_frac(batches)
        return metrics | self.shape(frozen, [batches], passes)[1] if lora is not None else metrics

    def lowered_functions(self, frozen: Any, state: TrainState, rows: int, row_tokens: int) -> Iterator[LoweredFunction]:
        """The jitted functions of `update` for microbatches of this shape, lowered but not run.

        Args:
          frozen, state: abstract, laid out as the real ones will be.
          rows, row_tokens: of a microbatch.

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
        """A microbatch and its weights, laid out as `_place` does."""
        batch = empty_batch(rows, row_tokens, self._routes)
        batch, weights_BT = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._layout(x)), arrays)
            for arrays in (batch, batch.advantages_BT)
        )
        return batch, weights_BT
