"""Runs a program that compiles kernels for TPUs without one. It needs libtpu."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `tpu`)")
of_all_chips = pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])


def compiled(program: str, *arguments: str, seconds: float) -> str:
    """What a program of this folder prints. It must end without an error within `seconds`."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["TPU_SKIP_MDS_QUERY"] = "1"  # the query would not return without a TPU
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # otherwise tests that run at the same time fail
    command = [sys.executable, Path(__file__).parent / program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return done.stdout
