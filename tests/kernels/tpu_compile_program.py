"""Compiles the update's attention for a TPU topology that this machine does not have. Prints seconds and bytes of temporaries.

Usage: JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tpu_compile_program.py v5p:2x2x1
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from discover_jax.kernels.kernel_set import kernel_set

CASES = {
    "gpt-oss": (34_192, 64, 8, 64, 128),
    "qwen2.5-1.5b": (8_192, 12, 2, 128, 1_000),
}
"""Tokens of a row, query heads, key/value heads, head size and window."""
ROWS = PartitionSpec(("data", "expert"))


def compile_one(mesh, attend, tokens, heads, kv_heads, size, *, backward):
    """Compiles one pass, or both, with a row on each device."""

    def shape(*sizes, dtype=jnp.bfloat16, spec=ROWS):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def both(q, k, v, segments, sinks, d_out):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, sinks), q, k, v)
        return (out, *pull(d_out)) if backward else out

    rows = mesh.size
    q, k = shape(rows, tokens, heads, size), shape(rows, tokens, kv_heads, size)
    segments, sinks = shape(rows, tokens, dtype=jnp.int32), shape(heads, dtype=jnp.float32, spec=PartitionSpec())
    return jax.jit(both).lower(q, k, k, segments, sinks, q).compile()


def main(topology):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(1, -1, 1), ("data", "expert", "tensor"))
    kernels = kernel_set("tpu", mesh)
    for name, (tokens, heads, kv_heads, size, window) in CASES.items():
        for attend in (kernels.packed_attention, functools.partial(kernels.windowed_attention, window=window)):
            for backward in (False, True):
                start = time.perf_counter()
                compiled = compile_one(mesh, attend, tokens, heads, kv_heads, size, backward=backward)
                kind = "full" if attend is kernels.packed_attention else f"window {window}"
                said = f"{name}, {kind}, {'both passes' if backward else 'forward'}: {time.perf_counter() - start:.1f} s"
                assert "attention_forward" in compiled.as_text()
                print(f"temporaries of {topology}, {said}, bytes: {compiled.memory_analysis().temp_size_in_bytes}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
