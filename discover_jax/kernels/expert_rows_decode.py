"""Routed rows made compact, on a GPU: `expert_rows.sort_rows` of few tokens in one launch. Needs the extra `kernels`."""

import jax
import jax.numpy as jnp

from discover_jax.kernels import expert_rows_triton
from discover_jax.kernels.expert_rows import Blocks, most_blocks, sort_rows
from discover_jax.kernels.triton_call import call_kernel

MOST_TOKENS = 256
"""One program holds a number for each token and expert."""


def _power(number: int) -> int:
    """The next power of two, and at least 16."""
    return max(16, 1 << (number - 1).bit_length())


def sort_rows_of_layer(index_TX: jax.Array, experts: int, block: int, layer: jax.Array | int) -> Blocks:
    """`sort_rows`, with `layer * experts` added to the experts of blocks, as they are numbered in a stack of layers."""
    tokens, share = index_TX.shape
    if tokens > MOST_TOKENS:
        rows = sort_rows(index_TX, experts, block)
        return rows._replace(blocks=rows.blocks.at[0].add(layer * experts))
    most = most_blocks(tokens * share, experts, block)
    slots, blocks = call_kernel(
        expert_rows_triton.sort,
        *(index_TX.astype(jnp.int32), jnp.asarray(layer, jnp.int32).reshape(1), tokens, most),
        out=[jax.ShapeDtypeStruct((tokens * share,), jnp.int32), jax.ShapeDtypeStruct((3, most), jnp.int32)],
        grid=(1,),
        warps=16 if tokens > 32 else 4,
        stages=1,
        constants={
            "E": experts,
            "X": share,
            "BLOCK": block,
            "TOKENS": _power(tokens),
            "EXPERTS": _power(experts),
            "MOST": _power(most),
        },
    )
    return Blocks(slots, blocks)
