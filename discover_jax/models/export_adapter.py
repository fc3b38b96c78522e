"""The old name of the command `python -m discover_jax.export_adapter`; it still works."""

import runpy

if __name__ == "__main__":
    runpy.run_module("discover_jax.export_adapter", run_name="__main__")
