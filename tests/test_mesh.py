"""Logits, sampled tokens, update and checkpoint agree on all meshes. Impossible meshes are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = Path(__file__).with_name("mesh_program.py")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "meshes"), [("gpt_oss", 7), ("qwen2", 5), ("llama", 5)])
def test_meshes_of_eight_devices_match_one_device(tmp_path, family, meshes):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), str(tmp_path), family], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("agrees") == meshes
