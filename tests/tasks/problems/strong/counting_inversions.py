"""Ranks, then one stable partition for each bit of the rank, all in numpy."""

import numpy as np


def count(values):
    bits = max(1, (len(values) - 1).bit_length())
    ranks = np.arange(1 << bits, dtype=np.int32)  # the places after the last value add no inversion
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values), dtype=np.int32)
    total = 0
    # Before the pass for a bit, ranks that agree in all higher bits are in one group, in the order of the values. Half of each group has
    # the bit. Each rank with the bit forms an inversion with every later one of its group without it.
    for bit in range(bits - 1, -1, -1):
        groups = ranks.reshape(-1, 2 << bit)
        has_bit = (groups >> bit & 1).astype(bool)
        total += int(np.cumsum(has_bit, axis=1, dtype=np.int32)[~has_bit].sum(dtype=np.int64))
        ranks = np.concatenate([groups[~has_bit].reshape(-1, 1 << bit), groups[has_bit].reshape(-1, 1 << bit)], axis=1).ravel()
    return total
