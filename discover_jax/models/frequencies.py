"""Frequencies of rotary position embeddings: plain, with Llama 3's scaling, and with YaRN's interpolation (arXiv 2309.00071, section 3).

Needs no jax, so that commands that only convert files start fast.
"""

import math

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
    keep = 1.0 - np.clip((pairs - low) / ((high - low) or 1e-3), 0.0, 1.0)  # high is below low if the original context is tiny
    frequencies = (1.0 - keep) / (config.rope_factor * period) + keep / period
    return frequencies.astype(np.float32), 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_factor > 1 else 1.0


def plain_frequencies(head_size: int, theta: float) -> np.ndarray:
    """Radians per position, float64 [H/2] (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return theta ** (-2.0 * np.arange(head_size // 2) / head_size)


def scale_llama3(frequencies: np.ndarray, *, factor: float, length: float, low: float, high: float) -> np.ndarray:
    """Frequencies scaled as in Llama 3.1 (`rope_type` "llama3" of transformers).

    A frequency with fewer than `low` rotations over the original length is divided by `factor`, one with more than `high` is kept, and
    those in between are interpolated.
    """
    keep = np.clip((length * frequencies / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return (1.0 - keep) * frequencies / factor + keep * frequencies


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position, float32 [H/2], and the factor of cosines and sines."""
    if config.rope_kind == "yarn":
        return yarn_frequencies(config)
    frequencies = plain_frequencies(config.head_size, config.rope_theta)
    if config.rope_kind == "llama3":
        length, low, high = config.rope_original_length, config.rope_low_factor, config.rope_high_factor
        frequencies = scale_llama3(frequencies, factor=config.rope_factor, length=length, low=low, high=high)
    return frequencies.astype(np.float32), 1.0
