"""What the update differentiates and measures on one microbatch: the weighted loss, its statistics, and the gap to the base model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.learning.logprobs import token_logprobs
from discover_jax.learning.losses import RatioLimits
from discover_jax.learning.packing import Batch
from discover_jax.learning.statistics import Statistics, token_statistics
from discover_jax.models.decoder import Model


@dataclasses.dataclass(frozen=True)
class Objective:
    """Pure functions of one microbatch.

    Attributes:
      loss: the loss of each token, one of losses.LOSSES.
      limited: whether a limit of the loss acts on a token, one of losses.LIMITED; None: the loss has no limits.
      limits: of `loss` and `limited`.
      chunk_tokens: see `logprobs.token_logprobs`.
    """

    model: Model
    loss: Callable[..., jax.Array]
    limited: Callable[..., jax.Array] | None
    limits: RatioLimits
    chunk_tokens: int

    def measure(self, lora: Any, frozen: Any, batch: Batch) -> Statistics:
        """Statistics of a microbatch without a gradient; `lora` may be None."""
        return self._forward(lora, frozen, batch)[1]

    def accumulate(self, gradient: Any, lora: Any, frozen: Any, batch: Batch, weights_BT: jax.Array) -> tuple[Any, Statistics]:
        """Adds a microbatch to `gradient`, a tree like `lora`. Also returns its statistics, with `loss`, its part of the reduced loss.

        Args:
          weights_BT: float32, weights of the reduction (losses.REDUCTIONS).
        """
        (value, statistics), new = jax.value_and_grad(self._weighted_loss, has_aux=True)(lora, frozen, batch, weights_BT)
        return jax.tree.map(jnp.add, gradient, new), statistics | {"loss": value}

    def base_gap(self, frozen: Any, batch: Batch) -> jax.Array:
        """log p_sampler - log p_base of each token [B, T] in nats; 0 where the mask is False."""
        batch = dataclasses.replace(batch, routes_BTLX=None)  # the KL reference model uses its own expert routing
        base_BT, _ = token_logprobs(self.model, frozen, None, batch, chunk_tokens=self.chunk_tokens)
        return jnp.where(batch.mask_BT, batch.sampler_logprobs_BT - base_BT, 0.0)

    def _forward(self, lora: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Statistics]:
        logprobs_BT, entropy_BT = token_logprobs(self.model, frozen, lora, batch, chunk_tokens=self.chunk_tokens)
        return logprobs_BT, jax.lax.stop_gradient(token_statistics(logprobs_BT, entropy_BT, batch))

    def _weighted_loss(self, lora: Any, frozen: Any, batch: Batch, weights_BT: jax.Array) -> tuple[jax.Array, Statistics]:
        logprobs_BT, statistics = self._forward(lora, frozen, batch)
        # At masked tokens the ratio is set to 1 before the loss, so that an overflow at padding cannot reach a gradient.
        sampler_BT, advantages_BT = jnp.asarray(batch.sampler_logprobs_BT), jnp.asarray(batch.advantages_BT)
        logprobs_BT = jnp.where(batch.mask_BT, logprobs_BT, sampler_BT)
        if self.limited is not None:
            ratios_BT = jnp.exp(jax.lax.stop_gradient(logprobs_BT) - sampler_BT)
            statistics["limited"] = (batch.mask_BT & self.limited(ratios_BT, advantages_BT, self.limits)).sum(dtype=jnp.int32)
        return jnp.sum(weights_BT * self.loss(logprobs_BT, sampler_BT, advantages_BT, self.limits)), statistics
