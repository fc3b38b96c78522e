"""Rotary position embeddings."""

import jax
import jax.numpy as jnp

from discover_jax.models.config import ModelConfig
from discover_jax.models.frequencies import rope_frequencies


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates the two halves of each head by the angles of its position (NeoX convention). Angles and arithmetic are in float32."""
    frequencies, factor = rope_frequencies(config)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
