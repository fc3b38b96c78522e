"""The choice of experts in decoding and its sorting, on a GPU, in one launch for few tokens or in two. Needs the extra `cuda`."""

import jax
import jax.numpy as jnp

from discover_jax.kernels import route_triton
from discover_jax.kernels.expert_rows import Blocks, most_blocks
from discover_jax.kernels.expert_rows_decode import sort_rows_of_layer
from discover_jax.kernels.experts import route_reference
from discover_jax.kernels.experts_decode import choose_tiling
from discover_jax.kernels.fallback import note_reference
from discover_jax.kernels.triton_call import call_kernel, power_of_two

ONE_LAUNCH = 2**12
"""Limit of one launch on `padded_logits`. One kernel instance holds all of them in registers. On an H200, it is faster than plain JAX up to
this limit, and slower with four times as many (benchmarks/kernels_routing.py)."""
MOST_LOGITS = 2**14
"""Limit of two launches in `route_sorted`: the most that were measured. Two launches were faster than plain JAX. Chunks of prompts
have more logits, but spend little of their time on routing."""
STEP = 64
"""Blocks that the kernel describes at once."""
TOKENS = 4
"""Tokens per kernel instance that only chooses."""


def route_sorted(logits_TE: jax.Array, experts_per_token: int, layer: jax.Array | int) -> tuple[jax.Array, jax.Array, Blocks | None]:
    """`route_reference` by the kernels, with the choices sorted for `experts_decode.moe_routed`; for many logits, the reference."""
    if padded_logits(*logits_TE.shape) > MOST_LOGITS:
        note_reference("decode_routing", f"{' x '.join(map(str, logits_TE.shape))} logits are above {MOST_LOGITS}, the most measured")
        return route_reference(logits_TE, experts_per_token, layer)
    return route_parts(logits_TE[None], experts_per_token, layer)


def route_parts(parts_PTE: jax.Array, experts_per_token: int, layer: jax.Array | int) -> tuple[jax.Array, jax.Array, Blocks]:
    """`route_sorted` of the sum of the logits' parts, float32, by the kernels for any number of logits."""
    if padded_logits(*parts_PTE.shape[1:]) <= ONE_LAUNCH:
        return _in_one_launch(parts_PTE, experts_per_token, layer)
    return _in_two_launches(parts_PTE, experts_per_token, layer)


def padded_logits(tokens: int, experts: int) -> int:
    """Tokens times experts, each rounded up to a power of two."""
    return max(2, power_of_two(tokens)) * max(2, power_of_two(experts))


def _in_two_launches(parts_PTE: jax.Array, experts_per_token: int, layer: jax.Array | int) -> tuple[jax.Array, jax.Array, Blocks]:
    parts, tokens, experts = parts_PTE.shape
    own = min(TOKENS, max(2, power_of_two(tokens)))
    shape = (tokens, experts_per_token)
    index_TX, weights_TX = call_kernel(
        route_triton.choose,
        *(parts_PTE.astype(jnp.float32), tokens),
        out=[jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        grid=(-(-tokens // own),),
        warps=1,
        stages=1,
        constants={"E": experts, "EXPERTS": max(2, power_of_two(experts)), "X": experts_per_token, "TOKENS": own, "PARTS": parts},
    )
    block = choose_tiling(tokens * experts_per_token, experts).rows
    return index_TX, weights_TX, sort_rows_of_layer(index_TX, experts, block, layer)


def _in_one_launch(parts_PTE: jax.Array, experts_per_token: int, layer: jax.Array | int) -> tuple[jax.Array, jax.Array, Blocks]:
    parts, tokens, experts = parts_PTE.shape
    padded, width = max(2, power_of_two(tokens)), max(2, power_of_two(experts))
    routed = tokens * experts_per_token
    block = choose_tiling(routed, experts).rows
    most = most_blocks(routed, experts, block)
    shapes = [
        ((tokens, experts_per_token), jnp.int32),
        ((tokens, experts_per_token), jnp.float32),
        ((routed,), jnp.int32),
        ((3, most), jnp.int32),
    ]
    index_TX, weights_TX, slots, blocks = call_kernel(
        route_triton.route,
        *(parts_PTE.astype(jnp.float32), jnp.asarray(layer, jnp.int32).reshape(1), tokens, most),
        out=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid=(1,),
        warps=max(4, padded * width // 1024),
        stages=1,
        constants={
            "E": experts,
            "EXPERTS": width,
            "X": experts_per_token,
            "TOKENS": padded,
            "BLOCK": block,
            "STEP": min(STEP, max(2, power_of_two(most))),
            "PARTS": parts,
        },
    )
    return index_TX, weights_TX, Blocks(slots, blocks)
