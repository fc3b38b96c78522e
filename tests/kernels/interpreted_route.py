"""Chooses and sorts experts by the kernel in Triton's interpreter, on the CPU. Prints as JSON whether each case matches plain JAX.

TRITON_INTERPRET=1 python tests/kernels/interpreted_route.py [--all]
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import expert_rows_decode, route_decode
from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import route_top
from discover_jax.kernels.experts_decode import choose_tiling
from discover_jax.kernels.route_decode import route_parts, route_sorted

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0], np.float32)


def same(tokens: int, experts: int, share: int, layer: int, kind: str = "normal", parts: int = 1) -> bool:
    """Whether choices, sorted rows and used blocks are equal, and weights up to rounding.

    With `parts`, the logits come in parts. All numbers are multiples of 1/64, so that their sum is exact.
    """
    rng = np.random.default_rng(tokens)
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "one expert":
        logits += 1e3 * (np.arange(experts) < share)
    elif kind == "special":
        logits = rng.choice(SPECIAL, size=(tokens, experts))
    if parts == 1:
        index_TX, weights_TX, rows = route_sorted(jnp.asarray(logits), share, jnp.int32(layer))
    else:
        parts_PTE = np.round(64 * rng.normal(size=(parts, tokens, experts))) / 64
        logits = parts_PTE.sum(axis=0).astype(np.float32)
        index_TX, weights_TX, rows = route_parts(jnp.asarray(parts_PTE, jnp.float32), share, jnp.int32(layer))
    right_TX, right_weights_TX = jax.jit(route_top, static_argnums=1)(logits, share)
    assert rows is not None
    expected = jax.jit(sort_rows, static_argnums=(1, 2))(right_TX, experts, choose_tiling(tokens * share, experts).rows)
    used = np.asarray(expected.blocks[2]) > 0
    experts_b, *rest = np.asarray(rows.blocks)
    right = [
        np.array_equal(index_TX, right_TX),
        np.allclose(weights_TX, right_weights_TX, rtol=1e-6, atol=1e-7, equal_nan=True),
        np.array_equal(rows.slots, expected.slots),
        np.array_equal(rest[1], expected.blocks[2]),
        np.array_equal(rest[0][used], np.asarray(expected.blocks[1])[used]),
        np.array_equal(experts_b[used], np.asarray(expected.blocks[0])[used] + layer * experts),
        ((experts_b >= layer * experts) & (experts_b < (layer + 1) * experts)).all(),
    ]
    return all(right)


FEW = {
    "one token": (1, 32, 4, 0),
    "ties": (13, 12, 3, 5, "ties"),
    "all choose the same": (37, 32, 4, 1, "one expert"),
    "NaN, infinities, zeros of both signs, subnormals": (20, 12, 4, 1, "special"),
    "parts, in one launch": (5, 12, 3, 2, "normal", 3),
    "parts, in two launches": (37, 100, 4, 1, "normal", 2),
    "two launches, ties": (37, 100, 4, 1, "ties"),
}
"""Cases without --all: the interpreter is slow."""
CASES = FEW | {
    "one token of many experts": (1, 128, 4, 2),
    "128 rows of the 20b": (128, 32, 4, 3),
    "32 rows of the 120b": (32, 128, 4, 35),
    "32 rows of the 120b, ties": (32, 128, 4, 1, "ties"),
    "many tokens of few experts": (500, 8, 2, 1),
    "every expert": (9, 4, 4, 1, "ties"),
    "two tokens": (2, 128, 4, 1, "special"),
    "tokens not a power of two": (25, 128, 4, 1, "one expert"),
    "128 rows of the 120b, parts": (128, 128, 4, 35, "normal", 15),
    "128 rows of the 120b, special": (128, 128, 4, 2, "special"),
    "one more token than an instance has": (129, 128, 4, 0, "normal", 5),
}


def main() -> None:
    route_decode.call_kernel = expert_rows_decode.call_kernel = interpret
    print(json.dumps({name: bool(same(*case)) for name, case in (CASES if "--all" in sys.argv else FEW).items()}))


if __name__ == "__main__":
    main()
