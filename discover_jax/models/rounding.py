"""Compiler options that make the sampler and the update round alike."""

EXACT_ROUNDING = {"xla_allow_excess_precision": False}
"""`compiler_options` of jax.jit. By default, XLA may skip rounding to bfloat16 if the next operation takes float32. Whether it does depends
on fusion, so that two executables of one model could give different results."""
