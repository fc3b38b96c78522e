"""Compiles the kernels of a function for a card, without the card: its launches are recorded, then Triton compiles each of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

POINTERS = {jnp.dtype(jnp.bfloat16): "*bf16", jnp.dtype(jnp.float32): "*fp32", jnp.dtype(jnp.int32): "*i32"}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One launch: the kernel, the Triton types of its parameters, and the other arguments of `call_kernel`."""

    kernel: Any
    types: tuple[str, ...]
    warps: int
    stages: int
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def record(monkeypatch: Any, modules: Any, function: Callable[..., Any], *shapes: Any) -> list[Recorded]:
    """The launches of a function whose kernels this module calls, or these modules. Nothing is computed."""
    launches = []

    def call(
        kernel: Any, *arguments: Any, out: Any, grid: Any, warps: int, stages: int, constants: dict[str, Any], aliases: Any = None
    ) -> Any:
        del aliases  # no code depends on them
        arrays = [*arguments, *jax.tree.leaves(out)]
        types = tuple(POINTERS[jnp.dtype(array.dtype)] if hasattr(array, "dtype") else "i32" for array in arrays)
        launches.append(Recorded(kernel, types, warps, stages, constants))
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), out)

    for module in modules if isinstance(modules, tuple) else (modules,):
        monkeypatch.setattr(module, "call_kernel", call)
    jax.eval_shape(lambda *arrays: function(*arrays), *shapes)  # a new function, so that jax traces it again
    return launches


def compile_for(capability: int, launch: Recorded) -> Any:
    """Triton's metadata of a launch compiled to machine code; pointers are aligned to 16 bytes, as jax_triton has them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(zip(launch.kernel.arg_names, launch.types, strict=False)) | dict.fromkeys(launch.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(launch.types) if kind.startswith("*")}
    source = ASTSource(launch.kernel, types, launch.constants, aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata
