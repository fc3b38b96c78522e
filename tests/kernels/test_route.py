"""The choice of experts in decoding: the kernel that also sorts matches plain JAX, in Triton's interpreter and on a GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import route_reference, route_top

_sorted = jax.jit(sort_rows, static_argnums=(1, 2))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra `parity` or `kernels`)")


@pytest.mark.slow  # test_interpreted.py has a few of the cases
@needs_interpreter
def test_kernel_chooses_and_sorts_like_plain_jax():
    same = results_of("interpreted_route.py", "--all")[-1]
    assert len(same) == 16
    assert all(same.values()), same


@needs_triton
def test_more_logits_than_one_instance_holds_use_the_reference():
    from discover_jax.kernels.route_decode import route_sorted

    logits = jax.random.normal(jax.random.key(0), (33, 128))
    for got, expected in zip(route_sorted(logits, 4, 0), route_reference(logits, 4, 0), strict=True):
        assert (got is None and expected is None) or np.array_equal(got, expected)


@needs_triton
def test_given_rows_are_not_sorted_again(monkeypatch):
    """The experts' kernels get exactly the rows that they would sort themselves."""
    from discover_jax.kernels import experts_decode

    used = []
    monkeypatch.setattr(experts_decode, "multiply", lambda x, matrix, rows, *_, share, **__: used.append(rows) or jnp.zeros((12, 8)))
    monkeypatch.setattr(experts_decode, "sort_rows_of_layer", lambda index, experts, block, layer: _sorted(index, experts, block))
    logits = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    index, weights = jax.jit(route_top, static_argnums=1)(logits, 3)
    matrix = experts_decode.TiledMatrix(jnp.zeros((6, 1)), jnp.zeros((6, 1)), jnp.zeros((6, 1)))
    rows = _sorted(index, 6, experts_decode.choose_tiling(12, 6).rows)
    for given in (None, rows):
        experts_decode.moe_routed(jnp.zeros((4, 8)), index, weights, matrix, matrix, limit=7.0, alpha=1.7, rows=given)
    assert used[2] is used[3] is rows
    jax.tree.map(np.testing.assert_array_equal, used[0], rows)


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("tokens", "experts"), [(1, 128), (32, 128), (9, 32), (128, 32)])
@pytest.mark.parametrize("rounded", [False, True])
def test_kernel_on_a_gpu_matches_plain_jax(tokens, experts, rounded):
    from discover_jax.kernels.experts_decode import choose_tiling
    from discover_jax.kernels.route_decode import route_sorted

    logits = jax.random.normal(jax.random.key(tokens), (tokens, experts))
    logits = jnp.round(logits) if rounded else logits  # many ties
    index, weights, rows = jax.jit(lambda layer: route_sorted(logits, 4, layer))(jnp.int32(2))
    right, right_weights = route_top(logits, 4)
    np.testing.assert_array_equal(index, right)
    np.testing.assert_allclose(weights, right_weights, rtol=1e-5)
    expected = sort_rows(right, experts, choose_tiling(tokens * 4, experts).rows)
    used = np.asarray(expected.blocks[2]) > 0
    np.testing.assert_array_equal(rows.slots, expected.slots)
    np.testing.assert_array_equal(rows.blocks[2], expected.blocks[2])
    np.testing.assert_array_equal(rows.blocks[1][used], expected.blocks[1][used])
    np.testing.assert_array_equal(rows.blocks[0][used], expected.blocks[0][used] + 2 * experts)
