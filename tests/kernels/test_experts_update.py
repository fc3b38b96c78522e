"""The experts' kernels of the update: in Triton's interpreter, they match the reference's output and derivatives for any routing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # run it after changing the kernels
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("triton", "torch")), reason="needs triton and torch")
@pytest.mark.parametrize("options", [[], ["--all"]])
def test_interpreted_kernels_match_the_reference_derivatives(options):
    script = Path(__file__).with_name("interpreted_experts_update.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == (4 if options else 2)
    for case, errors in found.items():
        assert errors.pop("unpacked") == 0.0
        assert errors.pop("unpacked gates and ups") == 0.0
        assert len(errors) == (3 if "no adapter" in case else 7)
        assert 0 < max(errors.values()) < (0.02 if case == "bfloat16" else 1e-5), (case, errors)
