"""The attention heads of the models that the benchmarks of attention's kernels measure."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and their size. Models without sinks pass sinks of -1e30."""

    heads: int
    kv_heads: int
    size: int
    sinks: bool = False

    def draw_sinks(self, key: jax.Array, dtype: Any) -> jax.Array:
        return jax.random.normal(key, (self.heads,), dtype) if self.sinks else jnp.full(self.heads, -1e30, dtype)


SHAPES = {
    "gpt-oss-120b": Heads(64, 8, 64, sinks=True),
    "qwen2.5-0.5b": Heads(14, 2, 64),
    "qwen2.5-1.5b": Heads(12, 2, 128),
    "qwen2.5-7b": Heads(28, 4, 128),
    "llama-3.1-8b": Heads(32, 8, 128),
}
