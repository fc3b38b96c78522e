"""L-BFGS on a softmax in place of the maximum, from random combs beside flat parts; then the pieces of the best are split.

Random starts on few pieces led to this form: the best of them had narrow teeth at equal distances on one side, and a broad part, a gap and
a second part on the other. More and narrower teeth are better, as far as the pieces resolve them. The starts run in two processes.
"""

from concurrent.futures import ProcessPoolExecutor

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import minimize

PIECES = 800
STARTS = 24
SPLITS = 2


def ratio(f):
    c = np.convolve(f, f)
    return (2 * c @ c + c[1:] @ c[:-1]) / (3 * c.sum() * c.max())


def loss(roots, size, sharpness):
    """Minus the logarithm of the ratio for f = roots^2, but for a constant, with a softmax in place of the maximum; and its gradient."""
    f = roots * roots
    spectrum = rfft(f, size)
    c = irfft(spectrum * spectrum, size)[: 2 * len(f) - 1]
    top = int(c.argmax())
    weights = np.exp(sharpness * (c / c[top] - 1))
    total = weights.sum()
    weights /= total
    by_c = weights / c[top]
    by_c[top] += (1 - weights @ c / c[top]) / c[top]
    neighbours = 4 * c  # the gradient of the squared 2-norm
    neighbours[1:] += c[:-1]
    neighbours[:-1] += c[1:]
    square = neighbours @ c / 2
    by_f = 2 * irfft(rfft(by_c - neighbours / square, size) * spectrum.conj(), size)[: len(f)] + 2 / f.sum()
    return np.log(c[top]) + np.log(total) / sharpness + 2 * np.log(f.sum()) - np.log(square), 2 * roots * by_f


def improved(f, sharpnesses, iterations):
    size = next_fast_len(3 * len(f), real=True)
    roots = np.sqrt(f / f.mean())
    for sharpness in sharpnesses:
        options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20}
        roots = minimize(loss, roots, args=(size, sharpness), jac=True, method="L-BFGS-B", options=options).x
    return roots * roots


def hump(x, left, right, heights):
    """Piecewise linear through three heights between left and right, 0 elsewhere."""
    return np.interp(x, [left, (left + right) / 2, right], heights) * (x > left) * (x < right)


def first_heights(rng):
    x = (np.arange(PIECES) + 0.5) / PIECES
    period, tooth = int(rng.integers(12, 29)), int(rng.integers(1, 3))
    teeth = (np.arange(PIECES) % period < tooth) * period / tooth
    end, left, right, gap = rng.uniform(0.3, 0.5), rng.uniform(0.15, 0.35), rng.uniform(0.75, 0.87), rng.uniform(0.88, 0.94)
    peak = rng.uniform(0.2, 0.6) * end
    envelope = np.interp(x, [0, peak, end], [rng.uniform(0, 0.5), 1, rng.uniform(0, 0.5)]) * (x < end)
    broad = hump(x, left, right, rng.uniform(0.3, 1, 3)) * rng.uniform(2, 5)
    second = hump(x, gap, 1, rng.uniform(0.3, 1, 3)) * rng.uniform(2, 10)
    f = (envelope * teeth + broad + second) * np.exp(rng.normal(0, 0.2, PIECES))
    return f + 0.01 * f.mean()


def improved_start(seed):
    return improved(first_heights(np.random.default_rng(seed)), (100, 300, 1000, 3000), 200)


def run():
    with ProcessPoolExecutor(2) as pool:
        f = max(pool.map(improved_start, range(STARTS)), key=ratio)
    for _ in range(SPLITS):
        f = np.repeat(f, 2)
        f = improved(f + 1e-3 * f.mean(), (100, 300, 1000, 3000, 10000), 500)
    return f
