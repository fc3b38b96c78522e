"""SLSQP on centers and radii together, from many starts, then from disturbed copies of the best packing (basin hopping).

Each result is repaired: its radii shrink until the packing holds in rational arithmetic. The rounds run in two processes.
"""

from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction

import numpy as np
from scipy.optimize import minimize

COUNT = 26
ROUNDS = 2
STARTS = 10
HOPS = 60

FIRST, SECOND = np.triu_indices(COUNT, 1)
PAIRS = np.arange(len(FIRST))


def room(z):
    """At least 0 where the packing holds: for each pair the distance minus the radii, then the room to the four sides."""
    x, y, r = z.reshape(3, COUNT)
    distances = np.hypot(x[FIRST] - x[SECOND], y[FIRST] - y[SECOND])
    return np.concatenate([distances - r[FIRST] - r[SECOND], x - r, 1 - x - r, y - r, 1 - y - r])


def room_jacobian(z):
    x, y, _ = z.reshape(3, COUNT)
    dx, dy = x[FIRST] - x[SECOND], y[FIRST] - y[SECOND]
    distances = np.hypot(dx, dy) + 1e-12
    pairs = np.zeros((len(FIRST), 3, COUNT))
    for axis, part in ((0, dx / distances), (1, dy / distances)):
        pairs[PAIRS, axis, FIRST], pairs[PAIRS, axis, SECOND] = part, -part
    pairs[PAIRS, 2, FIRST] = pairs[PAIRS, 2, SECOND] = -1
    one, zero = np.eye(COUNT), np.zeros((COUNT, COUNT))
    sides = np.block([[one, zero, -one], [-one, zero, -one], [zero, one, -one], [zero, -one, -one]])
    return np.concatenate([pairs.reshape(len(FIRST), -1), sides])


def optimised(centers):
    distances = np.linalg.norm(centers[:, None] - centers[None], axis=-1) + np.eye(COUNT)
    radii = np.minimum(distances.min(axis=1) / 2, np.minimum(centers, 1 - centers).min(axis=1))
    gradient = np.repeat([0.0, 0.0, -1.0], COUNT)
    result = minimize(
        lambda z: -z[2 * COUNT :].sum(),
        np.concatenate([centers.T.ravel(), radii]),
        jac=lambda z: gradient,
        method="SLSQP",
        constraints={"type": "ineq", "fun": room, "jac": room_jacobian},
        bounds=[(0, 1)] * (3 * COUNT),
        options={"maxiter": 200, "ftol": 1e-10},
    )
    return result.x


def holds(centers, radii):
    circles = [(Fraction(x), Fraction(y), Fraction(r)) for (x, y), r in zip(centers.tolist(), radii.tolist(), strict=True)]
    if any(r <= 0 or x < r or y < r or x + r > 1 or y + r > 1 for x, y, r in circles):
        return False
    return all((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 >= (a[2] + b[2]) ** 2 for i, a in enumerate(circles) for b in circles[:i])


def repaired(z):
    """Shrinks all radii by the worst violation, then by as little more as rounding needs. None if that would be much."""
    x, y, r = z.reshape(3, COUNT)
    centers, shrink = np.stack([x, y], axis=1), max(0.0, -room(z).min())
    margin = 1e-16
    while shrink + margin < 1e-6:
        if holds(centers, r - shrink - margin):
            return centers, r - shrink - margin
        margin *= 2
    return None


def first_centers(rng, start):
    """By turns at random and in disturbed hexagonal rows with some places empty."""
    if start % 2:
        return rng.uniform(0.05, 0.95, (COUNT, 2))
    side = int(np.ceil(np.sqrt(COUNT)))
    rows = np.array([((i + 0.25 + 0.5 * (j % 2)) / side, (j + 0.5) / side) for j in range(side) for i in range(side)])
    chosen = rows[rng.permutation(len(rows))[:COUNT]] * 0.9 + 0.05
    return np.clip(chosen + rng.normal(0, 0.03, chosen.shape), 0.02, 0.98)


def moved_centers(rng, centers):
    """Moves up to three circles anywhere, or all a little."""
    moved = centers.copy()
    if rng.random() < 0.5:
        chosen = rng.choice(COUNT, rng.integers(1, 4), replace=False)
        moved[chosen] = rng.uniform(0.05, 0.95, (len(chosen), 2))
    else:
        moved += rng.normal(0, rng.choice([0.02, 0.05]), moved.shape)
    return np.clip(moved, 0.02, 0.98)


def basin_hopping(seed):
    """The best packing of some starts and of hops from the best so far."""
    rng = np.random.default_rng(seed)
    best = None
    for step in range(STARTS + HOPS):
        centers = first_centers(rng, step) if step < STARTS or best is None else moved_centers(rng, best[0])
        packing = repaired(optimised(centers))
        if packing and (best is None or packing[1].sum() > best[1].sum()):
            best = packing
    return best


def run():
    with ProcessPoolExecutor(2) as pool:
        return max(pool.map(basin_hopping, range(ROUNDS)), key=lambda packing: packing[1].sum())
