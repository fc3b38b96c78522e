"""Calls Triton kernels in Triton's interpreter, on the CPU. The scripts `interpreted_*.py` replace `call_kernel` with it.

They are separate scripts, since Triton reads TRITON_INTERPRET when it is first imported. The interpreter truncates float32 to bfloat16
where a GPU rounds, so errors are about twice as large as on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

UNWRITTEN = -(2**30)
"""Value of integers that no kernel has written; floats are NaN."""


def _torch(argument: Any) -> Any:
    if not isinstance(argument, jax.Array):
        return argument
    if argument.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(argument.astype(jnp.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(argument))


def interpret(kernel: Any, *arguments: Any, out: Any, grid: Any, warps: int, stages: int, constants: Any, aliases: Any = None) -> Any:
    """Has the signature of `discover_jax.kernels.triton_call.call_kernel`."""
    dtypes = {jnp.dtype(jnp.bfloat16): torch.bfloat16, jnp.dtype(jnp.float32): torch.float32, jnp.dtype(jnp.int32): torch.int32}
    shapes, tree = jax.tree.flatten(out)
    results = [torch.full(o.shape, UNWRITTEN if o.dtype == jnp.int32 else float("nan"), dtype=dtypes[o.dtype]) for o in shapes]
    for argument, result in (aliases or {}).items():
        results[result] = _torch(arguments[argument])
    kernel[grid](*map(_torch, arguments), *results, **constants)
    arrays = [
        jnp.asarray(r.float().numpy() if r.dtype == torch.bfloat16 else r.numpy(), o.dtype) for r, o in zip(results, shapes, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)
