"""The KL penalty to the base model, as a part of each token's advantage."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from discover_jax.exceptions import LearningError
from discover_jax.learning.packing import Batch


def shape_advantages(batches: Sequence[Batch], gaps: Sequence[np.ndarray], coefficient: float) -> tuple[list[Batch], float]:
    """A_t += lambda (mean(d) - d_t) with d_t = logp_sampler - logp_base, the mean over all chosen tokens of all batches (reference code).

    Computed in float64 on the host from all batches of a step at once, so that neither packing nor microbatches can change it.

    Args:
      batches: those of all substeps, which share the mean.
      gaps: d_BT of each batch; values at masked places are ignored.
      coefficient: lambda; 0 leaves the batches unchanged.

    Returns:
      The batches with new advantages, still 0 where masked; and mean(d), which estimates KL(sampler || base) in nats a token (0 without
      tokens).

    Raises:
      LearningError: a d_t is not finite.
    """
    chosen = np.concatenate([np.asarray(gap_BT)[batch.mask_BT] for batch, gap_BT in zip(batches, gaps, strict=True)] or [np.zeros(0)])
    if not np.isfinite(chosen).all():
        raise LearningError(
            f"{np.count_nonzero(~np.isfinite(chosen))} of {chosen.size} tokens have no finite difference between the log-probabilities of"
            " sampler and base model: the base gives them probability 0 or NaN. Check the weights, or turn the KL off: set"
            " config.train.kl_coefficient to 0 and config.train.measure_kl to False."
        )
    mean = float(chosen.mean(dtype=np.float64)) if chosen.size else 0.0
    if coefficient == 0.0:
        return list(batches), mean
    shaped = []
    for batch, gap_BT in zip(batches, gaps, strict=True):
        penalty_BT = np.where(batch.mask_BT, coefficient * (mean - np.asarray(gap_BT, np.float64)), 0.0)
        shaped.append(dataclasses.replace(batch, advantages_BT=(batch.advantages_BT + penalty_BT).astype(np.float32)))
    return shaped, mean
