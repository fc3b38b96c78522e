"""Log-probabilities and entropies of the policy at packed tokens, without all logits in memory at the same time.

With a vocabulary of 201,088, a row of 26k tokens has 21 GB of float32 logits. Therefore tokens are scanned in chunks, and the backward
pass recomputes each chunk's logits.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from discover_jax.kernels.spread import rows_axes
from discover_jax.learning.packing import Batch
from discover_jax.models.decoder import Model


def token_logprobs(model: Model, frozen: Any, lora: Any, batch: Batch, *, chunk_tokens: int) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the entropy of p at every position, where p = softmax(logits / temperature) as in sampling.

    The log-probabilities are differentiable in `lora`; the entropies have no gradient.

    Args:
      frozen, lora: parameters of `model`.
      batch: packed rollouts, arrays [B, T].
      chunk_tokens: positions whose logits are in a device's memory at the same time, over all its rows; at least one position of each row.

    Returns:
      logprobs_BT, entropy_BT: float32, in nats; undefined at padding.
    """
    routes_BTLX = None if batch.routes_BTLX is None else jnp.asarray(batch.routes_BTLX)
    tokens_BT, positions_BT, segments_BT = map(jnp.asarray, (batch.tokens_BT, batch.positions_BT, batch.segments_BT))
    hidden_BTD = model.hidden(frozen, lora, tokens_BT, positions_BT, segments_BT, routes_BTLX)
    rows, length = batch.tokens_BT.shape
    spread = 1 if model.mesh is None else math.prod(model.mesh.shape[axis] for axis in rows_axes(rows, model.mesh))
    # Chunks split T and keep all rows, so that rows stay spread over the mesh.
    chunks = -(-length // max(1, chunk_tokens * spread // rows))
    chunk = -(-length // chunks)  # equal lengths, so that the last chunk is not mostly padding

    def split(x_BT: jax.Array) -> jax.Array:
        # Pad with the values of the last position instead of zeros, because a temperature must not be 0.
        padded = jnp.pad(x_BT, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (x_BT.ndim - 2), mode="edge")
        return jnp.moveaxis(padded.reshape(rows, chunks, chunk, *x_BT.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(places: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BtD, targets_Bt, temperatures_Bt = places
        scaled_BtV = model.logits(frozen, lora, hidden_BtD).astype(jnp.float32) / temperatures_Bt[..., None]
        log_total_Bt = jax.nn.logsumexp(scaled_BtV, axis=-1)
        logprobs_Bt = jnp.take_along_axis(scaled_BtV, targets_Bt[..., None], axis=-1)[..., 0] - log_total_Bt
        constant_BtV, constant_Bt = jax.lax.stop_gradient((scaled_BtV, log_total_Bt))
        entropy_Bt = constant_Bt - jnp.sum(jnp.exp(constant_BtV - constant_Bt[..., None]) * constant_BtV, axis=-1)
        return logprobs_Bt, entropy_Bt

    def join(x_CBt: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_CBt, 0, 1).reshape(rows, chunks * chunk)[:, :length]

    places = split(hidden_BTD), split(jnp.asarray(batch.targets_BT)), split(jnp.asarray(batch.temperatures_BT))
    logprobs_CBt, entropy_CBt = jax.lax.map(of_chunk, places)
    return join(logprobs_CBt), join(entropy_CBt)
