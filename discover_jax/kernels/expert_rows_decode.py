"""`expert_rows.sort_rows` on a GPU, in one launch for few tokens. Needs the extra `cuda`."""

import jax
import jax.numpy as jnp

from discover_jax.kernels import expert_rows_triton
from discover_jax.kernels.expert_rows import Blocks, most_blocks, sort_rows
from discover_jax.kernels.triton_call import call_kernel, power_of_two

MOST_ROWS = 2048
"""Row limit of the kernel. It compares all pairs of rows; for more rows a sort is faster."""
OWN, STEP = 32, 64
"""Maximum number of rows that one kernel instance places, and that it compares at once."""


def sort_rows_of_layer(index_TX: jax.Array, experts: int, block: int, layer: jax.Array | int) -> Blocks:
    """`sort_rows` for one layer of a stack: adds `layer * experts` to the experts of the blocks, which index the stack."""
    routed = index_TX.size
    if routed > MOST_ROWS:
        rows = sort_rows(index_TX, experts, block)
        return rows._replace(blocks=rows.blocks.at[0].add(layer * experts))
    most, padded = most_blocks(routed, experts, block), max(2, power_of_two(routed))
    own = min(OWN, padded)
    slots, blocks = call_kernel(
        expert_rows_triton.sort,
        *(index_TX.reshape(-1).astype(jnp.int32), jnp.asarray(layer, jnp.int32).reshape(1), routed, most),
        out=[jax.ShapeDtypeStruct((routed,), jnp.int32), jax.ShapeDtypeStruct((3, most), jnp.int32)],
        grid=(-(-routed // own),),
        warps=4,
        stages=1,
        constants={
            "E": experts,
            "EXPERTS": max(2, power_of_two(experts)),
            "BLOCK": block,
            "OWN": own,
            "STEP": min(STEP, padded),
        },
    )
    return Blocks(slots, blocks)
