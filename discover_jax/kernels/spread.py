"""Kernels on a mesh: each device runs them on its own part (`jax.shard_map`), with collectives where parts depend on each other.

Rows and tokens are split over the axes `data` and `expert` together if divisible, so that nothing is computed twice. Experts are
split over `expert`, and tokens exchanged along it (see `exchange`). If the number of tokens is not divisible, all devices compute on all
tokens.

In decoding, a row, its ring and its pages are on one device, so attention needs no collectives. Page numbers are global: each device
holds a contiguous range. All devices read every prompt, each into its own pages. Heads are split over `tensor`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from discover_jax.kernels.exchange import exchanged, own_experts
from discover_jax.kernels.experts import ExpertMatrix
from discover_jax.kernels.layer_parts import Branch
from discover_jax.kernels.projections import Stack
from discover_jax.kernels.ring import ring_along

ROWS = ("data", "expert")
"""Axes over which rows of the decode batch are split, and tokens and rows of the update if they are divisible."""
_EXPERT, _TENSOR = "expert", "tensor"


def rows_axes(size: int, mesh: Mesh) -> tuple[str, ...]:
    """The axes over which `size` rows or tokens can be split: `data` and `expert`, or only `data`, or none."""
    return next((axes for axes in (ROWS, ROWS[:1]) if size % math.prod(mesh.shape[axis] for axis in axes) == 0), ())


def row_devices(mesh: Mesh | None) -> int:
    """Number of parts into which the rows of the decode batch are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def _on_devices(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    # Kernels have no rules for types that track the mesh axes over which a value varies, so shard_map cannot check their results.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def spread_attention(attend: Callable, mesh: Mesh) -> Callable:
    """For packed rows: each device has whole rows."""

    def spread(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, sinks_N: jax.Array, **options: Any
    ) -> jax.Array:
        rows = rows_axes(q_BTNH.shape[0], mesh)
        heads, segments = PartitionSpec(rows, None, _TENSOR), PartitionSpec(rows)
        own = _on_devices(functools.partial(attend, **options), mesh, (heads, heads, heads, segments, PartitionSpec(_TENSOR)), heads)
        return own(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)

    return spread


_POOL = PartitionSpec(None, ROWS, _TENSOR)


def _own_pages(pages: jax.Array, keys_LPKsH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page numbers relative to this device, and which of the pages are on it."""
    own = pages - keys_LPKsH.shape[1] * lax.axis_index(ROWS)
    return own, (own >= 0) & (own < keys_LPKsH.shape[1])


def _to_read(pages: jax.Array, keys_LPKsH: jax.Array) -> jax.Array:
    """Local page numbers. Pages on other devices become page 0; they occur only where attention is masked."""
    own, here = _own_pages(pages, keys_LPKsH)
    return jnp.where(here, own, 0)


def _to_write(pages: jax.Array, keys_LPKsH: jax.Array) -> jax.Array:
    """Local page numbers. Pages on other devices become a number that is not a page, so that nothing is written."""
    own, here = _own_pages(pages, keys_LPKsH)
    return jnp.where(here, own, keys_LPKsH.shape[1])


def spread_paged_attention(attend: Callable, mesh: Mesh) -> Callable:
    """For one token a row: each device has whole rows and their pages."""

    def of_device(q: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array, pages: jax.Array, *rest: jax.Array) -> jax.Array:
        return attend(q, keys, values, layer, _to_read(pages, keys), *rest)

    rows, heads = PartitionSpec(ROWS), PartitionSpec(ROWS, _TENSOR)
    return _on_devices(of_device, mesh, (heads, _POOL, _POOL, PartitionSpec(), rows, rows, PartitionSpec(_TENSOR)), heads)


def spread_prefill_attention(attend: Callable, mesh: Mesh) -> Callable:
    """For prompts: every device has all of their pages (`pages_BM` lists them device by device), but only its own tokens."""

    def spread(q_BTNH: jax.Array, *arguments: jax.Array) -> jax.Array:
        split = rows_axes(q_BTNH.shape[1], mesh)

        def of_device(q: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array, *rest: jax.Array) -> jax.Array:
            pages, lengths, sinks = rest
            before = q.shape[1] * lax.axis_index(split) if split else 0
            return attend(q, keys, values, layer, _to_read(pages, keys), lengths + before, sinks)

        heads, whole = PartitionSpec(None, split, _TENSOR), PartitionSpec()
        specs = (heads, _POOL, _POOL, whole, PartitionSpec(ROWS), whole, PartitionSpec(_TENSOR))
        return _on_devices(of_device, mesh, specs, heads)(q_BTNH, *arguments)

    return spread


def spread_prefill_windowed_attention(attend: Callable, mesh: Mesh) -> Callable:
    """For prompts in sliding layers: every device has their rings and all keys of the chunk, but only its own tokens."""

    def spread(q_BTNH: jax.Array, *arguments: jax.Array) -> jax.Array:
        split = rows_axes(q_BTNH.shape[1], mesh)

        def of_device(q: jax.Array, *rest: jax.Array) -> jax.Array:
            *keys_and_values, lengths, first, sinks = rest
            before = q.shape[1] * lax.axis_index(split) if split else 0
            return attend(q, *keys_and_values, lengths, first + before, sinks)

        heads, rings, keys = (PartitionSpec(None, *axes) for axes in ((split, _TENSOR), (_TENSOR,), (None, _TENSOR)))
        specs = (heads, rings, rings, keys, keys, PartitionSpec(), PartitionSpec(), PartitionSpec(_TENSOR))
        return _on_devices(of_device, mesh, specs, heads)(q_BTNH, *arguments)

    return spread


def _spread_write(write: Callable, mesh: Mesh, *specs: PartitionSpec) -> Callable:
    """Each device writes into its own pages. `specs` are the specs of the arguments after the layer, pages first."""

    def spread(*arguments: jax.Array, **options: Any) -> Any:
        def of_device(keys: jax.Array, values: jax.Array, layer: jax.Array, pages: jax.Array, *rest: jax.Array) -> Any:
            return write(keys, values, layer, _to_write(pages, keys), *rest, **options)

        return _on_devices(of_device, mesh, (_POOL, _POOL, PartitionSpec(), *specs), (_POOL, _POOL))(*arguments)

    return spread


def spread_write_token(write: Callable, mesh: Mesh) -> Callable:
    """For one token a row: each device writes the tokens of its own rows."""
    rows, heads = PartitionSpec(ROWS), PartitionSpec(ROWS, _TENSOR)
    return _spread_write(write, mesh, rows, rows, heads, heads)


def spread_write_pages(write: Callable, mesh: Mesh) -> Callable:
    """For prompts: every device writes all tokens."""
    heads = PartitionSpec(None, None, _TENSOR)
    return _spread_write(write, mesh, PartitionSpec(ROWS), heads, heads)


def spread_copy_page(copy: Callable, mesh: Mesh) -> Callable:
    """The device that holds both pages copies."""

    def of_device(keys: jax.Array, values: jax.Array, source: jax.Array, target: jax.Array) -> Any:
        return copy(keys, values, _to_read(source, keys), _to_write(target, keys))

    return _on_devices(of_device, mesh, (_POOL, _POOL, PartitionSpec(), PartitionSpec()), (_POOL, _POOL))


def spread_projections(project: Callable, mesh: Mesh) -> Callable:
    """Each device projects its own tokens."""

    def spread(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float) -> list[jax.Array]:
        tokens, whole = PartitionSpec(rows_axes(x_Ti.shape[0], mesh)), PartitionSpec()
        return _on_devices(functools.partial(project, scale=scale), mesh, (tokens, whole, whole), tokens)(x_Ti, list(stacks), layer)

    return spread


def spread_head(project: Callable, mesh: Mesh) -> Callable:
    """Each device computes the logits of its own tokens."""

    def spread(x_Ti: jax.Array, head: Stack, scale: float) -> jax.Array:
        tokens = PartitionSpec(rows_axes(x_Ti.shape[0], mesh))
        return _on_devices(functools.partial(project, scale=scale), mesh, (tokens, PartitionSpec()), tokens)(x_Ti, head)

    return spread


def spread_routing(route: Callable, mesh: Mesh) -> Callable:
    """Each device chooses the experts of its own tokens. It does not sort them: the experts' kernel has those of other devices too."""

    def spread(logits_TE: jax.Array, experts_per_token: int, layer: jax.Array | int) -> tuple[jax.Array, jax.Array, None]:
        tokens = PartitionSpec(rows_axes(logits_TE.shape[0], mesh))
        del layer  # of the sorted rows
        own = _on_devices(lambda logits_TE: route(logits_TE, experts_per_token, 0)[:2], mesh, (tokens,), (tokens, tokens))
        return *own(logits_TE), None

    return spread


class _Own:
    """A matrix of one device's experts."""

    def __init__(self, matrix: ExpertMatrix, arrays: dict[str, jax.Array]):
        self._arrays, self.apply, self.scale = arrays, matrix.apply, matrix.scale

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        return self._arrays


def spread_experts(moe: Callable, mesh: Mesh) -> Callable:
    """Each device computes its own experts. `moe` must skip the number `experts`, which stands for experts on other devices."""
    return _spread_experts(moe, functools.partial(exchanged, moe, _EXPERT), mesh)


def spread_exchanging_experts(moe: Callable, mesh: Mesh) -> Callable:
    """`spread_experts` for a `moe` that exchanges the tokens itself, along the mesh axis that it gets as `axis`, whose devices are in the
    order `ring` if they form one."""
    return _spread_experts(moe, functools.partial(moe, axis=_EXPERT, ring=ring_along(mesh, _EXPERT)), mesh)


def _spread_experts(moe: Callable, exchanging: Callable, mesh: Mesh) -> Callable:
    """`moe` computes this device's experts, for tokens that all devices have. `exchanging` exchanges them if each device has its own."""
    parts = mesh.shape[_EXPERT]

    def spread(
        x_TD: jax.Array,
        index_TX: jax.Array,
        weights_TX: jax.Array,
        gate_up: ExpertMatrix,
        down: ExpertMatrix,
        *,
        experts: int,
        adapted: bool,
        layer: jax.Array | None = None,
        elsewhere: int = 0,
        **options: Any,
    ) -> jax.Array:
        own, split = experts // parts, rows_axes(x_TD.shape[0], mesh)
        tokens = PartitionSpec(split)

        def of_device(x_TD: jax.Array, index_TX: jax.Array, weights_TX: jax.Array, arrays: tuple, layer: jax.Array | None) -> jax.Array:
            matrices = (_Own(matrix, part) for matrix, part in zip((gate_up, down), arrays, strict=True))
            more: dict[str, Any] = {"experts": own, "elsewhere": experts - own + elsewhere, "adapted": adapted, "layer": layer, **options}
            if _EXPERT in split:
                return exchanging(x_TD, index_TX, weights_TX, *matrices, **more)
            return lax.psum(moe(x_TD, own_experts(index_TX, own, _EXPERT), weights_TX, *matrices, **more), _EXPERT)

        arrays = (gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted))
        held = PartitionSpec(_EXPERT) if layer is None else PartitionSpec(None, _EXPERT)
        specs = (tokens, tokens, tokens, held, None if layer is None else PartitionSpec())
        return _on_devices(of_device, mesh, specs, tokens)(x_TD, index_TX, weights_TX, arrays, layer)

    return spread


# ---------------------------------------------------------------------- kernels of a whole decoding layer


def _spread_add_and_norm(add_and_norm: Callable, mesh: Mesh) -> Callable:
    def spread(x_TD: jax.Array, branch: Branch, scale_LD: jax.Array, layer: jax.Array, eps: float, dtype: Any) -> Any:
        rows, whole = PartitionSpec(ROWS), PartitionSpec()
        own = functools.partial(add_and_norm, eps=eps, dtype=dtype)
        return _on_devices(own, mesh, (rows, PartitionSpec(None, ROWS), whole, whole), (rows, rows))(x_TD, branch, scale_LD, layer)

    return spread


def _spread_parts(project: Callable, mesh: Mesh) -> Callable:
    def spread(x_Ti: jax.Array, stacks: Sequence[Stack], layer: jax.Array, scale: float) -> jax.Array:
        rows, whole, out = PartitionSpec(ROWS), PartitionSpec(), PartitionSpec(None, ROWS)
        return _on_devices(functools.partial(project, scale=scale), mesh, (rows, whole, whole), out)(x_Ti, list(stacks), layer)

    return spread


def _first_page(keys_LPKsH: jax.Array) -> jax.Array:
    return keys_LPKsH.shape[1] * lax.axis_index(ROWS)


def _spread_rotate_and_write(rotate_and_write: Callable, mesh: Mesh) -> Callable:
    def spread(*arguments: Any) -> Any:
        *arrays, sizes = arguments

        def of_device(parts: jax.Array, turns: Any, keys: jax.Array, *rest: jax.Array) -> Any:
            return rotate_and_write(parts, turns, keys, *rest, sizes, first_page=_first_page(keys))

        rows = PartitionSpec(ROWS)
        specs = (PartitionSpec(None, ROWS), rows, _POOL, _POOL, PartitionSpec(), rows, rows)
        return _on_devices(of_device, mesh, specs, (rows, _POOL, _POOL))(*arrays)

    return spread


def _spread_attend(attend: Callable, mesh: Mesh) -> Callable:
    def of_device(q: jax.Array, keys: jax.Array, *rest: jax.Array) -> jax.Array:
        return attend(q, keys, *rest, first_page=_first_page(keys))

    rows, whole = PartitionSpec(ROWS), PartitionSpec()
    return _on_devices(of_device, mesh, (rows, _POOL, _POOL, whole, rows, rows, whole), rows)


def _spread_route(route: Callable, mesh: Mesh) -> Callable:
    def spread(x_TD: jax.Array, router: Stack, experts_per_token: int, layer: jax.Array) -> tuple[jax.Array, None, jax.Array]:
        def of_device(x_TD: jax.Array, router: Stack, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
            index_TX, _, sent_TW = route(x_TD, router, experts_per_token, layer)
            return index_TX, sent_TW

        rows, whole = PartitionSpec(ROWS), PartitionSpec()
        index_TX, sent_TW = _on_devices(of_device, mesh, (rows, whole, whole), (rows, rows))(x_TD, router, layer)
        return index_TX, None, sent_TW

    return spread


def _spread_layer_experts(experts: Callable, mesh: Mesh) -> Callable:
    parts = mesh.shape[_EXPERT]

    def spread(
        x_TD: jax.Array,
        index_TX: jax.Array,
        weights_TX: None,
        gate_up: ExpertMatrix,
        down: ExpertMatrix,
        *,
        adapted: bool,
        layer: jax.Array,
        rows: jax.Array,
        **options: Any,
    ) -> Branch:
        options |= {"experts": options["experts"] // parts, "adapted": adapted, "axis": _EXPERT if parts > 1 else ""}

        def of_device(x_TD: jax.Array, index_TX: jax.Array, rows: jax.Array, arrays: tuple, layer: jax.Array) -> jax.Array:
            matrices = (_Own(matrix, part) for matrix, part in zip((gate_up, down), arrays, strict=True))
            return experts(x_TD, index_TX, weights_TX, *matrices, layer=layer, rows=rows, **options).parts_PTXD

        arrays = (gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted))
        own = PartitionSpec(ROWS)
        specs = (own, own, own, PartitionSpec(None, _EXPERT), PartitionSpec())
        return Branch(_on_devices(of_device, mesh, specs, PartitionSpec(None, ROWS))(x_TD, index_TX, rows, arrays, layer))

    return spread


SPREAD_LAYER: dict[str, Callable[[Callable, Mesh], Callable]] = {
    "add_and_norm": _spread_add_and_norm,
    "project": _spread_parts,
    "rotate_and_write": _spread_rotate_and_write,
    "attend": _spread_attend,
    "route": _spread_route,
    "experts": _spread_layer_experts,
}
"""Part of a decoding layer -> function that spreads its kernel over a mesh with `tensor` = 1. Each device has whole rows and their
pages."""

_BY_HEADS: dict[str, Callable[[Callable, Mesh], Callable]] = {
    "packed_attention": spread_attention,
    "windowed_attention": spread_attention,
    "paged_attention": spread_paged_attention,
    "prefill_attention": spread_prefill_attention,
    "prefill_windowed_attention": spread_prefill_windowed_attention,
    "write_token": spread_write_token,
    "write_pages": spread_write_pages,
    "copy_page": spread_copy_page,
}
_WHOLE: dict[str, Callable[[Callable, Mesh], Callable]] = {
    "experts": spread_experts,
    "decode_experts": spread_experts,
    "decode_routing": spread_routing,
    "decode_projections": spread_projections,
    "decode_head": spread_head,
}
SPREAD = _BY_HEADS | _WHOLE
"""Operation -> function that spreads its implementation over a mesh."""


def can_spread(operation: str, mesh: Mesh | AbstractMesh) -> bool:
    """Whether an operation can be spread over a mesh of this shape. If not, use its reference, which XLA splits: no kernel computes a
    part of a projection or of an expert's width."""
    return operation in _BY_HEADS or (operation in _WHOLE and mesh.shape[_TENSOR] == 1)
