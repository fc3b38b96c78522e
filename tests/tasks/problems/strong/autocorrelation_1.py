"""L-BFGS on a softmax in place of the maximum, from random starts on few pieces; then the pieces of the best are split."""

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import minimize

PIECES = 100
STARTS = 4
SPLITS = 2


def ratio(f):
    return 2 * len(f) * np.convolve(f, f).max() / f.sum() ** 2


def loss(roots, size, sharpness):
    """The logarithm of the ratio for f = roots^2, but for a constant, with a softmax; and its gradient."""
    f = roots * roots
    spectrum = rfft(f, size)
    c = irfft(spectrum * spectrum, size)[: 2 * len(f) - 1]
    top = int(c.argmax())
    weights = np.exp(sharpness * (c / c[top] - 1))
    total = weights.sum()
    weights /= total
    by_c = weights / c[top]
    by_c[top] += (1 - weights @ c / c[top]) / c[top]
    by_f = 2 * irfft(rfft(by_c, size) * spectrum.conj(), size)[: len(f)] - 2 / f.sum()
    return np.log(c[top]) + np.log(total) / sharpness - 2 * np.log(f.sum()), 2 * roots * by_f


def improved(f, sharpnesses):
    size = next_fast_len(3 * len(f), real=True)
    roots = np.sqrt(f / f.mean())
    for sharpness in sharpnesses:
        options = {"maxiter": 500, "maxfun": 1000, "maxcor": 20}
        roots = minimize(loss, roots, args=(size, sharpness), jac=True, method="L-BFGS-B", options=options).x
    return roots * roots


def run():
    rng = np.random.default_rng(0)
    f = min((improved(rng.random(PIECES) + 0.01, (30, 100, 300, 1000, 3000, 10000)) for _ in range(STARTS)), key=ratio)
    for _ in range(SPLITS):
        f = np.repeat(f, 2)
        f = improved(f + 1e-4 * f.mean(), (300, 1000, 3000, 10000, 30000))
    return f
