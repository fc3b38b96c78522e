"""The benchmark of decoding steps refuses arguments that cannot be measured before it loads or compiles anything."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark_module():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("sampling_benchmark", BENCHMARKS / "sampling.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def _problem(module, new=128, fuse="", separate_routing=False):
    return module.problem_of_steps(argparse.Namespace(new=new, fuse=fuse, separate_routing=separate_routing))


@pytest.mark.parametrize("new", [1, 32, 64, 65, 66, 96, 256])
def test_too_few_tokens_are_refused_with_the_number_that_is_needed(benchmark_module, new):
    """Launches end after multiples of 32 tokens. Two of them must end while every rollout is live."""
    measured = [tokens for tokens in range(32, new + 1, 32) if tokens < 0.98 * new]
    said = _problem(benchmark_module, new)
    assert bool(said) == (len(measured) < 2)
    assert not said or (f"--new={new} " in said and "Use --new=66 " in said)


def test_sets_of_fusions_are_checked(benchmark_module):
    pytest.importorskip("triton", reason="needs triton (extra `parity` or `kernels`)")
    assert not _problem(benchmark_module, fuse="norm,rotation,router;norm;")
    for fuse in ("adapter", "norm;norm,heads", "norm, router"):
        said = _problem(benchmark_module, fuse=fuse)
        assert f"--fuse={fuse}" in said
        assert "allowed: norm, rotation, router" in said
    assert "--separate_routing" in _problem(benchmark_module, fuse="norm", separate_routing=True)


def test_the_command_ends_before_anything_is_loaded():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "sampling.py"), "steps", "--shape=gpt-oss-120b", "--new=64", "--profile"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Use --new=66 or more." in done.stderr
    assert not done.stdout
