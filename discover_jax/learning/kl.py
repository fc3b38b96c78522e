"""The KL penalty to the base model, added to each token's advantage."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from discover_jax.exceptions import LearningError
from discover_jax.learning.packing import Batch


def mean_gap(gaps: Sequence[np.ndarray]) -> float:
    """The mean d_t of chosen tokens, in float64; 0 if there are none.

    Raises:
      LearningError: a d_t is not finite.
    """
    chosen = np.concatenate([*gaps, np.zeros(0, np.float32)])
    if not np.isfinite(chosen).all():
        raise LearningError(
            f"The log-probabilities of sampler and base model have no finite difference for {np.count_nonzero(~np.isfinite(chosen))} of"
            f" {chosen.size} tokens: the base model gives them probability 0 or NaN. Check the weights, or turn the KL off: set"
            " config.train.kl_coefficient to 0 and config.train.measure_kl to False."
        )
    return float(chosen.mean(dtype=np.float64)) if chosen.size else 0.0


def shape_advantages(batches: Sequence[Batch], gaps: Sequence[np.ndarray], coefficient: float) -> tuple[list[Batch], float]:
    """A_t += lambda (mean(d) - d_t), d_t = logp_sampler - logp_base, with the mean over all chosen tokens of all batches (reference code).

    Computed in float64 on the host from all batches of a step together, so packing and microbatches do not change the result.

    Args:
      batches: the batches of all substeps; they share the mean.
      gaps: d_BT of each batch; values at masked positions are ignored.
      coefficient: lambda; 0 leaves the batches unchanged.

    Returns:
      The batches with new advantages, still 0 where masked; and mean(d), an estimate of KL(sampler || base) in nats per token (0 if there
      are no chosen tokens).

    Raises:
      LearningError: a d_t is not finite.
    """
    mean = mean_gap([np.asarray(gap_BT)[batch.mask_BT] for batch, gap_BT in zip(batches, gaps, strict=True)])
    if coefficient == 0.0:
        return list(batches), mean
    shaped = []
    for batch, gap_BT in zip(batches, gaps, strict=True):
        penalty_BT = np.where(batch.mask_BT, coefficient * (mean - np.asarray(gap_BT, np.float64)), 0.0)
        shaped.append(dataclasses.replace(batch, advantages_BT=(batch.advantages_BT + penalty_BT).astype(np.float32)))
    return shaped, mean
