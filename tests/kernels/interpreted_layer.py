"""Runs the small kernels of a decoding layer in Triton's interpreter, on the CPU, and prints their differences from plain JAX as JSON.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_layer.py [--all]

Differences are relative to the largest value. The interpreter truncates float32 to bfloat16 where a GPU rounds, so they can be 2^-7.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import layer_decode, layer_parts
from discover_jax.kernels.layer_parts import Branch, HeadSizes

EPS, LAYERS = 1e-5, 3


def difference(got: jax.Array, expected: jax.Array) -> float:
    a, b = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.abs(a - b).max() / np.abs(b).max())  # NaN, from an output that was not written, stays NaN


def norm(tokens: int, width: int, parts: int, share: int, weighted: bool) -> float:
    """Of the stream, which is in float32, and of its norm."""
    rng = np.random.default_rng(tokens + width)

    def draw(*shape: int) -> jax.Array:
        return jax.device_put(rng.normal(size=shape).astype(np.float32))

    branch = Branch(draw(parts, tokens, share, width), draw(tokens, share) if weighted else None)
    arguments = draw(tokens, width), branch, draw(LAYERS, width).astype(jnp.bfloat16), jnp.int32(2), EPS
    (x, normed), (right, right_normed) = (f(*arguments, jnp.bfloat16) for f in (layer_decode.add_and_norm, layer_parts.add_and_norm))
    _, exact = layer_decode.add_and_norm(*arguments, jnp.float32)
    _, right_exact = layer_parts.add_and_norm(*arguments, jnp.float32)
    rounded = difference(normed, right_normed) / 2**-7
    return max(difference(x, right), difference(exact, right_exact), 1e-6 * rounded)


def rotation(tokens: int, sizes: HeadSizes, parts: int, page: int) -> float:
    """Of queries and both pools. Values are not rotated, and what is not written keeps its bits: both must be equal."""
    rng = np.random.default_rng(tokens)
    heads, kv_heads, size = sizes
    pages = 2 * tokens + 1

    def draw(*shape: int) -> jax.Array:
        return jax.device_put((np.round(8 * rng.normal(size=shape)) / 8).astype(np.float32))  # exact in bfloat16, also in sums

    parts_PTo = draw(parts, tokens, (heads + 2 * kv_heads) * size)
    angles = rng.uniform(0, 100, (tokens, size // 2))
    turns = tuple(jnp.asarray(1.3 * turn(angles), jnp.float32) for turn in (np.cos, np.sin))
    pools = [draw(LAYERS, pages, kv_heads, page, size).astype(jnp.bfloat16) for _ in range(2)]
    own = rng.permutation(pages)[:tokens].astype(np.int32)
    own[::3] = pages + np.arange(len(own[::3]))  # empty rows: not written
    places = rng.integers(0, page, tokens).astype(np.int32)
    arguments = parts_PTo, turns, *pools, jnp.int32(1), jnp.asarray(own), jnp.asarray(places), sizes
    got, expected = (function(*arguments) for function in (layer_decode.rotate_and_write, layer_parts.rotate_and_write))
    assert np.array_equal(np.asarray(got[2], np.float32), np.asarray(expected[2], np.float32)), "values"
    assert (np.asarray(got[1] == pools[0]) == np.asarray(expected[1] == pools[0])).mean() > 0.99, "keys that are not written"
    return max(difference(*pair) for pair in zip(got[:2], expected[:2], strict=True)) / 2**-7 * 1e-6


FEW = {
    "norm of one token": (norm, 1, 96, 3, 1, False),
    "norm after experts": (norm, 5, 100, 2, 4, True),
    "rotation, odd numbers of heads": (rotation, 4, HeadSizes(9, 3, 16), 2, 4),
    "rotation, one token": (rotation, 1, HeadSizes(16, 8, 32), 1, 8),
}
"""Cases without --all: the interpreter is slow."""
CASES = FEW | {
    "norm of the 120b": (norm, 3, 2880, 5, 1, False),
    "norm of the 120b after experts": (norm, 2, 2880, 1, 4, True),
    "norm of a power of two": (norm, 7, 128, 1, 1, True),
    "rotation of the 120b": (rotation, 3, HeadSizes(64, 8, 64), 3, 128),
    "rotation of heads of 128": (rotation, 7, HeadSizes(28, 4, 128), 2, 16),
}


def main() -> None:
    layer_decode.call_kernel = interpret
    cases = CASES if "--all" in sys.argv else FEW
    print(json.dumps({name: function(*case) for name, (function, *case) in cases.items()}))


if __name__ == "__main__":
    main()
