"""The choice of experts in decoding: the kernel that also sorts matches plain JAX, in Triton's interpreter and on a GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_launches import record
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import route_reference, route_top

_sorted = jax.jit(sort_rows, static_argnums=(1, 2))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra `parity` or `kernels`)")


@pytest.mark.slow  # test_interpreted.py has a few of the cases
@needs_interpreter
def test_kernel_chooses_and_sorts_like_plain_jax():
    same = results_of("interpreted_route.py", "--all")[-1]
    assert len(same) == 18
    assert all(same.values()), same


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "experts", "kernels"),
    [
        (1, 128, ["route"]),
        (32, 128, ["route"]),
        (128, 32, ["route"]),
        (33, 128, ["choose", "sort"]),
        (128, 128, ["choose", "sort"]),
        (512, 32, ["choose", "sort"]),
        (129, 128, []),
        (512, 128, []),
    ],
)
def test_the_number_of_logits_decides_which_kernels_run(monkeypatch, tokens, experts, kernels):
    from discover_jax.kernels import expert_rows_decode, route_decode

    def route(logits):
        return route_decode.route_sorted(logits, 4, 0)[:2]

    launches = record(monkeypatch, (route_decode, expert_rows_decode), route, jax.ShapeDtypeStruct((tokens, experts), jnp.float32))
    assert [launch.name for launch in launches] == kernels


@needs_triton
def test_more_logits_than_were_measured_use_the_reference():
    from discover_jax.kernels.route_decode import route_sorted

    logits = jax.random.normal(jax.random.key(0), (129, 128))
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
@pytest.mark.parametrize(("tokens", "experts"), [(1, 128), (32, 128), (9, 32), (128, 32), (33, 128), (128, 128)])
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
