"""Projections in decoding, on a GPU: the kernel reads a layer's matrices in place from the stacks. Needs the extra `cuda`.

In a loop over layers, XLA copies the layer's matrices before its own products, which costs as much again as reading them twice.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from discover_jax.kernels import projections_triton
from discover_jax.kernels.fallback import note_reference, warn_reference
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


def projections_refusal(x_Ti: jax.Array, stacks: Sequence[Stack]) -> str:
    """Why the kernel does not support these projections, for any number of rows; empty if it does."""
    if other := {str(leaf.dtype) for leaf in jax.tree.leaves((x_Ti, list(stacks)))} - {"bfloat16"}:
        return f"rows or weights are {', '.join(sorted(other))}; the kernel supports bfloat16"
    outs = [stack.weight.shape[1] for stack in stacks]
    if x_Ti.shape[1] % COLUMNS or any(out % 16 for out in outs):
        return f"matrices have {x_Ti.shape[1]} inputs and {outs} outputs; the kernel supports multiples of {COLUMNS} and of 16"
    ranks = {0 if stack.lora_a is None else stack.lora_a.shape[1] for stack in stacks}
    if len({stack.bias is None for stack in stacks}) > 1 or len(ranks) > 1 or len(stacks) > MOST_STACKS:
        return (
            f"there are {len(stacks)} projections; the kernel supports {MOST_STACKS}, with biases of all or none and adapters of one rank"
        )
    return f"the adapter's rank {max(ranks)} is above {MOST_RANK}" if max(ranks) > MOST_RANK else ""


def project(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float, chosen: Launch | None = None) -> list[jax.Array]:
    """`project_reference` by the kernel. For arguments that it does not support, or many rows, uses the reference and logs the reason once.
    Not differentiable.

    The result of an adapter's first product is rounded in parts instead of once.

    Args:
      chosen: launch parameters to use instead of `choose_launch`'s.
    """
    ends = list(itertools.accumulate(stack.weight.shape[1] for stack in stacks))
    return jnp.split(project_parts(x_Ti, stacks, layer, scale, chosen).sum(axis=0), ends[:-1], axis=1)


def project_parts(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float, chosen: Launch | None = None) -> jax.Array:
    """`project` before its last sum: float32 [parts, T, all outputs]."""
    if len(x_Ti) > MOST_ROWS:
        note_reference("decode_projections", f"{len(x_Ti)} rows are above {MOST_ROWS}: XLA's own product is faster")
        return parts_reference(x_Ti, stacks, layer, scale)
    if reason := projections_refusal(x_Ti, stacks):
        warn_reference("decode_projections", reason)
        return parts_reference(x_Ti, stacks, layer, scale)
    rank = 0 if stacks[0].lora_a is None else stacks[0].lora_a.shape[1]
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
