"""Projections in decoding, on a GPU: the kernel reads a layer's matrices in place from the stacks. Needs the extra `cuda`.

In a loop over layers, XLA copies the layer's matrices before its own products, which costs as much again as reading them twice.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from discover_jax.kernels import projections_triton
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.projections import Stack, parts_reference
from discover_jax.kernels.projections_triton import COLUMNS as _COLUMNS
from discover_jax.kernels.triton_call import call_kernel, compute_capability, multiprocessors, power_of_two, shared_kib

COLUMNS = _COLUMNS.value
MOST_ROWS = 256
"""Row limit of the kernel. For more rows arithmetic dominates, and XLA's own product of a copy is faster."""
MOST_RANK = 128
"""Rank limit of the kernel: each instance computes x A^T of its columns for itself."""
MOST_STACKS = 3
FEW_ROWS = 32
"""Up to this many rows, the weights are the left operand."""
LONG = 24
"""Iterations of a part that is long enough for two instances per multiprocessor."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Launch parameters: outputs per kernel instance (rounded down to a power of two that divides), parts of the columns, stages (fewer if
    the GPU's shared memory requires it), warps."""

    outputs: int
    parts: int
    stages: int
    warps: int


def choose_launch(rows: int, width: int, outs: Sequence[int]) -> Launch:
    """The launch parameters for this many rows and columns, and for these outputs, measured on an H100 at Qwen2.5's 1.5B and 7B.

    The columns are split into parts until each multiprocessor has one instance, or two if instances are small or long.
    """
    large = rows > FEW_ROWS and all(out % 128 == 0 for out in outs)
    outputs, tiles = 128 if large else 64, width // COLUMNS
    one = multiprocessors() * outputs / sum(outs)
    parts = max(1, int(2 * one))
    if large and tiles // parts < LONG:
        parts = max(1, round(one))
    each = -(-tiles // min(parts, max(1, tiles // 2)))
    return Launch(outputs, -(-tiles // each), 3 if rows > FEW_ROWS else 5, outputs // 16)


def _stages(most: int, lines: int) -> int:
    """At most this many iterations in flight: as many as fit the GPU's shared memory, with tiles of `lines` lines in total."""
    return max(1, min(most, shared_kib(compute_capability()) * 1024 // (lines * COLUMNS * 2)))


def _applies(x_Ti: jax.Array, stacks: Sequence[Stack]) -> bool:
    same = {(stack.bias is None, None if stack.lora_a is None else stack.lora_a.shape[1:]) for stack in stacks}
    bfloat16 = all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((x_Ti, list(stacks))))
    divide = x_Ti.shape[1] % COLUMNS == 0 and all(stack.weight.shape[1] % 16 == 0 for stack in stacks)
    return bfloat16 and divide and len(same) == 1 and len(stacks) <= MOST_STACKS and len(x_Ti) <= MOST_ROWS


def project(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float, chosen: Launch | None = None) -> list[jax.Array]:
    """`project_reference` by the kernel for few bfloat16 rows and divisible widths, else by the reference. Not differentiable.

    The result of an adapter's first product is rounded in parts instead of once.

    Args:
      chosen: launch parameters to use instead of `choose_launch`'s.
    """
    ends = list(itertools.accumulate(stack.weight.shape[1] for stack in stacks))
    return jnp.split(project_parts(x_Ti, stacks, layer, scale, chosen).sum(axis=0), ends[:-1], axis=1)


def project_parts(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float, chosen: Launch | None = None) -> jax.Array:
    """`project` before its last sum: float32 [parts, T, all outputs]."""
    if not _applies(x_Ti, stacks):
        return parts_reference(x_Ti, stacks, layer, scale)
    rank = 0 if stacks[0].lora_a is None else stacks[0].lora_a.shape[1]
    if rank > MOST_RANK:
        warn_reference("decode_projections", f"the adapter's rank {rank} is above {MOST_RANK}")
        return parts_reference(x_Ti, stacks, layer, scale)
    rows, width = x_Ti.shape
    outs = [stack.weight.shape[1] for stack in stacks]
    chosen = chosen or choose_launch(rows, width, outs)
    outputs = next(n for n in (256, 128, 64, 32, 16) if n <= chosen.outputs and all(out % n == 0 for out in outs))
    block = min(128, max(16, power_of_two(rows)))
    three = [stacks[min(i, len(stacks) - 1)] for i in range(MOST_STACKS)]
    biases = [x_Ti if stack.bias is None else stack.bias for stack in three]  # placeholders without biases
    adapters = [x_Ti] * (2 * MOST_STACKS)  # placeholders without an adapter
    if rank:
        adapters = [stack.lora_a for stack in three] + [stack.lora_b for stack in three]
    sizes = {f"OUT{i}": outs[i] if i < len(outs) else 0 for i in range(MOST_STACKS)}
    stages = _stages(chosen.stages, outputs + block + (max(16, power_of_two(rank)) if rank else 0))
    cuts = {"M": outputs, "N": block, "ROWS_LEFT": rows > FEW_ROWS, "PARTS": chosen.parts, "STAGES": stages}
    return call_kernel(
        projections_triton.project,
        *(x_Ti, *(stack.weight for stack in three), *biases, *adapters, jnp.asarray(layer, jnp.int32).reshape(1), rows),
        out=jax.ShapeDtypeStruct((chosen.parts, rows, sum(outs)), jnp.float32),
        grid=(sum(outs) // outputs, chosen.parts, -(-rows // block)),
        warps=chosen.warps,
        stages=stages,
        constants={"K": width, **sizes, **cuts, "BIAS": stacks[0].bias is not None, "RANK": rank, "SCALE": scale},
    )
