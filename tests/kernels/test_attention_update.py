"""The update's attention: in Triton's interpreter, its kernels match the reference's outputs and gradients for any packing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("triton", "torch")), reason="needs triton and torch")
@pytest.mark.parametrize("options", [[], pytest.param(["--all"], marks=pytest.mark.slow)])
def test_interpreted_kernels_match_the_reference_gradients(options):
    script = Path(__file__).with_name("interpreted_attention_update.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == (10 if options else 5)
    for case, errors in found.items():
        assert set(errors) == {"output", "q", "k", "v"}
        assert 0 < max(errors.values()) < (0.02 if case == "bfloat16" else 1e-5), (case, errors)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_last_query_that_sees_a_key():
    from discover_jax.kernels.attention_update import last_seeing

    first = np.array([[0, 0, 1, 3, 3, 5], [0, 1, 2, 3, 4, 5]], np.int32)
    seen = (np.arange(6)[:, None] >= first[..., None].swapaxes(1, 2)) & (np.arange(6)[:, None] <= np.arange(6))
    expected = [[max(q for q in range(6) if row[key, q]) for key in range(6)] for row in seen]
    np.testing.assert_array_equal(last_seeing(jnp.asarray(first)), expected)
