"""Rotary position embeddings."""

import jax
import jax.numpy as jnp

from discover_jax.models.config import ModelConfig
from discover_jax.models.frequencies import rope_frequencies


def turns_of(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles of these positions, float32 [..., H/2], with YaRN's factor."""
    frequencies, factor = rope_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates the two halves of each head by the angles of its position (NeoX convention). Angles and arithmetic are in float32."""
    cos, sin = (turn[..., None, :] for turn in turns_of(positions_BT, config))
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
