"""A sequence of linear programs: all overlaps are linearised around h, their maximum is minimised, and steps are bounded."""

import numpy as np
from scipy.optimize import linprog

PIECES = 30
STARTS = 4
STEPS = 60


def overlaps(h):
    """For shifts of k = -(PIECES - 1) to PIECES - 1 pieces: the sum of h[i + k] (1 - h[i])."""
    return np.correlate(h, 1 - h, mode="full")


def jacobian(h):
    rows = np.zeros((2 * PIECES - 1, PIECES))
    for row, k in enumerate(range(1 - PIECES, PIECES)):
        i = np.arange(max(0, -k), min(PIECES, PIECES - k))
        rows[row, i + k] += 1 - h[i]
        rows[row, i] -= h[i + k]
    return rows


def improved(h):
    """Variables of each linear program: the step of every piece, and the bound of all linearised overlaps."""
    bound = 0.1
    for _ in range(STEPS):
        result = linprog(
            np.append(np.zeros(PIECES), 1),
            A_ub=np.hstack([jacobian(h), -np.ones((2 * PIECES - 1, 1))]),
            b_ub=-overlaps(h),
            A_eq=np.append(np.ones(PIECES), 0)[None],
            b_eq=[PIECES / 2 - h.sum()],
            bounds=[*((max(-bound, -value), min(bound, 1 - value)) for value in h), (None, None)],
        )
        moved = h if result.x is None else np.clip(h + result.x[:PIECES], 0, 1)
        if overlaps(moved).max() < overlaps(h).max():
            h, bound = moved, bound * 1.5
        else:
            bound /= 3
    return h


def run():
    rng = np.random.default_rng(0)
    x = (np.arange(PIECES) + 0.5) / PIECES
    best = None
    for _ in range(STARTS):
        h = np.clip(0.5 + 0.4 * np.cos(2 * np.pi * (x - 0.5)) + rng.normal(0, 0.1, PIECES), 0, 1)
        h = improved(h + (0.5 - h.mean()) * h)
        if best is None or overlaps(h).max() < overlaps(best).max():
            best = h
    return best
