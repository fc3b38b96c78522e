"""Runs the projection kernels in Triton's interpreter, on the CPU, and prints their relative errors against float64 as JSON.

TRITON_INTERPRET=1 python tests/kernels/interpreted_projections.py
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from interpreter import interpret

from discover_jax.kernels import projections_decode
from discover_jax.kernels.projections import Stack
from discover_jax.kernels.projections_decode import Launch, project

LAYERS, RANK, SCALE = 3, 8, 0.5


def error(rows: int, width: int, outs: tuple[int, ...], layer: int, adapted: bool, launch: Launch, biased: bool = True) -> float:
    """The largest of the projections' relative errors."""
    rng = np.random.default_rng(rows)

    def draw(*shape: int) -> jax.Array:
        return jax.device_put((0.3 * rng.normal(size=shape)).astype(jnp.bfloat16))

    def float64(x: jax.Array) -> np.ndarray:
        return np.array(x.astype(jnp.float32), np.float64)

    x = draw(rows, width)
    stacks = [
        Stack(
            draw(LAYERS, out, width),
            draw(LAYERS, out) if biased else None,
            *((draw(LAYERS, RANK, width), draw(LAYERS, out, RANK)) if adapted else ()),
        )
        for out in outs
    ]
    worst = 0.0
    for got, stack in zip(project(x, stacks, jnp.int32(layer), SCALE, launch), stacks, strict=True):
        weight, bias = float64(stack.weight[layer]), 0.0 if stack.bias is None else float64(stack.bias[layer])
        if stack.lora_a is not None and stack.lora_b is not None:
            weight = weight + SCALE * float64(stack.lora_b[layer]) @ float64(stack.lora_a[layer])
        expected = float64(x) @ weight.T + bias
        worst = max(worst, float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected)))
        if np.isnan(np.asarray(got)).any():
            worst = float("nan")
    return worst


CASES = {
    "one row": (1, 128, (64, 32, 32), 2, True, Launch(32, 1, 2, 4)),
    "parts that do not divide": (9, 320, (64, 32, 32), 0, True, Launch(64, 3, 2, 4)),
    "one projection without an adapter": (20, 192, (48,), 1, False, Launch(64, 2, 2, 4)),
    "without biases": (3, 128, (32, 16), 1, True, Launch(32, 1, 2, 4), False),
    "rows as the left operand": (40, 320, (64, 32, 32), 2, True, Launch(32, 3, 2, 4)),
    "two blocks of rows": (130, 64, (32, 32), 1, True, Launch(32, 1, 2, 4)),
}


def main() -> None:
    projections_decode.call_kernel = interpret
    print(json.dumps({name: error(*case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
