"""Compiles the update's kernels for a TPU topology that this machine does not have. Prints seconds and bytes of temporaries. Checks that
the exchange of the experts' tokens overlaps with their kernels.

Usage: JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tpu_compile_program.py v5p:2x2x1 [attention|experts]
"""

import functools
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from discover_jax.kernels.kernel_set import kernel_set
from discover_jax.kernels.mxfp4_lanes import PARTS, powers_shape, words_shape

TOKENS = 34_192
"""Of the longest row of the report's third run."""
CASES = {
    "gpt-oss": (TOKENS, 64, 8, 64, 128),
    "qwen2.5-1.5b": (8_192, 12, 2, 128, 1_000),
}
"""Tokens of a row, query heads, key/value heads, head size and window."""
EXPERTS = {"gpt-oss-20b": 32, "gpt-oss-120b": 128}
WIDTH, ACTIVE, RANK = 2_880, 4, 8
ROWS = PartitionSpec(("data", "expert"))
HELD = PartitionSpec("expert")


def shape(mesh, *sizes, dtype=jnp.bfloat16, spec=ROWS):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))


def compile_attention(mesh, attend, tokens, heads, kv_heads, size, *, backward):
    """Compiles one pass, or both, with a row on each device."""

    def both(q, k, v, segments, sinks, d_out):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, sinks), q, k, v)
        return (out, *pull(d_out)) if backward else out

    rows = mesh.size
    q, k = shape(mesh, rows, tokens, heads, size), shape(mesh, rows, tokens, kv_heads, size)
    segments, sinks = shape(mesh, rows, tokens, dtype=jnp.int32), shape(mesh, heads, dtype=jnp.float32, spec=PartitionSpec())
    return jax.jit(both).lower(q, k, k, segments, sinks, q).compile()


class Matrix:
    """A packed matrix with an adapter."""

    scale, apply = 4.0, None

    def __init__(self, arrays):
        self.own = arrays

    def arrays(self, *, adapted):
        return self.own


def compile_experts(mesh, moe, experts):
    """Compiles both passes of a layer, with a row on each device and the experts split over all of them."""

    def packed(out, into, parts):
        of = functools.partial(shape, mesh, spec=HELD)
        lanes = of(experts, *words_shape(out, into, parts), dtype=jnp.int32)
        powers = of(experts, *powers_shape(out, into, parts), dtype=jnp.uint8)
        adapter = of(experts, RANK, into, dtype=jnp.float32), of(experts, out, RANK, dtype=jnp.float32)
        return {"lanes": lanes, "powers": powers, "bias": of(experts, out)}, adapter

    def both(x, weights, index, adapters, frozen, d_out):
        def forward(x, weights, adapters):
            named = (own | {"lora_a": a, "lora_b": b} for own, (a, b) in zip(frozen, adapters, strict=True))
            options = {"experts": experts, "adapted": True, "limit": 7.0, "alpha": 1.702}
            return moe(x, index, weights, *map(Matrix, named), **options)

        out, pull = jax.vjp(forward, x, weights, adapters)
        return out, pull(d_out)

    frozen, adapters = zip(packed(2 * WIDTH, WIDTH, PARTS["gate_up"]), packed(WIDTH, WIDTH, PARTS["down"]), strict=True)
    tokens = mesh.size * TOKENS
    x, d_out = (shape(mesh, tokens, WIDTH, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    weights, index = (shape(mesh, tokens, ACTIVE, dtype=dtype) for dtype in (jnp.float32, jnp.int32))
    return jax.jit(both).lower(x, weights, index, adapters, frozen, d_out).compile()


def sent_during_kernels(text):
    """For each loop over the experts' rows of a visit, the number of permutes that start before it and end after it."""
    found = []
    for body in re.split(r"\n\n", text):
        sent = 0
        for opcode in re.findall(r" (collective-permute-start|collective-permute-done|while)\(", body) if "%exchange_add" in body else ():
            sent += {"collective-permute-start": 1, "collective-permute-done": -1, "while": 0}[opcode]
            found.extend([sent] if opcode == "while" else [])
    return found


def report(topology, said, kernel, compile_one):
    """Compiles, checks that the kernel is used, and prints the figures."""
    start = time.perf_counter()
    compiled = compile_one()
    text = compiled.as_text()
    assert kernel in text
    if "experts" in kernel:
        # Two visits in each loop's body, forward and backward. Tokens and sums go both ways: four permutes. With the 20b on v5p:2x2x1, the
        # tokens of one of these visits leave after its kernels.
        sent = sent_during_kernels(text)
        assert len(sent) == 4, sent
        assert min(sent) >= (4 if "120b" in said else 2), sent
    seconds, temporaries = time.perf_counter() - start, compiled.memory_analysis().temp_size_in_bytes
    print(f"temporaries of {topology}, {said}: {seconds:.1f} s, bytes: {temporaries}", flush=True)


def main(topology, operations):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(1, -1, 1), ("data", "expert", "tensor"))
    kernels = kernel_set("tpu", mesh)
    for name, (*sizes, window) in CASES.items() if "attention" in operations else ():
        for attend in (kernels.packed_attention, functools.partial(kernels.windowed_attention, window=window)):
            for backward in (False, True):
                kind = "full" if attend is kernels.packed_attention else f"window {window}"
                said = f"{name}, {kind}, {'both passes' if backward else 'forward'}"
                one = functools.partial(compile_attention, mesh, attend, *sizes, backward=backward)
                report(topology, said, "attention_forward", one)
    for name, experts in EXPERTS.items() if "experts" in operations else ():
        one = functools.partial(compile_experts, mesh, kernels.experts, experts)
        report(topology, f"experts of {name}, both passes on {mesh.size} devices", "experts_activation", one)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["attention", "experts"])
