"""Compact rows: every routed row is in one block of its own expert, whatever the routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.kernels.expert_rows import most_blocks, sort_rows

EXPERTS = 6


def _index(tokens, active, skew):
    rng = np.random.default_rng(tokens)
    return np.argsort(rng.normal(size=(tokens, EXPERTS)) + skew * np.arange(EXPERTS), axis=1)[:, :active]


# 3,000 tokens are more than the comparison of all pairs is for.
@pytest.mark.parametrize(("tokens", "active"), [(1, 1), (1, 4), (7, 2), (100, 4), (3000, 2)])
@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("block", [8, 16])
def test_each_row_is_in_one_block_of_its_expert(tokens, active, skew, block):
    index = _index(tokens, active, skew)
    slots, blocks = jax.jit(lambda index: sort_rows(index, EXPERTS, block))(jnp.asarray(index, jnp.int32))
    slots, blocks = np.asarray(slots), np.asarray(blocks)
    assert blocks.shape == (3, most_blocks(tokens * active, EXPERTS, block))
    found = []
    for expert, first, rows in blocks.T:
        assert 0 <= rows <= block
        mine = slots[first : first + rows]
        assert (index.reshape(-1)[mine] == expert).all()
        assert (np.diff(mine) > 0).all()  # stable: the order of the tokens
        found.extend(mine)
    assert sorted(found) == list(range(tokens * active))


@pytest.mark.parametrize("block", [1, 8])
def test_the_bound_on_blocks_is_reached_and_never_passed(block):
    def needed(counts):
        return sum(-(-count // block) for count in counts)

    for rows in range(1, 40):
        counts = np.random.default_rng(rows).multinomial(rows, np.ones(EXPERTS) / EXPERTS, size=50)
        assert max(map(needed, counts)) <= most_blocks(rows, EXPERTS, block)
        worst = [1] * min(rows, EXPERTS)
        worst[0] += rows - len(worst)
        assert needed(worst) <= most_blocks(rows, EXPERTS, block) <= needed(worst) + 1
