"""The small kernels of a decoding layer: in Triton's interpreter, lowered for an absent GPU, and on a GPU against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_interpreter import needs_interpreter, results_of

from discover_jax.exceptions import ConfigError
from discover_jax.kernels import layer_parts
from discover_jax.kernels.layer_parts import Branch, HeadSizes
from discover_jax.kernels.projections import Stack

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
needs_jax_triton = {"reason": "needs the extra `kernels` and jax's plugin for CUDA", "exc_type": ImportError}
LAYERS, PAGES, PAGE = 3, 140, 16
SIZES = HeadSizes(64, 8, 64)


@pytest.mark.slow  # test_interpreted.py has a few of the cases
@needs_interpreter
def test_kernels_match_plain_jax():
    differences = results_of("interpreted_layer.py", "--all")[-1]
    assert len(differences) == 9
    for name, difference in differences.items():
        assert difference < 1.1e-6, name  # false for NaN, from an output that was not written


def test_unknown_fusions_are_refused():
    pytest.importorskip("triton", reason="needs triton (extra `parity` or `kernels`)")
    from discover_jax.kernels.layer_decode import FUSIONS, fused

    assert fused(()) != fused(("norm",)) != fused(("norm", "rotation"))
    assert fused() == fused(FUSIONS)
    with pytest.raises(ConfigError, match=r"\bnorms\b.*\bnorm, rotation, router\b"):
        fused(("norms", "router"))


def _branch(rows, width, parts, share, weighted):
    rng = np.random.default_rng(rows)
    draw = lambda *shape: jax.device_put(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return draw(rows, width), Branch(draw(parts, rows, share, width), draw(rows, share) if weighted else None), draw(LAYERS, width)


def _write(function):
    """Queries, and the pools after each layer wrote its own tokens, in a loop whose carry is the pools."""

    def layers(parts_LPTo, turns, keys, values, pages_T, places_T):
        def layer(pools, inputs):
            index, parts_PTo = inputs
            q_TNH, *pools = function(parts_PTo, turns, *pools, index, pages_T, places_T, SIZES)
            return tuple(pools), q_TNH

        return jax.lax.scan(layer, (keys, values), (jnp.arange(LAYERS), parts_LPTo))

    return jax.jit(layers, donate_argnums=(2, 3))


def _tokens(rows):
    rng = np.random.default_rng(rows)
    parts_LPTo = jax.device_put(rng.normal(size=(LAYERS, 3, rows, 80 * 64)).astype(np.float32))
    angles = rng.uniform(0, 1000, (rows, 32))
    turns = tuple(jnp.asarray(turn(angles), jnp.float32) for turn in (np.cos, np.sin))
    pages_T = rng.permutation(PAGES)[:rows].astype(np.int32)
    pages_T[::5] = PAGES  # empty rows
    return parts_LPTo, turns, jnp.asarray(pages_T), jax.device_put(rng.integers(0, PAGE, rows).astype(np.int32))


def _pools():
    return [jax.device_put(np.random.default_rng(i).normal(size=(LAYERS, PAGES, 8, PAGE, 64)).astype(jnp.bfloat16)) for i in range(2)]


def test_kernels_lower_for_an_absent_gpu_and_write_in_place():
    pytest.importorskip("jax_triton", **needs_jax_triton)
    from discover_jax.kernels.layer_decode import add_and_norm, rotate_and_write, route

    normed = jax.jit(lambda x, branch, scale: add_and_norm(x, branch, scale, jnp.int32(1), 1e-5, jnp.bfloat16))
    traced = normed.trace(*_branch(3, 2880, 1, 4, True))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call") == 1
    router = Stack(jnp.zeros((LAYERS, 128, 2880), jnp.bfloat16), jnp.zeros((LAYERS, 128), jnp.bfloat16))
    for rows, kernels in ((8, 2), (128, 3)):
        traced = jax.jit(lambda x: route(x, router, 4, jnp.int32(1))).trace(jnp.zeros((rows, 2880), jnp.bfloat16))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call") == kernels
    parts_LPTo, turns, *places = _tokens(5)
    text = _write(rotate_and_write).trace(parts_LPTo, turns, *_pools(), *places).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 1
    assert text.count("output_operand_alias<") == 2


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize(("rows", "parts", "share"), [(1, 5, 1), (128, 5, 1), (1, 1, 4), (128, 1, 4), (7, 2, 3)])
def test_norms_on_a_gpu_match_plain_jax(rows, parts, share):
    from discover_jax.kernels.layer_decode import add_and_norm

    given = _branch(rows, 2880, parts, share, share > 1)
    (x, normed), (right, right_normed) = (
        jax.jit(function, static_argnums=(4, 5))(*given, jnp.int32(2), 1e-5, jnp.bfloat16)
        for function in (add_and_norm, layer_parts.add_and_norm)
    )
    np.testing.assert_allclose(x, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(normed, np.float32), np.asarray(right_normed, np.float32), rtol=2**-7, atol=1e-5)


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize("rows", [1, 128])
def test_rotation_on_a_gpu_writes_in_place(rows):
    """Values and places that are not written are equal bit by bit; queries and keys up to the rounding of the rotation."""
    from discover_jax.kernels.layer_decode import rotate_and_write

    parts_LPTo, turns, *places = _tokens(rows)
    ((keys, values), q), ((right_keys, right_values), right_q) = (
        _write(function)(parts_LPTo, turns, *_pools(), *places) for function in (rotate_and_write, layer_parts.rotate_and_write)
    )
    before = np.asarray(_pools()[0], np.float32)
    np.testing.assert_array_equal(np.asarray(values, np.float32), np.asarray(right_values, np.float32))
    for got, right in ((q, right_q), (keys, right_keys)):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(right, np.float32), rtol=2**-7, atol=1e-2)
    np.testing.assert_array_equal(np.asarray(keys, np.float32) == before, np.asarray(right_keys, np.float32) == before)


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize(("rows", "experts"), [(1, 128), (32, 128), (33, 128), (128, 128), (256, 32)])
def test_router_on_a_gpu_chooses_by_its_logits(rows, experts):
    """The choice is that of plain JAX for the logits that the projections' kernel computes."""
    from discover_jax.kernels.expert_rows import sort_rows
    from discover_jax.kernels.experts import route_top
    from discover_jax.kernels.experts_decode import choose_tiling
    from discover_jax.kernels.layer_decode import route
    from discover_jax.kernels.projections_decode import project_parts

    x = jax.random.normal(jax.random.key(rows), (rows, 2880), jnp.bfloat16)
    weight = 2880**-0.5 * jax.random.normal(jax.random.key(1), (LAYERS, experts, 2880), jnp.bfloat16)
    router = Stack(weight.astype(jnp.bfloat16), jax.random.normal(jax.random.key(2), (LAYERS, experts), jnp.bfloat16))
    index, weights, rows_sorted = jax.jit(lambda x: route(x, router, 4, jnp.int32(2)))(x)
    parts = jax.jit(lambda x: project_parts(x, [router], jnp.int32(2), 0.0))(x)
    logits = np.asarray(parts, np.float64).sum(axis=0).astype(np.float32)
    right, right_weights = route_top(jnp.asarray(logits), 4)
    assert (np.asarray(index) == np.asarray(right)).mean() > 0.998  # the order of a sum may break a tie
    np.testing.assert_allclose(np.sort(weights), np.sort(right_weights), rtol=1e-4, atol=1e-6)
    expected = sort_rows(index, experts, choose_tiling(rows * 4, experts).rows)
    np.testing.assert_array_equal(rows_sorted.slots, expected.slots)
    np.testing.assert_array_equal(rows_sorted.blocks[2], expected.blocks[2])
    assert float(jnp.abs(parts.sum(axis=0) - layer_parts.parts_reference(x, [router], jnp.int32(2), 0.0)[0]).max()) < 1e-3
