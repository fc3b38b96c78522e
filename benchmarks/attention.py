"""Decoding attention at gpt-oss's heads, beside this GPU's copy bandwidth, measured in the same run, and beside the plain-JAX reference.

    python benchmarks/attention.py [--cases=NAME,NAME] [--json=FILE]

One new token a row attends to its pages, in one scan over the layers of a stack of pools, as the sampler's step does. Rates count the
keys and values in use, each once; the copy's count bytes read and written. Pages of a row lie anywhere. `layer` is the whole loop's time a
layer, the best of five repetitions; where little is read, it is the host's time for starting kernels. `kernels` is what a profile says of
the two kernels alone. Errors are the largest of one layer's outputs against float32, relative to the largest output. Needs a GPU and the
extra `kernels`.
"""

import argparse
import collections
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels import ceilings, seconds

from discover_jax.kernels.attention import paged_attention_reference
from discover_jax.kernels.attention_decode import paged_attention

HEADS, KV_HEADS, SIZE, PAGE = 64, 8, 64, 128
LAYERS = 18
"""Of a pool: the full layers, or the sliding ones, of gpt-oss-120b. Together they are far larger than a GPU's cache."""

CASES: dict[str, list[int]] = {
    "128 x ring": [PAGE] * 128,
    "128 x 1k": [1024] * 128,
    "128 x 4k": [4096] * 128,
    "128 x 8k": [8192] * 128,
    "26k + 127 x 2k": [26_000] + [2048] * 127,
    "1 to 8k": list(range(64, 8193, 64)),
    "32 x 4k": [4096] * 32,
    "1 x ring": [PAGE],
    "1 x 1k": [1024],
    "1 x 8k": [8192],
    "1 x 26k": [26_000],
}
"""Places in use of each row."""


def pool(key: jax.Array, pages: int) -> jax.Array:
    """Random keys or values [L, P, K, s, H]."""
    shape = (pages, KV_HEADS, PAGE, SIZE)
    return jax.jit(lambda k: jax.lax.map(lambda one: jax.random.normal(one, shape, jnp.bfloat16), jax.random.split(k, LAYERS)))(key)


def rows(counts: list[int], pages: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, a table for rows of up to 8k (or the longest, if that is longer; for rings, of one page), and counts."""
    used = [-(-count // PAGE) for count in counts]
    columns = 1 if max(used) == 1 else max(64, *used)
    table = np.full((len(counts), columns), 2**30, np.int32)
    for row, own in enumerate(np.split(np.random.default_rng(0).permutation(pages)[: sum(used)], np.cumsum(used)[:-1])):
        table[row, : used[row]] = own
    q_BNH = jax.random.normal(jax.random.key(1), (len(counts), HEADS, SIZE), jnp.bfloat16)
    return q_BNH, jnp.asarray(table), jnp.array(counts, jnp.int32)


def loop(attend: Callable[..., jax.Array], keys: jax.Array, values: jax.Array, counts: list[int]) -> Callable[[], jax.Array]:
    """A call of the attention of all layers, one after the other."""
    q_BNH, table, counts_B = rows(counts, keys.shape[1])

    @jax.jit
    def layers(q_BNH: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, counts_B: jax.Array) -> jax.Array:
        def layer(q_BNH: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            return 0.5 * q_BNH + attend(q_BNH, keys, values, i, table, counts_B, jnp.ones(HEADS, jnp.bfloat16)), None

        return jax.lax.scan(layer, q_BNH, jnp.arange(LAYERS))[0]

    return lambda: layers(q_BNH, keys, values, table, counts_B)


def kernel_seconds(call: Callable[[], jax.Array]) -> dict[str, float]:
    """Mean duration on the device of each of the attention's kernels in a call."""
    found = collections.defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if plane.name.startswith("/device:") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    if event.name in ("attend", "merge"):
                        found[event.name].append(event.duration_ns)
    return {name: 1e-9 * float(np.mean(durations)) for name, durations in found.items()}


def relative_error(attend: Callable[..., jax.Array], keys: jax.Array, values: jax.Array, counts: list[int]) -> float:
    q_BNH, table, counts_B = rows(counts, keys.shape[1])
    rest, sinks_N = (table, counts_B), jnp.ones(HEADS, jnp.float32)
    got = jax.jit(attend)(q_BNH, keys, values, jnp.int32(LAYERS - 1), *rest, sinks_N).astype(jnp.float32)

    @jax.jit
    def expected(q_BNH: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        last = (x[LAYERS - 1 :].astype(jnp.float32) for x in (keys, values))
        return paged_attention_reference(q_BNH.astype(jnp.float32), *last, jnp.int32(0), *rest, sinks_N)

    with jax.default_matmul_precision("highest"):
        right = expected(q_BNH, keys, values)
    return float(jnp.abs(got - right).max() / jnp.abs(right).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help="names of CASES, in the module")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    copy = ceilings()["copy_bytes_per_s"]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")}
    result = {"device": jax.devices()[0].device_kind, **versions, "copy_bytes_per_s": copy, "rows": []}
    print(", ".join(f"{name} {value}" for name, value in (("device", result["device"]), *versions.items())))
    print(f"copy {copy / 1e12:.2f} TB/s")
    print("case            | layer           of copy   | kernels   of copy | reference           | error")
    pages = max(sum(-(-count // PAGE) for count in CASES[name]) for name in arguments.cases)
    keys, values = (pool(jax.random.key(i), pages) for i in range(2))
    for name in arguments.cases:
        counts = CASES[name]
        run = loop(paged_attention, keys, values, counts)
        spent = seconds(run) / LAYERS
        plain = seconds(loop(paged_attention_reference, keys, values, counts)) / LAYERS
        kernels = kernel_seconds(run)
        bytes_read = sum(counts) * KV_HEADS * SIZE * 2 * keys.dtype.itemsize
        rate, alone = bytes_read / spent, bytes_read / sum(kernels.values()) if kernels else 0.0
        error = relative_error(paged_attention, keys, values, counts)
        row: dict[str, Any] = {"case": name, "layer_us": 1e6 * spent, "bytes_per_s": rate, "of_copy": rate / copy}
        row |= {f"{kernel}_us": 1e6 * one for kernel, one in kernels.items()} | {"kernels_of_copy": alone / copy}
        result["rows"].append({**row, "reference_us": 1e6 * plain, "relative_error": error})
        parts = " + ".join(f"{1e6 * one:.1f}" for one in kernels.values())
        print(
            f"{name:15s} | {1e6 * spent:7.1f} us {rate / 1e12:5.2f} TB/s {rate / copy:4.0%} | {parts:>12s} us {alone / copy:4.0%} |"
            f" {1e6 * plain:9.1f} us {plain / spent:5.1f}x | {error:.1e}",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
