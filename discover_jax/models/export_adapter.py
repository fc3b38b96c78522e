"""Alias of the command `python -m discover_jax.export_adapter`, kept for users of its old name."""

import runpy

if __name__ == "__main__":
    runpy.run_module("discover_jax.export_adapter", run_name="__main__")
