"""Experts and attention spread over meshes of four imitated devices, beside the same on one: prints the largest relative errors as JSON."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from discover_jax.kernels.experts import mix_reference  # noqa: E402
from discover_jax.kernels.packed_attention import windowed_attention_reference  # noqa: E402
from discover_jax.kernels.spread import spread_attention, spread_experts  # noqa: E402
from discover_jax.models.sharding import make_mesh  # noqa: E402

EXPERTS, ACTIVE, WIDTH = 8, 2, 16
MESHES = [(1, 4, 1), (2, 2, 1)]


class Matrix:
    def __init__(self, weight: jax.Array):
        self.own = {"weight": weight}

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        return self.own

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        return x_Ti @ one["weight"].T


def experts(mix: Any, tokens: int) -> list[np.ndarray]:
    """Output and derivatives; the last expert gets no token, the one before all of them."""
    rng = np.random.default_rng(tokens)
    index = np.stack([np.full(tokens, EXPERTS - 2), rng.integers(0, EXPERTS - 2, tokens)], axis=1).astype(np.int32)
    draw = [rng.normal(size=s) for s in ((tokens, WIDTH), (tokens, ACTIVE), (EXPERTS, 2 * WIDTH, WIDTH), (EXPERTS, WIDTH, WIDTH))]
    d_out = jnp.asarray(rng.normal(size=(tokens, WIDTH)), jnp.float32)

    def passes(x: Any, weights: Any, up: Any, low: Any) -> Any:
        options = {"experts": EXPERTS, "adapted": False, "limit": 7.0, "alpha": 1.7}
        out, pull = jax.vjp(lambda x, w, up, low: mix(x, jnp.asarray(index), w, Matrix(up), Matrix(low), **options), x, weights, up, low)
        return out, pull(d_out)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(passes)(*(jnp.asarray(x, jnp.float32) for x in draw)))]


def attention(attend: Any, rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(rows)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(rows, 9, n, 8)), jnp.float32) for n in (4, 2, 2, 4))
    segments = jnp.asarray(rng.integers(1, 3, (rows, 9)).cumsum(axis=1) // 4 + 1, jnp.int32)
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)

    def passes(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, sinks, window=5), q, k, v)
        return out, pull(d_out)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(passes)(q, k, v))]


def main() -> None:
    found = {}
    cases = {
        "experts": (experts, mix_reference, spread_experts),
        "attention": (attention, windowed_attention_reference, spread_attention),
    }
    for name, (run, alone, spread) in cases.items():
        for count in (12, 5):
            expected = run(alone, count)
            for shape in MESHES:
                got = run(spread(alone, make_mesh(*shape)), count)
                errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, expected, strict=True)]
                found[f"{name} of {count} on {shape}"] = float(max(errors))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
