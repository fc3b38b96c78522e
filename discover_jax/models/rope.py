"""Rotary position embeddings with YaRN's interpolation, as in gpt-oss (YaRN, arXiv 2309.00071, section 3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.models.config import ModelConfig


def yarn_ramp(config: ModelConfig) -> tuple[float, float]:
    """Bounds (low, high) of YaRN's ramp, as indices of a head's H/2 frequencies.

    Frequencies below `low` are kept; those above `high` are divided by `rope_factor`.
    """

    def index_of(rotations: float) -> float:
        # Index of the frequency that makes this many rotations over the original context.
        ratio = config.rope_original_length / (rotations * 2 * math.pi)
        return config.head_size * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = index_of(config.rope_beta_fast), index_of(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0.0), min(high, config.head_size - 1.0)


def yarn_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position, float32 [H/2], and the factor of cosines and sines (YaRN's attention temperature: 0.1 ln(rope_factor) + 1)."""
    pairs = np.arange(config.head_size // 2)
    low, high = yarn_ramp(config)
    period = config.rope_theta ** (2 * pairs / config.head_size)
    keep = 1.0 - np.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequencies = (1.0 - keep) / (config.rope_factor * period) + keep / period
    return frequencies.astype(np.float32), 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_factor > 1 else 1.0


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates the two halves of each head by the angles of its position (NeoX convention). Angles and arithmetic are in float32."""
    frequencies, factor = yarn_frequencies(config)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
