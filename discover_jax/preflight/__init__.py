"""Checks of all hosts of a run before it starts: `python -m discover_jax.doctor --distributed ...` (see `all_hosts`)."""
