"""Drawing tokens: which one, and how likely it was. The draw of a token depends on (seed, step, group, index, t) alone."""

import jax
import jax.numpy as jnp


def rollout_keys(seed: jax.Array, step: jax.Array, groups_B: jax.Array, indices_B: jax.Array) -> jax.Array:
    """One key a row, folded from seed, step, group and index, so that a resumed run draws what the unbroken run would have drawn."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda group, index: jax.random.fold_in(jax.random.fold_in(base, group), index))(groups_B, indices_B)


def draw_tokens(keys_B: jax.Array, counts_B: jax.Array, logits_BV: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """A token a row from softmax(logits / temperature), and its log-probability under that distribution.

    Args:
      keys_B: of the rollouts.
      counts_B: int32, tokens that each rollout has so far.
      logits_BV: float32.
      temperature: above 0.

    Returns:
      int32 tokens [B] and float32 log-probabilities [B].
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32) / temperature, axis=-1)
    tokens_B = jax.vmap(lambda key, count, row: jax.random.categorical(jax.random.fold_in(key, count), row))(keys_B, counts_B, logprobs_BV)
    tokens_B = tokens_B.astype(jnp.int32)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]
