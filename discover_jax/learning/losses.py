"""Policy-gradient losses per token, and reductions of token losses to the loss of an optimiser step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.exceptions import ConfigError
from discover_jax.learning.packing import Batch
from discover_jax.learning.tables import Table


@dataclasses.dataclass(frozen=True)
class RatioLimits:
    """Limits of a token's ratio rho = p_theta / p_sampler, for the losses that limit it.

    Attributes:
      clip_low, clip_high: `ppo` clips the ratio to [1 - clip_low, 1 + clip_high].
      truncate: largest ratio in `truncated_importance_sampling`.

    Raises:
      ConfigError: a number is out of range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    truncate: float = 2.0

    def __post_init__(self) -> None:
        for name, highest in (("clip_low", 1.0), ("clip_high", math.inf), ("truncate", math.inf)):
            value = getattr(self, name)
            if not 0 < value <= highest or math.isinf(value):
                allowed = "finite and above 0" if math.isinf(highest) else f"above 0 and at most {highest:g}"
                raise ConfigError(f"{name} must be {allowed}; got {value!r}.")


DEFAULT_LIMITS = RatioLimits()


class TokenLoss(Protocol):
    """(logp_theta, logp_sampler, advantage), float32 of one shape -> loss of each token, same shape.

    Every loss takes `limits`, so that all have the same signature. Changes of a token's advantage, such as the KL penalty, are applied
    beforehand.
    """

    def __call__(
        self, logp_theta: jax.Array, logp_sampler: jax.Array, advantage: jax.Array, limits: RatioLimits = DEFAULT_LIMITS
    ) -> jax.Array: ...


def importance_sampling(
    logp_theta: jax.Array, logp_sampler: jax.Array, advantage: jax.Array, limits: RatioLimits = DEFAULT_LIMITS
) -> jax.Array:
    """-exp(logp_theta - logp_sampler) A, unclipped: an unbiased policy gradient for tokens that another version of the policy sampled."""
    del limits
    return -jnp.exp(logp_theta - logp_sampler) * advantage


def truncated_importance_sampling(
    logp_theta: jax.Array, logp_sampler: jax.Array, advantage: jax.Array, limits: RatioLimits = DEFAULT_LIMITS
) -> jax.Array:
    """-min(rho, c) A logp_theta, with the truncated ratio as a constant. Its gradient is -min(rho, c) A grad logp_theta.

    A token with a ratio above c = `limits.truncate` keeps a gradient, with weight c. Below c the gradient is that of `importance_sampling`.
    This is the truncation of importance weights (Ionides 2008) as applied to policy gradients in V-trace (arXiv 1802.01561) and CISPO
    (arXiv 2506.13585). Truncating rho in -rho A instead would remove the token's gradient. Only the gradient of this loss is meaningful,
    not its value.
    """
    weight = jnp.minimum(jnp.exp(logp_theta - logp_sampler), limits.truncate)
    return -jax.lax.stop_gradient(weight) * advantage * logp_theta


def ppo(logp_theta: jax.Array, logp_sampler: jax.Array, advantage: jax.Array, limits: RatioLimits = DEFAULT_LIMITS) -> jax.Array:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (Schulman et al., arXiv 1707.06347, equation 7)."""
    # Choose the smaller branch in log space, so that a ratio that overflows leaves no NaN in the gradient if the clipped branch applies.
    gap = logp_theta - logp_sampler
    limited = jnp.where(advantage > 0, jnp.minimum(gap, jnp.log1p(limits.clip_high)), jnp.maximum(gap, jnp.log1p(-limits.clip_low)))
    return -jnp.exp(limited) * advantage


def reinforce(logp_theta: jax.Array, logp_sampler: jax.Array, advantage: jax.Array, limits: RatioLimits = DEFAULT_LIMITS) -> jax.Array:
    """-A logp_theta (report, section 4.3): treats the tokens as on-policy. Its gradient is that of `importance_sampling` with ratio 1."""
    del logp_sampler, limits
    return -advantage * logp_theta


LOSSES: Table[TokenLoss] = Table(
    "loss",
    {
        "importance_sampling": importance_sampling,
        "truncated_importance_sampling": truncated_importance_sampling,
        "ppo": ppo,
        "reinforce": reinforce,
    },
)


def _truncated(ratio: jax.Array, advantage: jax.Array, limits: RatioLimits) -> jax.Array:
    del advantage
    return ratio > limits.truncate


def _clipped(ratio: jax.Array, advantage: jax.Array, limits: RatioLimits) -> jax.Array:
    """Whether the clipped branch is the smaller one, so that the token has no gradient."""
    return jnp.where(advantage > 0, ratio > 1.0 + limits.clip_high, (ratio < 1.0 - limits.clip_low) & (advantage < 0))


LIMITED: dict[str, Callable[[jax.Array, jax.Array, RatioLimits], jax.Array]] = {
    "truncated_importance_sampling": _truncated,
    "ppo": _clipped,
}
"""For the losses that limit ratios: (ratio, advantage, limits) -> bool, whether the limit acts on a token."""


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How the losses of tokens combine into the loss of an optimiser step: their weighted sum.

    The host computes the weights. They depend on the rollouts, but not on packing or the number of microbatches.

    Attributes:
      units: number that the sum over these batches is divided by; 0 if it is not divided. The units of parts add up to those of the whole.
      divided: (batch, divisor) -> weights_BT of its tokens, 0 where masked.
    """

    units: Callable[[Sequence[Batch]], int]
    divided: Callable[[Batch, int], np.ndarray]

    def __call__(self, batches: Sequence[Batch], units: int | None = None) -> list[np.ndarray]:
        """weights_BT of each batch, float32. `units`: of the optimiser step; by default, the batches are all that it has."""
        divisor = max(self.units(batches) if units is None else units, 1)
        return [self.divided(batch, divisor).astype(np.float32) for batch in batches]


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(batch.mask_BT.sum()) for batch in batches)


def _tokens_of_segments(batch: Batch) -> list[np.ndarray]:
    """Number of chosen tokens of each segment of each row; segment 0 is padding."""
    each = zip(batch.mask_BT, batch.segments_BT, strict=True)
    return [np.bincount(segments_T[mask_T], minlength=segments_T.max() + 1) for mask_T, segments_T in each]


def _rollouts(batches: Sequence[Batch]) -> int:
    return sum(int(np.count_nonzero(tokens_S)) for batch in batches for tokens_S in _tokens_of_segments(batch))


def _each_rollout(batch: Batch, divisor: int) -> np.ndarray:
    each = zip(_tokens_of_segments(batch), batch.segments_BT, strict=True)
    tokens_BT = np.stack([np.maximum(tokens_S, 1)[segments_T] for tokens_S, segments_T in each])
    return batch.mask_BT / (tokens_BT * divisor)


REDUCTIONS: Table[Reduction] = Table(
    "reduction",
    {
        # Weight 1 for every chosen token, so long rollouts and large batches weigh more (as in the reference code).
        "sum": Reduction(lambda batches: 0, lambda batch, divisor: batch.mask_BT),
        # Mean over all chosen tokens.
        "token_mean": Reduction(_tokens, lambda batch, divisor: batch.mask_BT / divisor),
        # Mean over rollouts of the mean over each rollout's chosen tokens, so that all rollouts weigh the same.
        "sequence_mean": Reduction(_rollouts, _each_rollout),
    },
)
