"""Compact rows: every routed row is in one block of its own expert for any routing, and the kernel sorts like plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.expert_rows import most_blocks, sort_rows

EXPERTS = 6
_sorted = jax.jit(sort_rows, static_argnums=(1, 2))


def _index(tokens, active, skew):
    rng = np.random.default_rng(tokens)
    return np.argsort(rng.normal(size=(tokens, EXPERTS)) + skew * np.arange(EXPERTS), axis=1)[:, :active]


# 3,000 tokens are above the limit for comparing all pairs.
@pytest.mark.parametrize(("tokens", "active"), [(1, 1), (7, 2), (100, 4), (3000, 2)])
@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("block", [8, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("here", [EXPERTS, EXPERTS // 2])
def test_each_row_is_in_one_block_of_its_expert(tokens, active, skew, block, here):
    index = np.minimum(_index(tokens, active, skew), here)  # the other experts are on other devices
    slots, blocks = _sorted(index.astype(np.int32), here, block)
    slots, blocks = np.asarray(slots), np.asarray(blocks)
    assert blocks.shape == (3, most_blocks(tokens * active, here, block))
    found = []
    for expert, first, rows in blocks.T:
        assert 0 <= rows <= block
        mine = slots[first : first + rows]
        assert (index.reshape(-1)[mine] == expert).all()
        assert (np.diff(mine) > 0).all()  # stable: the order of the tokens
        found.extend(mine)
    assert sorted(found) == np.flatnonzero(index.reshape(-1) < here).tolist()


@pytest.mark.parametrize("block", [1, 8])
def test_bound_on_blocks_is_tight(block):
    def needed(counts):
        return sum(-(-count // block) for count in counts)

    for rows in range(1, 40):
        counts = np.random.default_rng(rows).multinomial(rows, np.ones(EXPERTS) / EXPERTS, size=50)
        assert max(map(needed, counts)) <= most_blocks(rows, EXPERTS, block)
        worst = [1] * min(rows, EXPERTS)
        worst[0] += rows - len(worst)
        assert needed(worst) <= most_blocks(rows, EXPERTS, block) <= needed(worst) + 1


@pytest.mark.slow  # run it after changing the kernels
@needs_interpreter
@pytest.mark.parametrize("options", [[], ["--all"]])
def test_kernel_sorts_like_plain_jax(options):
    same = results_of("interpreted_expert_rows.py", *options)[-1]
    assert len(same) == (8 if options else 4)
    assert all(same.values()), same


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 9, 128, 200, 1000])
@pytest.mark.parametrize("skew", [0.0, 100.0])
def test_kernel_on_a_gpu_sorts_like_plain_jax(tokens, skew):
    from discover_jax.kernels.expert_rows_decode import sort_rows_of_layer

    index = jnp.asarray(_index(tokens, 3, skew), jnp.int32)
    got = jax.jit(lambda layer: sort_rows_of_layer(index, EXPERTS, 8, layer))(jnp.int32(2))
    expected = sort_rows(index, EXPERTS, 8)
    used = np.asarray(expected.blocks[2]) > 0
    np.testing.assert_array_equal(got.slots, expected.slots)
    np.testing.assert_array_equal(got.blocks[2], expected.blocks[2])
    np.testing.assert_array_equal(got.blocks[1][used], expected.blocks[1][used])
    np.testing.assert_array_equal(got.blocks[0][used], expected.blocks[0][used] + 2 * EXPERTS)
