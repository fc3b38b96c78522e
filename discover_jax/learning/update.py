"""The update: gradients of the adapter summed over microbatches of packed rollouts, then one optimiser step.

All microbatches of a run have one shape, so two programs are compiled: one that adds a microbatch's gradient, one that applies
the sum. Weights of the reduction are computed over all microbatches beforehand (see losses), so the result depends neither on
how rollouts are packed nor on how many microbatches there are, up to the order of float32 sums.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.logprobs import token_logprobs
from discover_jax.learning.losses import LOSSES, REDUCTIONS
from discover_jax.learning.packing import Batch, empty_batch
from discover_jax.learning.train_state import TrainState, abstract_train_state
from discover_jax.models.sharding import sharding_for
from discover_jax.types import Program

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
    with np.errstate(over="ignore"):  # an infinite ratio is a finding to report, not a reason to fail here
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
    return {key: float(value) for key, value in metrics.items()}


def _norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves together."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.float32(0)))


def _chosen(batches: Sequence[Batch]) -> int:
    return sum(int(np.count_nonzero(batch.mask_BT)) for batch in batches)


class Update:
    """The jitted update of one model with one optimiser and one loss. It holds compiled programs but no state of training.

    Args:
      model: a `discover_jax.models.gpt_oss.Model`.
      optimizer: an optax optimiser, e.g. `train_state.adam()`.
      loss: a name in LOSSES.
      reduction: a name in REDUCTIONS.
      temperature: of the sampler; log-probabilities are those of the distribution that was sampled from.
      chunk_tokens: places of a microbatch whose logits exist at once.

    Raises:
      ConfigError: an unknown name, or a number that is not above 0.
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        *,
        loss: str = "importance_sampling",
        reduction: str = "sum",
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
    ):
        if not temperature > 0:
            raise ConfigError(
                f"temperature = {temperature!r} cannot be used by the update; it must be above 0, and equal to the sampler's."
            )
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens = {chunk_tokens!r} cannot be used; it must be at least 1.")
        token_loss = LOSSES[loss]
        self._weights = REDUCTIONS[reduction]
        self._mesh = model.mesh

        def forward(lora: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Statistics]:
            logprobs_BT, entropy_BT = token_logprobs(model, frozen, lora, batch, temperature=temperature, chunk_tokens=chunk_tokens)
            return logprobs_BT, jax.lax.stop_gradient(_statistics(logprobs_BT, entropy_BT, batch))

        def weighted_loss(lora: Any, frozen: Any, batch: Batch, weights_BT: jax.Array) -> tuple[jax.Array, Statistics]:
            logprobs_BT, statistics = forward(lora, frozen, batch)
            # Where masked the ratio is set to 1 before the loss, so that no overflow at padding can reach a gradient.
            sampler_BT, advantages_BT = jnp.asarray(batch.sampler_logprobs_BT), jnp.asarray(batch.advantages_BT)
            losses_BT = token_loss(jnp.where(batch.mask_BT, logprobs_BT, sampler_BT), sampler_BT, advantages_BT)
            return jnp.sum(weights_BT * losses_BT), statistics

        def accumulate(gradient: Any, lora: Any, frozen: Any, batch: Batch, weights_BT: jax.Array) -> tuple[Any, Statistics]:
            (value, statistics), new = jax.value_and_grad(weighted_loss, has_aux=True)(lora, frozen, batch, weights_BT)
            return jax.tree.map(jnp.add, gradient, new), statistics | {"loss": value}

        def apply(state: TrainState, gradient: Any) -> TrainState:
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.lora)
            return TrainState(optax.apply_updates(state.lora, changes), opt_state, state.step + 1)

        # Without a mesh the leaves are None, which leaves layouts free; with one, results must come back exactly as they went in, or
        # every program would be compiled twice.
        state = abstract_train_state(model.abstract_lora(), optimizer)
        layouts = jax.tree.map(lambda leaf: leaf.sharding, state)
        self._accumulate = jax.jit(accumulate, donate_argnums=0, out_shardings=(layouts.lora, None))
        self._apply = jax.jit(apply, donate_argnums=0, out_shardings=layouts)
        self._norm = jax.jit(_norm)
        self._forward = jax.jit(lambda lora, frozen, batch: forward(lora, frozen, batch)[1])

    def _place(self, arrays: Any) -> Any:
        """Arrays [B, T] with their rows spread over the mesh's data axis, if there is a mesh."""
        mesh = self._mesh
        if mesh is None:
            return arrays
        return jax.tree.map(lambda x_BT: jax.device_put(x_BT, sharding_for(("batch", "positions"), x_BT.shape, mesh)), arrays)

    def gradient(self, frozen: Any, lora: Any, batches: Sequence[Batch]) -> tuple[Any, dict[str, float]]:
        """Gradient of the reduced loss in `lora`, and the metrics of `update` but for `update/skipped`; needs a chosen token."""
        gradient = jax.tree.map(jnp.zeros_like, lora)
        statistics = []
        for batch, weights_BT in zip(batches, self._weights(batches), strict=True):
            gradient, of_batch = self._accumulate(gradient, lora, frozen, *self._place((batch, weights_BT)))
            statistics.append(of_batch)
        norm, statistics = jax.device_get((self._norm(gradient), statistics))
        return gradient, _metrics(statistics) | {"grad_norm": float(norm)}

    def update(self, frozen: Any, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, dict[str, float]]:
        """One optimiser step on all batches together. The buffers of `state` are donated: use only the returned one afterwards.

        Args:
          frozen: base weights.
          state: adapter and optimiser before the step.
          batches: from `pack`, all of one shape; none (every group constant) leaves the state as it is.

        Returns:
          The new state, and host floats measured on the weights before the step, over chosen tokens: `loss`, `logprob_gap/mean` and `/max`
          (|trainer - sampler|, nats), `ratio/min` and `/max` (trainer / sampler), `entropy` (nats a token), `grad_norm` (before any
          clipping), `tokens`, `update/skipped`. A skipped update has only `tokens` = 0 and `update/skipped` = 1, and `state` stays valid.

        Raises:
          LearningError: loss or gradient is not finite; `state` is untouched and still valid.
          ShardingError: the rows of a batch do not divide by the mesh's data axis.
        """
        if _chosen(batches) == 0:
            return state, {"tokens": 0.0, "update/skipped": 1.0}
        gradient, metrics = self.gradient(frozen, state.lora, batches)
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            raise LearningError(
                f"The gradient of optimiser step {int(state.step)} is not finite: loss {metrics['loss']}, norm {metrics['grad_norm']},"
                f" ratios {metrics['ratio/min']} to {metrics['ratio/max']}, log-probability gap at most {metrics['logprob_gap/max']}."
                " Nothing was changed. Ratios far from 1 mean that sampler and trainer disagree; otherwise look for rewards or weights"
                " out of scale."
            )
        return self._apply(state, gradient), metrics | {"update/skipped": 0.0}

    def measure(self, frozen: Any, lora: Any, batches: Sequence[Batch]) -> dict[str, float]:
        """The log-probability gap, ratios, entropy and tokens of `update`, without gradient or change; empty if no token was chosen.

        For rollouts that take part in no update: those of constant groups, or of a search without training. `lora` may be None.
        """
        if _chosen(batches) == 0:
            return {}
        return _metrics(jax.device_get([self._forward(lora, frozen, self._place(batch)) for batch in batches]))

    def programs(self, frozen: Any, state: TrainState, rows: int, row_tokens: int) -> Iterator[Program]:
        """The programs of `update` for microbatches of that shape, to be compiled without being run.

        Args:
          frozen, state: abstract, laid out as the real ones will be.
          rows, row_tokens: of a microbatch.

        Raises:
          ShardingError: the rows do not divide by the mesh's data axis.
        """
        batch, weights_BT = self._abstract_batch(rows, row_tokens)
        live = {"gradient": state.lora}
        yield Program("gradient", self._accumulate.lower(state.lora, state.lora, frozen, batch, weights_BT), live)
        yield Program("apply", self._apply.lower(state, state.lora), live)

    def measuring_programs(self, frozen: Any, lora: Any, rows: int, row_tokens: int) -> Iterator[Program]:
        """The one program of `measure`; see `programs`. `lora` may be None."""
        yield Program("measure", self._forward.lower(lora, frozen, self._abstract_batch(rows, row_tokens)[0]), {})

    def _abstract_batch(self, rows: int, row_tokens: int) -> tuple[Batch, jax.ShapeDtypeStruct]:
        """A microbatch and its weights, laid out as `_place` does."""
        sharding = None if self._mesh is None else sharding_for(("batch", "positions"), (rows, row_tokens), self._mesh)

        def struct(dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, row_tokens), dtype, sharding=sharding)

        return jax.tree.map(lambda x_BT: struct(x_BT.dtype), empty_batch(1, 1)), struct(jnp.float32)
