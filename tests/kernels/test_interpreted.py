"""The kernels of prompts and of routing in Triton's interpreter. Their own files run more cases, as slow tests."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDING = {"float32": 1e-5, "bfloat16": 1.2e-2}


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "torch")), reason="needs triton and torch (extra `parity`)"
)
def test_few_cases_of_prompts_and_routing():
    script = Path(__file__).with_name("interpreted_few.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors, same = map(json.loads, done.stdout.splitlines()[-2:])
    assert len(errors) == 5
    for name, error in errors.items():
        assert error < ROUNDING["bfloat16" if "bfloat16" in name else "float32"], name  # false for NaN
    assert len(same) == 4
    assert all(same.values()), same
