"""Runs operations split over meshes of four simulated devices and on one device. Prints the largest relative differences as JSON."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from discover_jax.kernels import experts_update_tpu  # noqa: E402
from discover_jax.kernels.exchange import Exchange  # noqa: E402
from discover_jax.kernels.experts_update_pallas import Tiles  # noqa: E402
from discover_jax.kernels.kernel_set import REFERENCE, KernelSet, reference_set  # noqa: E402
from discover_jax.kernels.spread import row_devices, spread_exchanging_experts  # noqa: E402
from discover_jax.models.sharding import make_mesh  # noqa: E402

EXPERTS, ACTIVE, WIDTH = 8, 2, 16
MESHES = [(1, 4, 1), (2, 2, 1), (2, 1, 2)]


class Matrix:
    scale = 0.5

    def __init__(self, weight: jax.Array, adapter: tuple[jax.Array, jax.Array] | None = None):
        self.own = {"weight": weight, "bias": jnp.ones(weight.shape[:2])}
        self.own |= {} if adapter is None else dict(zip(("lora_a", "lora_b"), adapter, strict=True))

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        return self.own

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        low = self.scale * (x_Ti @ one["lora_a"].T) @ one["lora_b"].T if "lora_a" in one else 0
        return x_Ti @ one["weight"].T + one["bias"] + low


def experts(moe: Any, tokens: int) -> list[np.ndarray]:
    """Output and derivatives. The last expert gets no token; the one before it gets all."""
    rng = np.random.default_rng(tokens)
    index = np.stack([np.full(tokens, EXPERTS - 2), rng.integers(0, EXPERTS - 2, tokens)], axis=1).astype(np.int32)
    draw = [rng.normal(size=s) for s in ((tokens, WIDTH), (tokens, ACTIVE), (EXPERTS, 2 * WIDTH, WIDTH), (EXPERTS, WIDTH, WIDTH))]
    d_out = jax.device_put(rng.normal(size=(tokens, WIDTH)).astype(np.float32))

    def passes(x: Any, weights: Any, up: Any, low: Any) -> Any:
        options = {"experts": EXPERTS, "adapted": False, "limit": 7.0, "alpha": 1.7}
        out, pull = jax.vjp(lambda x, w, up, low: moe(x, jnp.asarray(index), w, Matrix(up), Matrix(low), **options), x, weights, up, low)
        return out, pull(d_out)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(passes)(*(jnp.asarray(x, jnp.float32) for x in draw)))]


def routing(route: Any, tokens: int) -> list[np.ndarray]:
    logits = jax.device_put(np.random.default_rng(tokens).normal(size=(tokens, EXPERTS)).astype(np.float32))
    index, weights, rows = jax.jit(lambda x: route(x, ACTIVE, jnp.int32(1)))(logits)
    assert rows is None
    return [np.asarray(index), np.asarray(weights)]


def adapted_experts(moe: Any, tokens: int) -> list[np.ndarray]:
    """As `experts`, with adapters, and with their derivatives instead of those of the weights."""
    rng = np.random.default_rng(tokens)
    index = np.stack([np.full(tokens, EXPERTS - 2), rng.integers(0, EXPERTS - 2, tokens)], axis=1).astype(np.int32)
    up, low = (jax.device_put(rng.normal(size=(EXPERTS, out, WIDTH)).astype(np.float32)) for out in (2 * WIDTH, WIDTH))
    shapes = [(tokens, WIDTH), (tokens, ACTIVE), *[(EXPERTS, *sizes) for sizes in ((3, WIDTH), (2 * WIDTH, 3), (3, WIDTH), (WIDTH, 3))]]
    leaves = [jax.device_put((0.5 * rng.normal(size=shape)).astype(np.float32)) for shape in shapes]
    d_out = jax.device_put(rng.normal(size=(tokens, WIDTH)).astype(np.float32))

    def passes(*leaves: Any) -> Any:
        def run(x: Any, weights: Any, *adapters: Any) -> jax.Array:
            options = {"experts": EXPERTS, "adapted": True, "limit": 7.0, "alpha": 1.7}
            return moe(x, jnp.asarray(index), weights, Matrix(up, adapters[:2]), Matrix(low, adapters[2:]), **options)

        out, pull = jax.vjp(run, *leaves)
        return out, *pull(d_out)

    return [np.asarray(leaf) for leaf in jax.jit(passes)(*leaves)]


def tpu_experts(mesh: Any, tokens: int, most: int, *, ring: bool) -> list[np.ndarray]:
    """By the TPU's kernels, interpreted in float32, with at most this many tokens exchanged at once, in chunks or around a ring."""
    order = {4: (0, 2, 3, 1), 2: (1, 0)}[mesh.shape["expert"]] if ring else ()

    def moe(x: Any, index: Any, weights: Any, up: Any, low: Any, *, limit: float, alpha: float, axis: str = "", **_: Any) -> Any:
        tiles = Tiles(rows=16, blocks=2, interpret=True)
        layer = experts_update_tpu.Layer(
            limit, alpha, up.scale, low.scale, tiles, Exchange(axis, most, 2 if order else 1, order if axis else ())
        )
        arrays = [dict(one.arrays(adapted=True)) for one in (up, low)]
        adapters: Any = tuple((own.pop("lora_a"), own.pop("lora_b")) for own in arrays)
        return experts_update_tpu.moe_sorted(x, weights, adapters, index, *arrays, layer)

    return adapted_experts(spread_exchanging_experts(moe, mesh), tokens)


def attention(attend: Any, rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(rows)
    q, k, v, d_out = (jax.device_put(rng.normal(size=(rows, 9, n, 8)).astype(np.float32)) for n in (4, 2, 2, 4))
    segments = jax.device_put((rng.integers(1, 3, (rows, 9)).cumsum(axis=1) // 4 + 1).astype(np.int32))
    sinks = jax.device_put(rng.normal(size=4).astype(np.float32))

    def passes(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, sinks, window=5), q, k, v)
        return out, pull(d_out)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(passes)(q, k, v))]


def cached(kernels: KernelSet, parts: int, copies: int) -> list[np.ndarray]:
    """Attention outputs: a prompt is prefilled into pages of each device, then tokens are decoded with each row's pages on its device.

    On one device, the prompt is prefilled in as many copies.
    """
    rng = np.random.default_rng(0)
    rows, layers, each, size, kv_heads, head_size = 8, 2, 6, 4, 2, 8
    own = rows // parts  # rows of a device; the first page of device d is `d * own * each`
    pool = jnp.full((layers, rows * each, kv_heads, size, head_size), jnp.nan)  # places that were not written must not be read
    layer, sinks = jnp.int32(1), jax.device_put(rng.normal(size=4).astype(np.float32))

    def draw(*shape: int) -> Any:
        return jax.device_put(rng.normal(size=shape).astype(np.float32))

    # One prompt of three pages, the last half full, goes into the last three pages of every device.
    prompt_R3 = jnp.asarray([[(device + 1) * own * each - 3 + i for i in range(3)] for device in range(parts)], jnp.int32)
    q, k, v = (jnp.tile(draw(1, 12, heads, head_size), (copies, 1, 1, 1)) for heads in (4, kv_heads, kv_heads))
    keys, values = jax.jit(kernels.write_pages)(pool, pool, layer, prompt_R3, k, v)
    read = jax.jit(kernels.prefill_attention)(q, keys, values, layer, prompt_R3, jnp.zeros(copies, jnp.int32), sinks)
    ring = [jnp.tile(draw(1, kv_heads, 5, head_size), (copies, 1, 1, 1)) for _ in range(2)]
    slid = jax.jit(kernels.prefill_windowed_attention)(q, *ring, k, v, jnp.full(copies, 7), jnp.int32(0), sinks)
    # Rows of two pages and a partial one. A row without a place writes nothing.
    pages_BM = jnp.asarray([[(row // own) * own * each + (row % own) * 3 % (own * each - 3) + i for i in range(3)] for row in range(rows)])
    starts = jnp.arange(rows)
    for place in range(9):
        page_B = jnp.where(starts == 3, rows * each, pages_BM[:, place // size])
        options = (jnp.full(rows, place % size), draw(rows, kv_heads, head_size), draw(rows, kv_heads, head_size))
        tokens = 1 if place else 2  # an option reaches the implementation
        keys, values = jax.jit(kernels.write_token, static_argnames="tokens")(
            keys, values, layer, page_B.astype(jnp.int32), *options, tokens=tokens
        )
    counts_B = jnp.asarray([1, 9, 5, 1, 8, 9, 4, 3], jnp.int32)
    table_BM = pages_BM.at[3].set((3 // own) * own * each + own * each - 3).astype(jnp.int32)  # this row reads the prompt's first page
    out = jax.jit(kernels.paged_attention)(draw(rows, 4, head_size), keys, values, layer, table_BM, counts_B, sinks)
    return [np.asarray(x) for x in (read[:1], slid[:1], out)]


def main() -> None:
    found = {}
    for count in (12, 5):
        for name, run, operation in (
            ("experts", experts, "experts"),
            ("attention", attention, "windowed_attention"),
            ("routing", routing, "decode_routing"),
        ):
            expected = run(getattr(REFERENCE, operation), count)
            for shape in MESHES:
                spread = getattr(reference_set(make_mesh(*shape)), operation)
                found[f"{name} of {count} on {shape}"] = worst(run(spread, count), expected)
    for shape in MESHES[:2]:  # kernels of experts do not support `tensor`
        for tokens, most in ((12, 100), (12, 5), (5, 5)):  # at once, in chunks that padding fills up, and tokens that do not divide evenly
            expected = adapted_experts(REFERENCE.experts, tokens)
            for ring in (False, True):
                how = "around a ring" if ring else "at once"
                got = tpu_experts(make_mesh(*shape), tokens, most, ring=ring)
                found[f"TPU experts of {tokens} on {shape}, {most} {how}"] = worst(got, expected)
    for shape in MESHES:
        mesh = make_mesh(*shape)
        parts = row_devices(mesh)
        expected = cached(REFERENCE, parts, parts)
        found[f"cache on {shape}"] = worst(cached(reference_set(mesh), parts, 1), expected)
    print(json.dumps(found))


def worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, expected, strict=True)))


if __name__ == "__main__":
    main()
