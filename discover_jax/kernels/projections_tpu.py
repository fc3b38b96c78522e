"""Projections in decoding, on a TPU: one kernel reads a layer's matrices in place from the stacks, with biases and adapters.

It was compiled for TPUs and interpreted on a CPU. No TPU has run it.

A step of the grid computes a block of outputs for all rows, while the next block's weights are copied to the chip's memory. A TPU stores
the last two axes of an array in the order that pads less, and the kernel reads the weights in that order, so that XLA copies nothing.

Dimensions: L layers, T rows, i inputs, o outputs, n outputs of a block, r rank.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels.dot_pallas import dot
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.parts_pallas import scalar
from discover_jax.kernels.projections import Stack, head_reference, project_reference

LANES = 128
OUTPUTS = (512, 256, 128)
"""Possible outputs of a block. Larger blocks copy faster."""
MOST_ROWS = 512
"""Limit on the rows: all of them are in the chip's memory."""
_MEMORY = 64 * 2**20


def outputs_along_lanes(out: int, into: int) -> bool:
    """Whether a TPU stores a matrix [out, in] with the outputs along the lanes. The default is the inputs."""
    return into % LANES != 0 and out % LANES == 0


def choose_outputs(outs: Sequence[int]) -> int:
    """Outputs of a block; 0 if the projections do not fit one grid. The last block of a single projection may be incomplete."""
    return OUTPUTS[0] if len(outs) == 1 else next((n for n in OUTPUTS if all(out % n == 0 for out in outs)), 0)


def _kernel(layer_1: Any, x_Ti: Any, *arrays: Any, kinds: tuple[tuple[bool, ...], ...], ends: tuple[int, ...], scale: float) -> None:
    """`kinds`: of each projection, whether outputs are along the lanes, and whether it has a bias and an adapter. `ends`: its end
    in the grid."""
    *refs, y_Tn = arrays
    step, dtype, rest = pl.program_id(0), x_Ti.dtype, iter(refs)
    for (along_lanes, biased, adapted), (begin, end) in zip(kinds, itertools.pairwise((0, *ends)), strict=True):
        weight, *small = itertools.islice(rest, 1 + biased + 2 * adapted)

        @pl.when((step >= begin) & (step < end))
        def _(weight: Any = weight, small: list[Any] = small, along_lanes: bool = along_lanes, adapted: bool = adapted) -> None:
            y = dot(x_Ti[...], weight[...].astype(dtype), (1, 0) if along_lanes else (1, 1))
            if len(small) % 2:  # The biases of all layers: with one layer's, XLA would copy them in each step.
                bias_Ln = small[0][...].astype(jnp.float32)
                own = lax.broadcasted_iota(jnp.int32, bias_Ln.shape, 0) == layer_1[0]
                y += jnp.sum(jnp.where(own, bias_Ln, 0), axis=0, keepdims=True)
            if adapted:
                a_ri, b_rn = small[-2:]
                low_Tr = dot(x_Ti[...], a_ri[...].astype(dtype), (1, 1))
                y += dot((scale * low_Tr).astype(dtype), b_rn[...].astype(dtype))
            y_Tn[...] = y


def projections_refusal(rows: int, outs: Sequence[int]) -> str:
    """Why the kernel does not support projections of so many rows to these outputs; empty if it does."""
    if rows > MOST_ROWS:
        return f"a device has {rows} rows; the kernel supports at most {MOST_ROWS}"
    if not choose_outputs(outs):
        return f"projections have {', '.join(map(str, outs))} outputs; the kernel supports multiples of {OUTPUTS[-1]}, or one projection"
    return ""


def project(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float, *, interpret: Any = False) -> list[jax.Array]:
    """`project_reference` by the kernel. If it does not support the arguments, uses the reference and logs the reason once. Not
    differentiable.

    Args:
      x_Ti, stacks, layer, scale: see `project_reference`.
      interpret: as for `pallas_call`.
    """
    outs = [stack.weight.shape[1] for stack in stacks]
    if reason := projections_refusal(len(x_Ti), outs):
        warn_reference("decode_projections", reason, "tpu")
        return project_reference(x_Ti, stacks, layer, scale)
    y_To = project_together(x_Ti, stacks, layer, scale, interpret=interpret)
    return jnp.split(y_To, list(itertools.accumulate(outs))[:-1], axis=1)


def project_head(x_Ti: jax.Array, head: Stack, scale: float, *, interpret: Any = False) -> jax.Array:
    """`head_reference` by the kernel. If it does not support the arguments, uses the reference and logs the reason once.

    XLA's own product reads the output head at half of the memory's bandwidth, by its estimate.
    """
    if reason := projections_refusal(len(x_Ti), [head.weight.shape[1]]):
        warn_reference("decode_head", reason, "tpu")
        return head_reference(x_Ti, head, scale)
    return project_together(x_Ti, [head], jnp.int32(0), scale, interpret=interpret)


def project_together(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float, *, interpret: Any = False) -> jax.Array:
    """`project` with the outputs side by side, for arguments that `projections_refusal` does not refuse."""
    rows, width = x_Ti.shape
    outs = [stack.weight.shape[1] for stack in stacks]
    block = choose_outputs(outs)
    ends = tuple(itertools.accumulate(-(-out // block) for out in outs))
    arrays, specs, kinds = [x_Ti], [pl.BlockSpec((rows, width), lambda *_: (0, 0))], []
    for stack, out, (begin, end) in zip(stacks, outs, itertools.pairwise((0, *ends)), strict=True):

        def block_of(step: Any, begin: int = begin, end: int = end) -> Any:
            """The block of this projection. Steps of the others keep the block next to them, so that they read nothing."""
            return jnp.clip(step - begin, 0, end - begin - 1)

        def columns(height: int, block_of: Any = block_of) -> pl.BlockSpec:
            return pl.BlockSpec((None, height, block), lambda step, layer_1: (layer_1[0], 0, block_of(step)))

        def lines(block_of: Any = block_of) -> pl.BlockSpec:
            return pl.BlockSpec((None, block, width), lambda step, layer_1: (layer_1[0], block_of(step), 0))

        along_lanes = outputs_along_lanes(out, width)
        arrays.append(stack.weight.swapaxes(1, 2) if along_lanes else stack.weight)
        specs.append(columns(width) if along_lanes else lines())
        if stack.bias is not None:
            arrays.append(stack.bias)
            specs.append(pl.BlockSpec((len(stack.bias), block), lambda step, layer_1, block_of=block_of: (0, block_of(step))))
        if stack.lora_a is not None and stack.lora_b is not None:
            rank = stack.lora_a.shape[1]
            arrays += [stack.lora_a, stack.lora_b.swapaxes(1, 2)]
            specs += [pl.BlockSpec((None, rank, width), lambda step, layer_1: (layer_1[0], 0, 0)), columns(rank)]
        kinds.append((along_lanes, stack.bias is not None, stack.lora_a is not None))
    return pl.pallas_call(
        functools.partial(_kernel, kinds=tuple(kinds), ends=ends, scale=scale),
        out_shape=jax.ShapeDtypeStruct((rows, sum(outs)), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(ends[-1],),
            in_specs=specs,
            out_specs=pl.BlockSpec((rows, block), lambda step, layer_1: (0, step)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_MEMORY),
        interpret=interpret,
        name="projections_decode",
    )(scalar(layer), *arrays)
