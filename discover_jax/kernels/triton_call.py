"""Calls Triton kernels from jitted functions, in a form that XLA can put into CUDA graphs. Needs the extra `cuda`.

jax_triton 0.3 emits custom calls of XLA's older interface, which XLA starts one by one. In a decoding step this takes the host longer than
the GPU needs for most of the kernels. jaxlib offers the same call through the newer interface (FFI), which jax's own Pallas uses. It loads
kernels before the first run and turns long stretches of a function into one CUDA graph. On an H200 a step of the 120b takes 4.0 instead
of 5.2 ms with one row, and 22.7 instead of 23.5 ms with 128 rows.
"""

import functools
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import mlir
from jaxlib.mlir import ir

HOPPER = 90
"""Compute capability to lower kernels for when there is no GPU."""

OLDEST = 80
"""The first compute capability with products of bfloat16."""

SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""Shared memory that one kernel instance may use, by compute capability (CUDA Programming Guide, table of technical specifications)."""

_FFI_TARGET = "triton_kernel_call_ffi"
_TYPED_FFI = 4
"""`api_version` of a custom call."""


def compute_capability() -> int:
    """That of this process's first GPU, for example 90 for 9.0, or HOPPER without a GPU. 0 if the GPU is not an NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return HOPPER
    match = re.fullmatch(r"(\d+)\.(\d)", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    return int(match[1] + match[2]) if match else 0


def multiprocessors() -> int:
    """Multiprocessors of this process's first GPU, or of an H100 without a GPU."""
    return jax.local_devices()[0].core_count if jax.default_backend() == "gpu" else 132


def shared_kib(capability: int) -> int:
    """Shared memory that one kernel instance may use, in KiB. For an unknown capability, the least of the known ones."""
    return SHARED_KIB.get(capability, min(SHARED_KIB.values()))


def refusal() -> str:
    """Why this process's GPU cannot run the kernels; empty if it can."""
    capability = compute_capability()
    if capability >= OLDEST:
        return ""
    given = f"has compute capability {capability / 10}" if capability else "is not an NVIDIA GPU"
    return f"this GPU {given}; the kernels need an NVIDIA GPU of at least {OLDEST / 10}"


@functools.cache
def _prepare() -> Any:
    """jax_triton with its calls lowered to the newer interface."""
    import jax_triton  # pyright: ignore[reportMissingImports] - a local import: it works only if jax has its GPU plugin
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]

    def lower(ctx: Any, *arguments: Any, **options: Any) -> Sequence[Any]:
        results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, ctx, *arguments, **options)
        attributes = results[0].owner.attributes
        call = {"name": ir.StringAttr.get(options["name"]), "opaque": attributes["backend_config"]}
        attributes["backend_config"] = ir.DictAttr.get(call)
        attributes["call_target_name"] = ir.StringAttr.get(_FFI_TARGET)
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _TYPED_FFI)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")
    return jax_triton


def call_kernel(
    kernel: Any,
    *arguments: Any,
    out: Any,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    constants: dict[str, Any],
    aliases: Mapping[int, int] = types.MappingProxyType({}),
) -> Any:
    """Calls a kernel. Its parameters are the inputs, followed by the outputs.

    Args:
      arguments: arrays, passed as pointers, then numbers.
      out: a ShapeDtypeStruct, or a list of them.
      grid: kernel instances along each axis.
      constants: the kernel's constants by name.
      aliases: outputs that share the memory of an argument: its index -> the output's. What the kernel does not write keeps its value.
    """
    capability = None if jax.default_backend() == "gpu" else HOPPER
    options = {"num_warps": warps, "num_stages": stages, "compute_capability": capability}
    options["input_output_aliases"] = dict(aliases)
    return _prepare().triton_call(*arguments, kernel=kernel, out_shape=out, grid=grid, **options, **constants)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number up to `most`."""
    return next(n for n in range(most, 0, -1) if number % n == 0)
