"""Policy-gradient losses of single tokens, and reductions of token losses to the loss of a batch."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.learning.packing import Batch
from discover_jax.learning.tables import Table

TokenLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logp_theta, logp_sampler, advantage), all of one shape, float32 -> loss of each token, same shape.

Whatever reshapes the advantage of a token (a KL penalty, say) is done before, so losses need not know of it.
"""


def importance_sampling(logp_theta: jax.Array, logp_sampler: jax.Array, advantage: jax.Array) -> jax.Array:
    """-exp(logp_theta - logp_sampler) A, unclipped: an unbiased policy gradient for tokens that another version of the policy drew."""
    return -jnp.exp(logp_theta - logp_sampler) * advantage


LOSSES: Table[TokenLoss] = Table("loss", {"importance_sampling": importance_sampling})


def _sum(batches: Sequence[Batch]) -> list[np.ndarray]:
    """Weight 1 for every chosen token: long rollouts and large batches weigh more (the reference's behaviour)."""
    return [batch.mask_BT.astype(np.float32) for batch in batches]


def _token_mean(batches: Sequence[Batch]) -> list[np.ndarray]:
    """Mean over all chosen tokens of all batches."""
    tokens = sum(int(batch.mask_BT.sum()) for batch in batches)
    return [(batch.mask_BT / max(tokens, 1)).astype(np.float32) for batch in batches]


def _sequence_mean(batches: Sequence[Batch]) -> list[np.ndarray]:
    """Mean over rollouts of the mean over each rollout's chosen tokens, so that length does not count."""
    tokens_of_segment_BT, rollouts = [], 0
    for batch in batches:
        tokens_BT = np.ones(batch.mask_BT.shape)
        for row, (mask_T, segments_T) in enumerate(zip(batch.mask_BT, batch.segments_BT, strict=True)):
            tokens_of_segment = np.bincount(segments_T[mask_T], minlength=segments_T.max() + 1)
            rollouts += np.count_nonzero(tokens_of_segment)
            tokens_BT[row] = np.maximum(tokens_of_segment, 1)[segments_T]
        tokens_of_segment_BT.append(tokens_BT)
    return [
        (batch.mask_BT / (tokens_BT * max(rollouts, 1))).astype(np.float32)
        for batch, tokens_BT in zip(batches, tokens_of_segment_BT, strict=True)
    ]


Reduction = Callable[[Sequence[Batch]], list[np.ndarray]]
"""All batches of one optimiser step -> for each the float32 weights_BT of its token losses, 0 where masked; the loss is the weighted sum.

Weights come from all batches at once, on the host, so that neither packing nor the number of microbatches can change the result.
"""

REDUCTIONS: Table[Reduction] = Table("reduction", {"sum": _sum, "token_mean": _token_mean, "sequence_mean": _sequence_mean})
