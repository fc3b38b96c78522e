"""The kernels of a model: one implementation per operation, chosen once for a platform and a mesh.

To add a platform, add an entry to `PLATFORMS`. To add an operation, add a field to `KernelSet`, its reference to `REFERENCE`, and a
function that spreads it over a mesh to `spread.SPREAD`.
"""

import collections
import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import AbstractMesh, Mesh

from discover_jax.extras import install_command
from discover_jax.kernels.attention import (
    paged_attention_reference,
    prefill_attention_reference,
    prefill_windowed_attention_reference,
)
from discover_jax.kernels.expert_rows import Blocks
from discover_jax.kernels.experts import MixtureOfExperts, moe_reference, route_reference
from discover_jax.kernels.fallback import SLOWER
from discover_jax.kernels.layer_parts import HeadSizes, LayerKernels
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference
from discover_jax.kernels.pages import copy_page, write_pages, write_token
from discover_jax.kernels.projections import head_reference, project_reference
from discover_jax.kernels.spread import SPREAD, SPREAD_LAYER, can_spread, spread_exchanging_experts
from discover_jax.kernels.triton_call import refusal

AnyMesh = Mesh | AbstractMesh
Attend = Callable[..., jax.Array]
Write = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class KernelSet:
    """One implementation per operation. Two sets for the same platform and mesh are equal, so they share jit's cache.

    Attributes:
      write_token, paged_attention: one token a row.
      write_pages, prefill_attention, prefill_windowed_attention: several tokens a row.
      copy_page: one page of the cache.
      packed_attention, windowed_attention, experts: whole sequences; differentiable.
      decode_routing, decode_experts, decode_projections: one token a row, or a chunk of a prompt.
        Models without experts or windows do not call those operations.
      decode_head: logits of one token a row, or of drafts. Without a kernel, the model multiplies as for whole sequences.
      mesh: devices over which the operations are spread; None for one device.
      kernels: operations that do not use the reference.
      layer: kernels of a whole decoding layer of experts, which replace most of the operations of one token a row; None for the separate
        operations. See `with_layer`.
    """

    write_token: Write
    write_pages: Write
    copy_page: Write
    paged_attention: Attend
    prefill_attention: Attend
    prefill_windowed_attention: Attend
    packed_attention: Attend
    windowed_attention: Attend
    experts: MixtureOfExperts
    decode_projections: Callable[..., list[jax.Array]]
    decode_head: Callable[..., jax.Array]
    decode_routing: Callable[..., tuple[jax.Array, jax.Array, Blocks | None]]
    decode_experts: MixtureOfExperts
    mesh: AnyMesh | None = None
    kernels: frozenset[str] = frozenset()
    layer: LayerKernels | None = None


REFERENCE = KernelSet(
    write_token=write_token,
    write_pages=write_pages,
    copy_page=copy_page,
    paged_attention=paged_attention_reference,
    prefill_attention=prefill_attention_reference,
    prefill_windowed_attention=prefill_windowed_attention_reference,
    packed_attention=packed_attention_reference,
    windowed_attention=windowed_attention_reference,
    experts=moe_reference,
    decode_projections=project_reference,
    decode_head=head_reference,
    decode_routing=route_reference,
    decode_experts=moe_reference,
)
"""Plain JAX on one device. It works on every platform; tests compare the kernels with it."""

OPERATIONS = tuple(field.name for field in dataclasses.fields(KernelSet) if field.name not in ("mesh", "kernels", "layer"))


@dataclasses.dataclass(frozen=True)
class Platform:
    """The kernels of one platform.

    Attributes:
      package: must be importable, in addition to the modules' own imports.
      functions: operation -> (module, function).
      refusal: why this process's device cannot run the kernels; empty if it can.
      extra: this package's extra that installs what the kernels need.
      experts: the form of packed experts that the kernel of `decode_experts` reads, see models.decoder.Model.
      layer: module of the kernels of a whole decoding layer, with `KERNELS`, `layer_refusal` and `most_rows`; empty if there are none.
      layer_on_mesh: whether these run on several devices.
      exchanging: operations on experts whose kernel exchanges the tokens itself, see spread.spread_exchanging_experts.
    """

    package: str
    functions: Mapping[str, tuple[str, str]]
    refusal: Callable[[], str] = lambda: ""
    extra: str = "cuda"
    experts: str = "tiled"
    layer: str = ""
    layer_on_mesh: bool = False
    exchanging: frozenset[str] = frozenset()


PLATFORMS = {
    "gpu": Platform(
        "jax_triton",  # its import also fails if jax has no support for CUDA
        {
            "paged_attention": ("discover_jax.kernels.attention_decode", "paged_attention"),
            "prefill_attention": ("discover_jax.kernels.attention_prefill", "prefill_attention"),
            "prefill_windowed_attention": ("discover_jax.kernels.attention_prefill", "prefill_windowed_attention"),
            "packed_attention": ("discover_jax.kernels.attention_update", "packed_attention"),
            "windowed_attention": ("discover_jax.kernels.attention_update", "windowed_attention"),
            "experts": ("discover_jax.kernels.experts_update", "moe_update"),
            "decode_projections": ("discover_jax.kernels.projections_decode", "project"),
            "decode_routing": ("discover_jax.kernels.route_decode", "route_sorted"),
            "decode_experts": ("discover_jax.kernels.experts_decode", "moe_decode"),
        },
        refusal,
        layer="discover_jax.kernels.layer_decode",
    ),
    "tpu": Platform(
        "jax.experimental.pallas.tpu",
        {
            "write_token": ("discover_jax.kernels.pages_tpu", "write_token"),
            "write_pages": ("discover_jax.kernels.pages_tpu", "write_pages"),
            "copy_page": ("discover_jax.kernels.pages_tpu", "copy_page"),
            "paged_attention": ("discover_jax.kernels.attention_decode_tpu", "paged_attention"),
            "prefill_attention": ("discover_jax.kernels.attention_decode_tpu", "prefill_attention"),
            "decode_projections": ("discover_jax.kernels.projections_tpu", "project"),
            "decode_head": ("discover_jax.kernels.projections_tpu", "project_head"),
            "decode_experts": ("discover_jax.kernels.experts_decode_tpu", "moe_decode"),
            "packed_attention": ("discover_jax.kernels.attention_update_tpu", "packed_attention"),
            "windowed_attention": ("discover_jax.kernels.attention_update_tpu", "windowed_attention"),
            "experts": ("discover_jax.kernels.experts_update_tpu", "moe_update"),
        },
        extra="tpu",
        experts="lanes",
        layer="discover_jax.kernels.layer_tpu",
        layer_on_mesh=True,
        exchanging=frozenset({"experts"}),
    ),
}
"""jax's platform name -> its kernels. Other platforms use the references."""


@functools.cache
def find_kernel(operation: str, platform: str) -> tuple[Callable[..., Any] | None, str]:
    """A platform's kernel, or None and why it cannot run; the reason is empty if the platform does not have one."""
    if platform not in PLATFORMS or operation not in PLATFORMS[platform].functions:
        return None, ""
    module, function = PLATFORMS[platform].functions[operation]
    try:
        importlib.import_module(PLATFORMS[platform].package)
        kernel = getattr(importlib.import_module(module), function)
    except ImportError as error:
        missing = error.name or PLATFORMS[platform].package
        return None, f"the package {missing} cannot be imported ({error}). Run {install_command(PLATFORMS[platform].extra)}."
    reason = PLATFORMS[platform].refusal()
    return (None, reason) if reason else (kernel, "")


@dataclasses.dataclass(frozen=True)
class Spread:
    """An operation's implementation, spread over a mesh. Unlike closures, equal ones compare equal.

    Attributes:
      spread: see `spread.SPREAD`.
      function: the implementation for one device.
      mesh: the devices.
    """

    spread: Callable[[Callable[..., Any], Any], Callable[..., Any]]
    function: Callable[..., Any]
    mesh: AnyMesh

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.spread(self.function, self.mesh)(*args, **options)


def _over(mesh: AnyMesh | None) -> AnyMesh | None:
    """The mesh if it has more than one device, else None."""
    return mesh if mesh is not None and mesh.size > 1 else None


def _gather(kernels: Mapping[str, Callable[..., Any]], mesh: AnyMesh | None, exchanging: frozenset[str] = frozenset()) -> KernelSet:
    """These kernels, and the references of the other operations. XLA splits the references that cannot be spread."""
    functions: dict[str, Any] = {}
    for operation in OPERATIONS:
        function = kernels.get(operation, getattr(REFERENCE, operation))
        if mesh is not None and can_spread(operation, mesh):
            spread = spread_exchanging_experts if operation in exchanging and operation in kernels else SPREAD[operation]
            function = Spread(spread, function, mesh)
        functions[operation] = function
    return KernelSet(**functions, mesh=mesh, kernels=frozenset(kernels))


def reference_set(mesh: AnyMesh | None = None) -> KernelSet:
    """The references, spread over a mesh."""
    return _gather({}, _over(mesh))


def _name(operation: str, platform: str) -> str:
    module, function = PLATFORMS[platform].functions[operation]
    return f"{module.removeprefix('discover_jax.kernels.')}.{function}"


def _why(reason: str) -> str:
    return f"reference, because {reason or 'this platform has no kernel of it'}"


@functools.cache
def kernel_set(platform: str, mesh: AnyMesh | None = None) -> KernelSet:
    """The fastest implementations for a platform and a mesh. The log (`--verbosity=0`) names each of them, with the reason for a reference.
    A kernel that cannot be used is also a warning.

    Args:
      platform: as jax names it: "cpu", "gpu", "tpu".
      mesh: devices over which arrays are laid out; None for one device.
    """
    mesh = _over(mesh)
    kernels: dict[str, Callable[..., Any]] = {}
    without: dict[str, list[str]] = collections.defaultdict(list)
    for operation in OPERATIONS:
        kernel, reason = find_kernel(operation, platform)
        if kernel is not None and mesh is not None and not can_spread(operation, mesh):
            kernel, reason = None, f"config.mesh.tensor = {mesh.shape['tensor']} splits its matrices"
        if kernel is not None:
            kernels[operation] = kernel
        elif reason:
            without[reason].append(operation)
        logging.info("kernel of %s on %s: %s", operation, platform, _name(operation, platform) if kernel is not None else _why(reason))
    for reason, operations in without.items():
        logging.warning("kernel of %s on %s: %s, because %s", ", ".join(operations), platform, SLOWER, reason)
    return _gather(kernels, mesh, PLATFORMS[platform].exchanging if platform in PLATFORMS else frozenset())


_OF_A_TOKEN = ("write_token", "paged_attention", "decode_projections", "decode_routing", "decode_experts")
"""Operations that the kernels of a layer replace, or that share code with them."""


def with_layer(
    kernels: KernelSet, platform: str, heads: HeadSizes, experts_per_token: int, form: str, dtype: Any, *, refusal: str = ""
) -> KernelSet:
    """The kernels, with those of a whole decoding layer if the platform has them and they support the model and the mesh.

    The log (`--verbosity=0`) names them, or says why the separate operations decode a layer.

    Args:
      kernels: of the platform.
      platform: as for `kernel_set`.
      heads: sizes of the model's heads.
      experts_per_token: those that its router chooses.
      form, dtype: of the model, see `models.decoder.Model`.
      refusal: why no kernels of a layer support this kind of model; empty if some may.
    """
    reason = _without_layer(kernels, platform) or refusal
    if not reason:
        reason = _layer_module(platform).layer_refusal(heads, experts_per_token, form, dtype)
    name = PLATFORMS[platform].layer.removeprefix("discover_jax.kernels.") if platform in PLATFORMS else ""
    said = f"separate operations, because {reason}" if reason else f"{name}.KERNELS"
    logging.info("kernels of a decoding layer on %s: %s", platform, said)
    if reason:
        return kernels
    module, mesh = _layer_module(platform), kernels.mesh
    layer = module.KERNELS
    if mesh is not None:
        parts: dict[str, Any] = {part: Spread(spread, getattr(layer, part), mesh) for part, spread in SPREAD_LAYER.items()}
        layer = LayerKernels(**parts, mesh=mesh)
    most = module.most_rows(experts_per_token, 1 if mesh is None else mesh.shape["expert"])
    return dataclasses.replace(kernels, layer=dataclasses.replace(layer, most_rows=most))


def _layer_module(platform: str) -> Any:
    return importlib.import_module(PLATFORMS[platform].layer)


def _without_layer(kernels: KernelSet, platform: str) -> str:
    """Why this platform has no kernels of a layer for any model on this mesh; empty if it has."""
    if platform not in PLATFORMS or not PLATFORMS[platform].layer:
        return "this platform has no kernels of a layer"
    missing = [one for one in _OF_A_TOKEN if one in PLATFORMS[platform].functions and one not in kernels.kernels]
    if missing:  # `kernel_set` has logged why
        return f"these use the reference: {', '.join(missing)}"
    if kernels.mesh is not None and not PLATFORMS[platform].layer_on_mesh:
        return f"this platform's kernels of a layer run on one device; the mesh has {kernels.mesh.size}"
    return ""
