"""The TPU kernel that sorts the rows of decoding experts, interpreted on a CPU and compared with plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.kernels.expert_rows import most_blocks
from discover_jax.kernels.expert_steps_tpu import TOKEN, sort_steps, table_of
from discover_jax.kernels.experts import route_top
from discover_jax.kernels.experts_decode_pallas import CORES
from discover_jax.kernels.experts_decode_tpu import steps_of

CASES = [
    (1, 4, 2, 2, 16, 0.0),
    (37, 8, 8, 3, 16, 0.0),
    (128, 128, 16, 4, 16, 0.0),  # gpt-oss-120b on 8 devices
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(50, 8, 8, 4, 16, 100.0), (128, 128, 128, 4, 32, 1.0), (23, 4, 4, 2, 16, 3.0), (512, 32, 8, 4, 256, 0.5)]
    ),
]


@pytest.mark.parametrize(("tokens", "experts", "held", "share", "rows", "skew"), CASES)
def test_the_kernel_gives_the_steps_of_plain_jax(tokens, experts, held, share, rows, skew):
    """The number `held` stands for experts elsewhere."""
    logits = np.random.default_rng(tokens).normal(size=(tokens, experts)) + skew * np.arange(experts)

    @jax.jit
    def both(logits):
        index, weights = route_top(logits, share)
        index = jnp.minimum(index, held)
        return table_of(steps_of(index, weights, held, rows, 3)), sort_steps(index, weights, held, rows, 3, CORES, interpret=True)

    (expected, order), (found, sorted_weights) = jax.tree.map(np.asarray, both(logits.astype(np.float32)))
    assert found.shape == expected.shape
    steps, choices = CORES * -(-most_blocks(tokens * share, held, rows) // CORES), tokens * share
    np.testing.assert_array_equal(found[:TOKEN, :steps], expected[:TOKEN, :steps])
    np.testing.assert_array_equal(found[TOKEN, :choices], expected[TOKEN, :choices])
    np.testing.assert_array_equal(sorted_weights[0, :choices], order[0, :choices])
