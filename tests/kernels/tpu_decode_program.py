"""Compiles the decoding kernels of TPUs for a topology that this machine does not have. Prints bytes of arguments and temporaries.

Each function is a scan over layers whose carry is the pool, as in the model. It fails if an array that a kernel reads in place is copied.

Usage: JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tpu_decode_program.py v5p:2x2x1
"""

import functools
import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from discover_jax.kernels import layer_tpu
from discover_jax.kernels.experts_decode_tpu import moe_lanes
from discover_jax.kernels.kernel_set import kernel_set
from discover_jax.kernels.layer_parts import Branch, HeadSizes
from discover_jax.kernels.mxfp4_lanes import powers_shape, words_shape
from discover_jax.kernels.projections import Stack

LAYERS, PAGE = 3, 128
WIDTH, EXPERTS, RANK = 2_880, 128, 8
CACHES = {
    "gpt-oss, pages": (128, 64, 8, 64, 1_024, 68, 0),
    "gpt-oss, rings": (128, 64, 8, 64, 128, 1, 0),
    "gpt-oss, prompt": (4, 64, 8, 64, 1_024, 68, 512),
    "qwen2.5-1.5b, pages": (64, 12, 2, 128, 512, 68, 0),
    "qwen2.5-0.5b, pages": (64, 14, 2, 64, 512, 68, 0),
}
"""Rows, query heads, key/value heads, head size, pages of the pool and of the longest row, and tokens of a prompt's chunk or 0."""


def cache_function(kernels, tokens):
    """Writes tokens and attends to the pages, in every layer, and copies a page."""

    def run(q, keys, values, pages, counts, sinks, k, v, to, places):
        def step(carry, layer):
            q, *pools = carry
            if tokens:
                pools = kernels.write_pages(*pools, layer, to, k, v)
                return (kernels.prefill_attention(q, *pools, layer, pages, counts, sinks), *pools), None
            pools = kernels.write_token(*pools, layer, to, places, k, v)
            return (kernels.paged_attention(q, *pools, layer, pages, counts, sinks), *pools), None

        (q, *pools), _ = jax.lax.scan(step, (q, keys, values), jnp.arange(LAYERS))
        return q, *kernels.copy_page(*pools, pages[0, 0], pages[1, 0])

    return run


def layer_function(kernels, sizes):
    """One token a row through the layers: norms, projections, rotation with writing, attention, and the router with its choice."""

    def run(x, keys, values, pages, counts, to, places, turns, stacks):
        norm, qkv, out, router, sinks = stacks
        zero = Branch(jnp.zeros((1, len(x), 1, x.shape[1]), jnp.float32))

        def step(carry, layer):
            x, *pools = carry
            x, normed = kernels.add_and_norm(x, zero, norm, layer, 1e-5, jnp.bfloat16)
            parts = kernels.project(normed, qkv, layer, 1.0)
            q, *pools = kernels.rotate_and_write(parts, turns, *pools, layer, to, places, sizes)
            attended = kernels.attend(q, *pools, layer, pages, counts, sinks)
            branch = Branch(kernels.project(attended.reshape(len(x), -1), [out], layer, 1.0)[:, :, None])
            x, normed = kernels.add_and_norm(x, branch, norm, layer, 1e-5, jnp.bfloat16)
            index, _, sent = kernels.route(normed, router, 4, layer)
            return (x + sent[:, : x.shape[1]], *pools), index

        return jax.lax.scan(step, (x, keys, values), jnp.arange(LAYERS))

    return run


def experts_function(experts):
    def run(x, index, weights, gate_up, down):
        def step(x, layer):
            options = {"experts": experts, "scales": (1.0, 1.0), "limit": 7.0, "alpha": 1.702, "elsewhere": EXPERTS - experts}
            return x + moe_lanes(x, index, weights, gate_up, down, layer=layer, **options).astype(x.dtype), None

        return jax.lax.scan(step, x, jnp.arange(LAYERS))[0]

    return run


def main(topology):
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    kernels = kernel_set("tpu")

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    def compile_one(name, function, arguments, donated, kernel, in_place):
        start = time.perf_counter()
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert kernel in text
        copied = [line for line in text.splitlines() if re.search(rf"= (bf16|s32|u8)\[{in_place}[^ ]* (copy|fusion|transpose)\(", line)]
        assert not copied, copied[0]
        print(f"{topology}, {name}: {time.perf_counter() - start:.1f} s", end=", ")
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))
        print(f"arguments {held}, with padding {memory.argument_size_in_bytes}, temporaries: {memory.temp_size_in_bytes}", flush=True)

    int32 = functools.partial(shape, dtype=jnp.int32)
    for name, (rows, heads, kv_heads, size, pool, columns, tokens) in CACHES.items():
        pools = [shape(LAYERS, pool, kv_heads, PAGE, size)] * 2
        of_row = (rows, tokens) if tokens else (rows,)
        new = [shape(*of_row, kv_heads, size)] * 2
        to = int32(rows, tokens // PAGE) if tokens else int32(rows)
        sinks = shape(heads, dtype=jnp.float32)
        arguments = shape(*of_row, heads, size), *pools, int32(rows, columns), int32(rows), sinks, *new, to, int32(rows)
        compile_one(name, cache_function(kernels, tokens), arguments, (1, 2), "attention_pages", f"{LAYERS},{pool},{kv_heads}")

    for rows in (16, 128):
        heads, kv_heads, size, pool = 64, 8, 64, 1_024
        pools = [shape(LAYERS, pool, kv_heads, PAGE, size)] * 2
        turns = (shape(rows, size // 2, dtype=jnp.float32),) * 2
        qkv = [Stack(shape(LAYERS, n * size, WIDTH), shape(LAYERS, n * size)) for n in (heads, kv_heads, kv_heads)]
        router = Stack(shape(LAYERS, EXPERTS, WIDTH), shape(LAYERS, EXPERTS))
        stacks = shape(LAYERS, WIDTH), qkv, Stack(shape(LAYERS, WIDTH, heads * size)), router, shape(LAYERS, heads)
        arguments = shape(rows, WIDTH, dtype=jnp.float32), *pools, int32(rows, 68), *[int32(rows)] * 3, turns, stacks
        function = layer_function(layer_tpu.KERNELS, HeadSizes(heads, kv_heads, size))
        in_place = f"{LAYERS},({pool},{kv_heads}|{EXPERTS},{WIDTH}|{heads * size},{WIDTH})"
        compile_one(f"a layer of gpt-oss, {rows} rows", function, arguments, (1, 2), "rotate_and_write", in_place)

    def matrix(experts, out, parts):
        words, powers = words_shape(out, WIDTH, parts), powers_shape(out, WIDTH, parts)
        small = {"bias": (out,), "lora_a": (RANK, WIDTH), "lora_b": (out, RANK)}
        held = {key: shape(LAYERS, experts, *sizes) for key, sizes in small.items()}
        return held | {"lanes": int32(LAYERS, experts, *words), "powers": shape(LAYERS, experts, *powers, dtype=jnp.uint8)}

    for tokens, experts in ((128, 16), (512, 16)):
        matrices = matrix(experts, 2 * WIDTH, 2), matrix(experts, WIDTH, 1)
        arguments = shape(tokens, WIDTH), int32(tokens, 4), shape(tokens, 4, dtype=jnp.float32), *matrices
        name = f"{experts} experts of gpt-oss-120b, {tokens} tokens"
        compile_one(
            name, experts_function(experts), arguments, (), "experts_decode", f"({LAYERS},{experts},[123],3|{LAYERS * experts}),[123],3"
        )


if __name__ == "__main__":
    main(sys.argv[1])
