"""Exchange around a ring: the order of devices, and sums against those of all tokens on one device. `vmap` simulates the devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.kernels.exchange_ring import Ring, around
from discover_jax.kernels.experts_update_tpu import use_ring
from discover_jax.kernels.ring import ring_along, ring_of


def _steps(places, order):
    """Links between each device of the ring and the next."""
    return [sum(abs(x - y) for x, y in zip(places[a], places[b], strict=True)) for a, b in zip(order, order[1:] + order[:1], strict=True)]


@pytest.mark.parametrize("box", [(2,), (2, 2), (2, 2, 2), (4, 4), (2, 3), (3, 4), (4, 2, 3), (2, 2, 1, 2), (4, 4, 2), (3, 3, 2)])
def test_neighbours_in_the_ring_are_neighbours_in_the_torus(box):
    places = list(itertools.product(*map(range, box)))
    np.random.default_rng(0).shuffle(places)
    order = ring_of(places)
    assert sorted(order) == list(range(len(places)))
    assert set(_steps(places, order)) == {1}


@pytest.mark.parametrize("box", [(4,), (3, 3), (1, 5, 1)])
def test_without_such_a_ring_only_its_ends_are_not_neighbours(box):
    places = list(itertools.product(*map(range, box)))
    assert _steps(places, ring_of(places))[:-1] == [1] * (len(places) - 1)


@pytest.mark.parametrize("places", [[(0, 0), (1, 1)], [(0,), (0,)], [(0, 0), (0, 1), (1, 0)]])
def test_places_that_fill_no_box_keep_their_order(places):
    assert ring_of(places) == tuple(range(len(places)))


def test_devices_without_coordinates_keep_their_order():
    assert ring_along(jax.make_mesh((1, 1), ("data", "expert")), "expert") == (0,)
    assert ring_along(jax.sharding.AbstractMesh((2, 4), ("data", "expert")), "expert") == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("order", "tokens", "dtype"),
    [
        ((0, 1), 6, jnp.float32),
        ((2, 0, 1), 32, jnp.bfloat16),
        pytest.param((0, 1, 3, 2), 32, jnp.float32, marks=pytest.mark.slow),
        pytest.param((0, 1, 3, 2, 6, 7, 5, 4), 512, jnp.bfloat16, marks=pytest.mark.slow),  # with the view in which tokens are sent
    ],
    ids=str,
)
def test_every_device_adds_its_part_to_the_tokens_of_all(order, tokens, dtype):
    """A device's part depends on its number and on where a token is from. All numbers are small integers, so sums are exact."""
    count, rng = len(order), np.random.default_rng(0)
    x, y = (rng.integers(-4, 5, (count, tokens, 3)) for _ in range(2))
    small = jnp.asarray(rng.integers(-2, 3, (count, tokens, 1)))

    def of_device(x_tD, y_tD):
        def compute(seen, visit):
            (first_tD, second_tD), number = visit.arrays, jax.lax.axis_index("expert")
            part_tD = (number + 1) * first_tD + second_tD * visit.sources.of(small)
            return visit.sources.put(seen, first_tD[:, :1]), visit.start_tD + part_tD.astype(jnp.float32)

        seen = jnp.full((count, tokens, 1), 99, dtype)
        return around(Ring("expert", order), (x_tD, y_tD), seen, compute, dtype, interpret=True)

    seen, sums = jax.jit(jax.vmap(of_device, axis_name="expert"))(x.astype(dtype), y.astype(dtype))
    assert sums.dtype == dtype
    np.testing.assert_array_equal(np.asarray(sums, np.float32), sum(range(1, count + 1)) * x + count * y * small)
    for of_one in np.asarray(seen, np.float32):  # each device saw all tokens, and knows where they are from
        np.testing.assert_array_equal(of_one, x[:, :, :1])


@pytest.mark.parametrize(
    ("devices", "tokens", "experts", "used"),
    [
        (8, 34_192, 128, True),
        (4, 8_192, 32, True),
        (16, 4_096, 128, False),
        (1, 34_192, 128, False),
        (0, 34_192, 128, False),
        (8, 49_152, 128, True),
        (8, 50_000, 128, False),  # two chunks of 25,088 tokens
        (8, 70_000, 128, True),
    ],
)
def test_few_tokens_do_not_go_around(devices, tokens, experts, used):
    assert use_ring(devices, tokens, 4, experts) == used
