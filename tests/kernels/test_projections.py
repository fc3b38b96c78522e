"""Projections from stacked layers: the reference against numpy, the kernels in Triton's interpreter and on a GPU, and the fallback."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from recorded_launches import record
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.fallback import note_reference, warn_reference
from discover_jax.kernels.projections import Stack, project_reference

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
LAYERS, SCALE = 3, 0.5


def _problem(rows, width, outs, rank, dtype=jnp.bfloat16, biased=True):
    rng = np.random.default_rng(rows)

    def draw(*shape):
        return jax.device_put((rng.normal(size=shape) * shape[-1] ** -0.5).astype(dtype))

    def adapter(out):
        return (draw(LAYERS, rank, width), draw(LAYERS, out, rank)) if rank else ()

    return draw(rows, width), [Stack(draw(LAYERS, out, width), draw(LAYERS, out) if biased else None, *adapter(out)) for out in outs]


@pytest.mark.parametrize(("rank", "biased"), [(0, True), (3, True), (3, False)])
def test_reference_matches_the_formula_for_each_layer(rank, biased):
    x, stacks = _problem(5, 12, (7, 4), rank, jnp.float32, biased)
    for got, stack in zip(jax.jit(project_reference)(x, stacks, jnp.int32(2), SCALE), stacks, strict=True):
        weight, bias = np.asarray(stack.weight, np.float64)[2], np.asarray(stack.bias)[2] if biased else 0
        if rank:
            weight = weight + SCALE * np.asarray(stack.lora_b, np.float64)[2] @ np.asarray(stack.lora_a, np.float64)[2]
        np.testing.assert_allclose(got, np.asarray(x, np.float64) @ weight.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # run it after changing the kernels
@needs_interpreter
def test_kernels_are_accurate_to_bfloat16_rounding():
    errors = results_of("interpreted_projections.py")[-1]
    assert len(errors) == 6
    for name, error in errors.items():
        assert error < 4e-3, name  # false for NaN, from an output that was not written


@pytest.mark.parametrize(
    ("rows", "width", "outs", "dtype", "level", "said"),
    [
        (2, 64, (32,), jnp.float32, "warning", "float32"),
        (2, 96, (32,), jnp.bfloat16, "warning", "96 inputs"),
        (2, 64, (32, 24), jnp.bfloat16, "warning", "[32, 24] outputs"),
        (2, 64, (32, 32, 32, 32), jnp.bfloat16, "warning", "4 projections"),
        (300, 64, (32,), jnp.bfloat16, "info", "300 rows"),
        (300, 64, (32,), jnp.float32, "info", "300 rows"),  # as in a long chunk of a prompt, whose adapter is float32
    ],
)
def test_unsupported_inputs_use_the_reference_and_are_logged(monkeypatch, rows, width, outs, dtype, level, said):
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    from discover_jax.kernels.projections_decode import project

    lines = []
    for one in ("info", "warning"):
        monkeypatch.setattr(logging, one, lambda text, *values, one=one: lines.append(f"{one}: {text % values}"))
    warn_reference.cache_clear()
    note_reference.cache_clear()
    x, stacks = _problem(rows, width, outs, 4, dtype)
    for got, expected in zip(*_both(project, x, stacks), strict=True):
        np.testing.assert_array_equal(got, expected)
    (line,) = lines
    assert line.startswith(f"{level}: kernel of decode_projections on gpu: reference")
    assert said in line


def _both(project, x, stacks):
    """What `project` and the reference return for layer 1."""
    return jax.jit(lambda *arguments: [function(*arguments, 1, SCALE) for function in (project, project_reference)])(x, stacks)


def test_a_large_rank_uses_the_reference_and_says_so(caplog):
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    from discover_jax.kernels.projections_decode import MOST_RANK, project

    x, stacks = _problem(2, 64, (32,), MOST_RANK + 1)
    (got,), (expected,) = _both(project, x, stacks)
    np.testing.assert_array_equal(got, expected)
    assert str(MOST_RANK + 1) in caplog.text


def test_kernels_lower_for_an_absent_gpu():
    pytest.importorskip("jax_triton", reason="needs the extra `kernels` and jax's plugin for CUDA", exc_type=ImportError)
    from discover_jax.kernels.projections_decode import project

    for rank in (0, 4):
        traced = jax.jit(project, static_argnums=3).trace(*_problem(9, 128, (64, 32, 32), rank), jnp.int32(1), SCALE)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call") == 1


GPU_ROWS, GPU_RANKS = (1, 7, 64, 128, 256), (0, 32)
GPU_WIDTHS = {
    "gpt-oss qkv": (2880, (4096, 512, 512), True),
    "gpt-oss o": (4096, (2880,), True),
    "small": (320, (48, 16), True),
    "qwen qkv": (1536, (1536, 256, 256), True),
    "qwen o": (1536, (1536,), False),
    "qwen gate up": (896, (4864, 4864), False),
}
GPU_FEW = {
    *((1, "gpt-oss qkv", 32), (1, "qwen gate up", 32)),
    *((7, "gpt-oss o", 0), (7, "qwen gate up", 0), (7, "qwen o", 0)),
    *((64, "small", 32), (64, "qwen gate up", 32)),
    *((128, "gpt-oss qkv", 0), (128, "gpt-oss o", 32)),
    *((256, "small", 0), (256, "qwen qkv", 32), (256, "qwen o", 32)),
}
"""Every pair of the kernel's branches; see `test_few_cases_have_every_pair_of_branches`. The other cases are slow."""
GPU_CASES = tuple(itertools.product(GPU_ROWS, GPU_WIDTHS, GPU_RANKS))


def _launch(monkeypatch, rows, name, rank):
    from discover_jax.kernels import projections_decode

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    width, outs, biased = GPU_WIDTHS[name]
    adapters = [(shape(LAYERS, rank, width), shape(LAYERS, out, rank)) if rank else () for out in outs]
    stacks = [
        Stack(shape(LAYERS, out, width), shape(LAYERS, out) if biased else None, *adapter)
        for out, adapter in zip(outs, adapters, strict=True)
    ]
    project = functools.partial(projections_decode.project, scale=SCALE)
    (launch,) = record(monkeypatch, projections_decode, project, shape(rows, width), stacks, shape(dtype=jnp.int32))
    return launch


def _branches(launch, rows):
    c = launch.constants
    outs = [c[f"OUT{i}"] for i in range(3)]
    return {
        "left operand": c["ROWS_LEFT"],
        "rows": "several blocks" if rows > c["N"] else "a whole block" if rows == c["N"] else "a part of a block",
        "projections": sum(out > 0 for out in outs),
        "bias": c["BIAS"],
        "adapter": c["RANK"] > 0,
        "parts": "one" if c["PARTS"] == 1 else "equal" if c["K"] // 64 % c["PARTS"] == 0 else "unequal",
    }


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra `parity` or `kernels`)")
def test_few_cases_have_every_pair_of_branches(monkeypatch):
    def pairs(cases):
        found = (_branches(_launch(monkeypatch, *case), case[0]) for case in cases)
        return {pair for branches in found for pair in itertools.combinations(branches.items(), 2)}

    assert set(GPU_CASES) >= GPU_FEW
    assert pairs(GPU_CASES) == pairs(GPU_FEW)
    assert len(GPU_FEW) == 12


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize(
    ("rows", "name", "rank"), [pytest.param(*case, marks=[] if case in GPU_FEW else pytest.mark.slow) for case in GPU_CASES]
)
def test_kernels_in_a_scan_match_the_reference(rows, name, rank):
    width, outs, biased = GPU_WIDTHS[name]
    from discover_jax.kernels.projections_decode import project

    x, stacks = _problem(rows, width, outs, rank, biased=biased)

    def layers(multiply):
        return jax.jit(lambda: jax.lax.scan(lambda _, i: (None, multiply(x, stacks, i, SCALE)), None, jnp.arange(LAYERS))[1])()

    for got, expected in zip(layers(project), layers(project_reference), strict=True):
        assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 1e-3
