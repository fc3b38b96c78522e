"""Sorts routed rows by the kernel in Triton's interpreter, on the CPU. Prints as JSON whether each case matches plain JAX.

TRITON_INTERPRET=1 python tests/kernels/interpreted_expert_rows.py
"""

import json
import sys

import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import expert_rows_decode
from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.expert_rows_decode import sort_rows_of_layer


def same(tokens: int, experts: int, share: int, block: int, skew: float, layer: int, elsewhere: int = 0) -> bool:
    """Whether both sort alike. A large skew sends all tokens to the same experts. Blocks without rows may name any expert of the layer."""
    rng = np.random.default_rng(tokens)
    order = np.argsort(rng.normal(size=(tokens, experts + elsewhere)) + skew * np.arange(experts + elsewhere), axis=1)
    index_TX = jnp.asarray(np.minimum(order[:, :share], experts).astype(np.int32))
    here = int((index_TX < experts).sum())
    got, expected = sort_rows_of_layer(index_TX, experts, block, jnp.int32(layer)), sort_rows(index_TX, experts, block)
    used = np.asarray(expected.blocks[2]) > 0
    experts_b, *rest = np.asarray(got.blocks)
    right = [
        np.array_equal(got.slots[:here], expected.slots[:here]),
        np.array_equal(rest[1], expected.blocks[2]),
        np.array_equal(rest[0][used], np.asarray(expected.blocks[1])[used]),
        np.array_equal(experts_b[used], np.asarray(expected.blocks[0])[used] + layer * experts),
        ((experts_b >= layer * experts) & (experts_b < (layer + 1) * experts)).all(),
    ]
    return bool(all(right))


CASES = {
    "one token": (1, 8, 3, 8, 0.0, 0),
    "some tokens of a later layer": (13, 8, 2, 8, 0.0, 5),
    "the same experts for all": (37, 12, 4, 8, 100.0, 1),
    "full blocks": (32, 4, 4, 16, 0.0, 2),
    "many": (128, 32, 4, 8, 0.0, 3),
    "several programs, experts not a power of two": (100, 12, 4, 16, 0.3, 1),
    "most are elsewhere": (100, 8, 4, 8, 0.0, 1, 24),
    "elsewhere, experts not a power of two": (50, 6, 3, 8, 0.1, 2, 6),
}

FEW = ("one token", "the same experts for all", "several programs, experts not a power of two", "most are elsewhere")
"""Cases without --all: the interpreter is slow."""


def main() -> None:
    expert_rows_decode.call_kernel = interpret
    print(json.dumps({name: same(*case) for name, case in CASES.items() if name in FEW or "--all" in sys.argv}))


if __name__ == "__main__":
    main()
