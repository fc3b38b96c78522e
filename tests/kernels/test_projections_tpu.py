"""The TPU kernel of projections in decoding, interpreted on a CPU and compared with the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.pallas import tpu as pltpu
from test_projections import SCALE, _problem

from discover_jax.kernels import projections_tpu
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.projections import head_reference, project_reference
from discover_jax.kernels.projections_tpu import choose_outputs, project, project_head


def _compare(problem, tolerance, interpret: bool | pltpu.InterpretParams = True):
    """Layer 1 of three."""
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(project_reference, static_argnums=3)(*problem, jnp.int32(1), SCALE)
    found = jax.jit(lambda x, stacks, layer: project(x, stacks, layer, SCALE, interpret=interpret))(*problem, jnp.int32(1))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize(
    ("rows", "width", "outs", "rank", "biased"),
    [
        (5, 192, (256, 128, 128), 3, True),  # several projections, with the outputs along the lanes
        (17, 128, (200,), 4, False),  # the inputs along the lanes, a block that is not full
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (1, 192, (640,), 4, True),  # the second block is not full
                (3, 256, (1024, 512), 0, True),
                (16, 320, (512, 256, 256), 8, False),
                (64, 256, (512, 128), 8, True),
            ]
        ),
    ],
)
def test_kernel_agrees_with_the_reference(rows, width, outs, rank, biased):
    _compare(_problem(rows, width, outs, rank, jnp.float32, biased), 1e-5)


@pytest.mark.slow
def test_bfloat16_within_its_rounding():
    """Inputs are rounded at the same places, so that only the order of the sums differs."""
    _compare(_problem(9, 192, (256, 128), 4), 1e-5)


@pytest.mark.slow
def test_a_simulated_tpu_finds_no_races(capfd):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    _compare(_problem(5, 192, (256, 128), 3, jnp.float32), 1e-5, interpret)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("rows", "outs", "said"), [(5, (128,), "a device has 5 rows"), (2, (128, 96), "128, 96 outputs"), (2, (64, 128, 128), "64, 128, 128")]
)
def test_sizes_that_the_kernel_does_not_support_use_the_reference_and_are_logged(monkeypatch, rows, outs, said):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(projections_tpu, "MOST_ROWS", 4)
    warn_reference.cache_clear()
    for problem in [_problem(rows, 128, outs, 2)] * 2:  # the second time, nothing is logged
        found, expected = (jax.jit(lambda *a, f=f: f(*a, SCALE))(*problem, jnp.int32(1)) for f in (project, project_reference))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    (line,) = lines
    assert line.startswith("kernel of decode_projections on tpu: reference")
    assert said in line


@pytest.mark.parametrize("rank", [0, 3])
def test_the_head_is_a_projection_of_one_layer(monkeypatch, rank):
    x, (stack,) = _problem(5, 128, (200,), rank, jnp.float32, biased=False)
    head = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], stack)
    reference = jax.jit(lambda *arguments: head_reference(*arguments, SCALE))
    with jax.default_matmul_precision("highest"):
        expected = reference(x, head)
    found = jax.jit(lambda *arguments: project_head(*arguments, SCALE, interpret=True))(x, head)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    monkeypatch.setattr(projections_tpu, "MOST_ROWS", 4)
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    warn_reference.cache_clear()
    np.testing.assert_array_equal(jax.jit(lambda *arguments: project_head(*arguments, SCALE))(x, head), reference(x, head))
    assert "decode_head" in lines[0]


def test_blocks_divide_all_projections_of_a_call():
    assert [choose_outputs(outs) for outs in ((4096, 512, 512), (2880,), (1536, 256, 256), (896, 128, 128))] == [512, 512, 256, 128]
    assert choose_outputs((128, 96)) == 0
