"""Runs the scripts `interpreted_*.py`, which call Triton kernels in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_interpreter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "torch")), reason="needs triton and torch (extra `parity`)"
)


def results_of(script: str, *options: str) -> list[Any]:
    """The lines that a script of this folder prints, as values of JSON. It must end without an error."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, Path(__file__).with_name(script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
