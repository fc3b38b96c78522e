"""The TPU kernels of a decoding layer's small operations, interpreted on a CPU and compared with plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels import layer_pallas, layer_parts, layer_tpu
from discover_jax.kernels.expert_steps_tpu import packed_column, put_choices, take_choices
from discover_jax.kernels.layer_parts import Branch, HeadSizes
from discover_jax.kernels.projections import Stack

SIMULATED = pltpu.InterpretParams(uninitialized_memory="nan")
LAYERS = 3


def _draw(seed, *shape, dtype=jnp.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize(
    ("rows", "width", "parts", "wide"),
    [(5, 96, 2, 128), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 96, 1, 96), (130, 200, 2, 256), (256, 64, 1, 64)])],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_branches_are_added_and_normalised(rows, width, parts, wide, dtype):
    """The columns of parts that are wider than the stream are not read."""
    x, given, scale = _draw(0, rows, width), _draw(1, parts, rows, wide), _draw(2, LAYERS, width)
    given[..., width:] = np.nan
    kernel = functools.partial(layer_pallas.add_and_norm, eps=1e-5, dtype=dtype, interpret=SIMULATED)
    got, normed = jax.jit(kernel)(x, given, scale, np.int32(1))
    branch = Branch(given[:, :, None, :width])
    expected, right = jax.jit(functools.partial(layer_parts.add_and_norm, eps=1e-5, dtype=dtype))(x, branch, scale, np.int32(1))
    assert normed.dtype == dtype
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(normed, np.float32), np.asarray(right, np.float32), atol=2e-2 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "size", "places"),
    [
        (9, 6, 2, 64, 128),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, 64, 8, 64, 128), (130, 10, 2, 64, 256), (20, 8, 4, 32, 128), (7, 44, 4, 64, 128)]
        ),
    ],
)
def test_heads_are_rotated_and_written(rows, heads, kv_heads, size, places):
    """Rows without a page are not written. Queries are those of each key/value head, padded to 8."""
    rng = np.random.default_rng(rows)
    sizes, pool = HeadSizes(heads, kv_heads, size), rows + 3
    parts = _draw(0, 2, rows, (heads + 2 * kv_heads) * size)
    angles = rng.uniform(0, 1000, (rows, size // 2))
    turns = tuple(turn(angles).astype(np.float32) for turn in (np.cos, np.sin))
    pages = rng.permutation(pool)[:rows].astype(np.int32)
    pages[::4] = pool
    where = np.int32(1), pages, rng.integers(0, places, rows).astype(np.int32)
    pools = [_draw(i, LAYERS, pool, kv_heads, places, size) for i in range(2)]
    write = jax.jit(functools.partial(layer_pallas.rotate_and_write, sizes=sizes, interpret=SIMULATED))
    q, keys, values = (np.asarray(x) for x in write(parts, turns, *pools, *where, first_page=0))
    right_q, right_keys, right_values = jax.jit(functools.partial(layer_parts.rotate_and_write, sizes=sizes))(parts, turns, *pools, *where)
    group = heads // kv_heads
    np.testing.assert_allclose(q[:, :, :group].reshape(rows, heads, size), right_q, atol=1e-5)
    np.testing.assert_array_equal(q[:, :, group:], 0)
    np.testing.assert_allclose(keys, right_keys, atol=1e-5)
    np.testing.assert_allclose(values, right_values, atol=1e-6)
    elsewhere = write(parts, turns, *pools, where[0], pages + 5, where[2], first_page=5)
    np.testing.assert_array_equal(elsewhere[1], keys)


def _route(x, router, share, layer):
    return jax.jit(functools.partial(layer_tpu.route, interpret=SIMULATED), static_argnums=2)(x, router, share, np.int32(layer))


@pytest.mark.parametrize(
    ("rows", "width", "experts", "share"),
    [(7, 96, 32, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 64, 8, 2), (130, 96, 128, 4), (16, 128, 300, 8)])],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_router_chooses_as_plain_jax(rows, width, experts, share, dtype):
    """Weights and inputs of small integers, so that sums are exact and logits often tie: the order of experts is that of `top_k`."""
    rng = np.random.default_rng(experts)
    weight, bias = (rng.integers(-1, 2, shape).astype(jnp.bfloat16) for shape in ((LAYERS, experts, width), (LAYERS, experts)))
    x = (rng.integers(-2, 3, (rows, width)) * (rng.uniform(size=(rows, width)) < 0.1)).astype(dtype)
    x[0] = 0  # only the biases
    router = Stack(weight, bias)
    index, _, sent = _route(x, router, share, 1)
    sent = np.asarray(sent)
    expected, weights, _ = jax.jit(layer_parts.route, static_argnums=2)(x, router, share, np.int32(1))
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(sent[:, :width], x)
    found, sent_weights = jax.jit(take_choices, static_argnums=1)(sent[:, packed_column(width) :], share)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    np.testing.assert_allclose(np.concatenate(sent_weights, axis=1), weights, rtol=1e-6)


def test_negative_zeros_are_below_zeros_for_the_router():
    """As in `jax.lax.top_k`, whose order is that of the bits."""
    router = Stack(np.zeros((1, 8, 64), np.float32), np.array([[-0.0, 0.0, -1.0, -0.0, 0.0, -2.0, -1.0, 0.0]], np.float32))
    x = np.repeat(np.array([[0.0], [-1.0]], np.float32), 64, axis=1)
    index, *_ = _route(x, router, 4, 0)
    np.testing.assert_array_equal(index, jax.jit(layer_parts.route, static_argnums=2)(x, router, 4, np.int32(0))[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_choices_are_sent_exactly(dtype):
    """Weights of all magnitudes, and experts beyond the integers that bfloat16 holds."""
    rng = np.random.default_rng(0)
    weights = [(2.0 ** rng.uniform(-80, 0, (50, 1))).astype(np.float32) for _ in range(4)]
    index = [rng.integers(0, 2**15, (50, 1)).astype(np.int32) for _ in range(4)]
    sent = np.asarray(jax.jit(put_choices)(index, weights)).astype(dtype)  # not by XLA, which may leave out a rounding
    found, got = jax.jit(take_choices, static_argnums=1)(sent, 4)
    for one, expected in ((found, index), (got, weights)):
        np.testing.assert_array_equal(np.concatenate(one, axis=1), np.concatenate(expected, axis=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sizes": HeadSizes(64, 8, 128)}, "head size is 128"),
        ({"sizes": HeadSizes(64, 3, 64)}, "multiples of 128"),
        ({"experts_per_token": 26}, "26 experts"),
        ({"form": "dense"}, "dense"),
        ({"dtype": jnp.dtype("float32")}, "float32"),
    ],
)
def test_unsupported_models_are_named(change, said):
    supported = {"sizes": HeadSizes(64, 8, 64), "experts_per_token": 4, "form": "lanes", "dtype": jnp.dtype("bfloat16")}
    assert layer_tpu.layer_refusal(**supported) == ""
    assert said in layer_tpu.layer_refusal(**supported | change)


def interpreted_layer():
    """The kernels of a layer, interpreted."""
    names = [field.name for field in dataclasses.fields(layer_tpu.KERNELS) if callable(getattr(layer_tpu.KERNELS, field.name))]
    return dataclasses.replace(
        layer_tpu.KERNELS, **{name: functools.partial(getattr(layer_tpu.KERNELS, name), interpret=True) for name in names}
    )
