"""How programs of the model must be compiled, so that sampler and update round alike."""

EXACT_ROUNDING = {"xla_allow_excess_precision": False}
"""`compiler_options` of jax.jit. By default XLA may leave out the rounding of a sum to bfloat16 where the next operation takes float32
anyway; whether it does depends on what it fuses, so two programs of one model would differ wherever one rounds and the other does not."""
