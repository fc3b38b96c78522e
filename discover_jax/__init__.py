"""discover_jax: test-time training of language models on one hard problem, in JAX."""

__version__ = "0.1.0"
