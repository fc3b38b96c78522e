"""The kernels of gpt-oss's experts compile for every card, without it, and fit its memory; larger adapters are refused by name."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest
from recorded_launches import Recorded, compile_for, record

from discover_jax.kernels import fallback
from discover_jax.kernels.mxfp4_tiles import COLUMNS, ROWS, SLABS
from discover_jax.kernels.triton_call import SHARED_KIB

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra `parity` or `kernels`)")

CARDS = (80, 89, 90, 100, 120)
EXPERTS = {"gpt-oss-20b": 32, "gpt-oss-120b": 128}
WIDTH = 2880
"""Of the model and of an expert's activation."""
CHOSEN, RANK, TOKENS = 4, 8, 4096
ROWS_DECODED = (1, 8, 16, 128, 1024)
"""Rows whose launches differ, with 32 or with 128 experts."""
KERNELS = ("sort", "route", "choose", "add_and_norm", "rotate_and_write", "times_a", "matmul", "unpack", "grouped", "outer")
TENSOR_MEMORY = 512
"""Columns of a Blackwell GPU's tensor memory."""
LIMIT, ALPHA = 7.0, 1.702


def _shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _tiled(name, experts, rank, layers=()):
    from discover_jax.kernels.experts_decode import TiledMatrix

    out, slab = (2 * WIDTH if name == "gate_up" else WIDTH), SLABS[name].rows
    first = (*layers, experts)
    tiles = (*first, out // slab, WIDTH // COLUMNS, slab // ROWS)
    adapter = (_shape(*first, rank, WIDTH), _shape(*first, out, rank)) if rank else (None, None)
    words, factors = _shape(*tiles, 128, dtype=jnp.int32), _shape(*tiles, 8, dtype=jnp.int32)
    return TiledMatrix(words, factors, _shape(*first, out), *adapter, scale=2.0)


def _decode(monkeypatch, experts, rows, rank):
    from discover_jax.kernels import expert_rows_decode, experts_decode

    def decode(x, index, weights, gate_up, down, layer):
        return experts_decode.moe_routed(x, index, weights, gate_up, down, limit=LIMIT, alpha=ALPHA, layer=layer)

    choices = (_shape(rows, CHOSEN, dtype=jnp.int32), _shape(rows, CHOSEN, dtype=jnp.float32))
    matrices = (_tiled(name, experts, rank, (2,)) for name in SLABS)
    arguments = (_shape(rows, WIDTH), *choices, *matrices, _shape(dtype=jnp.int32))
    return record(monkeypatch, (experts_decode, expert_rows_decode), decode, *arguments)


def _route(monkeypatch, experts, rows, parts):
    from discover_jax.kernels import expert_rows_decode, route_decode

    def route(logits, layer):
        return route_decode.route_parts(logits, CHOSEN, layer)

    arguments = _shape(parts, rows, experts, dtype=jnp.float32), _shape(dtype=jnp.int32)
    return record(monkeypatch, (route_decode, expert_rows_decode), route, *arguments)


def _layer(monkeypatch, rows):
    """The small kernels of a layer: norms after both branches, and rotation."""
    from discover_jax.kernels import layer_decode
    from discover_jax.kernels.layer_parts import Branch, HeadSizes

    float32, int32 = (functools.partial(_shape, dtype=kind) for kind in (jnp.float32, jnp.int32))
    sizes = HeadSizes(64, 8, 64)

    def small(x, parts, routed, weights, scale, layer, qkv, turn, pool, places):
        for branch in (Branch(parts), Branch(routed, weights)):
            x, _ = layer_decode.add_and_norm(x, branch, scale, layer, 1e-5, jnp.bfloat16)
        return x, layer_decode.rotate_and_write(qkv, (turn, turn), pool, pool, layer, places, places, sizes)

    shapes = [float32(rows, WIDTH), float32(5, rows, 1, WIDTH), float32(1, rows, CHOSEN, WIDTH), float32(rows, CHOSEN)]
    shapes += [_shape(2, WIDTH), int32(), float32(3, rows, 80 * 64), float32(rows, 32), _shape(2, 100, 8, 128, 64), int32(rows)]
    return record(monkeypatch, layer_decode, small, *shapes)


def _update(monkeypatch, experts, rank):
    from discover_jax.kernels import experts_update

    def update(x, weights, adapters, index, gate_up, down, gradient):
        def forward(x, weights, adapters):
            return experts_update.moe_sorted(x, weights, adapters, index, gate_up, down, LIMIT, ALPHA, experts_update.GroupedTiling())

        return jax.vjp(forward, x, weights, adapters)[1](gradient)

    float32 = functools.partial(_shape, dtype=jnp.float32)
    adapters = [(float32(experts, rank, WIDTH), float32(experts, out, rank)) for out in (2 * WIDTH, WIDTH)] if rank else None
    choices = _shape(TOKENS, CHOSEN, dtype=jnp.int32)
    matrices = (_tiled(name, experts, 0) for name in SLABS)
    arguments = (_shape(TOKENS, WIDTH), float32(TOKENS, CHOSEN), tuple(adapters) if rank else None, choices, *matrices)
    return record(monkeypatch, experts_update, update, *arguments, float32(TOKENS, WIDTH))


def _launches(monkeypatch, rank) -> list[Recorded]:
    """The different launches of decoding and of the update with both models."""
    launches = []
    for experts in EXPERTS.values():
        launches += itertools.chain.from_iterable(_decode(monkeypatch, experts, rows, rank) for rows in ROWS_DECODED)
        launches += itertools.chain.from_iterable(
            _route(monkeypatch, experts, rows, parts) for rows, parts in itertools.product(ROWS_DECODED, (1, 15))
        )
        launches += _layer(monkeypatch, 128)
        launches += _update(monkeypatch, experts, rank)
    return list({repr(launch): launch for launch in launches}.values())


@pytest.mark.parametrize(("card", "most"), [(80, 128), (89, 64), (90, 128), (100, 128), (120, 64)])
@pytest.mark.parametrize("operation", ["experts", "decode_experts"])
def test_larger_adapters_use_the_reference_and_are_logged(monkeypatch, card, most, operation):
    """The same rank may fit one card and not another. Decoding fits them all up to its own limit."""
    from discover_jax.kernels import experts_decode, experts_update

    module, most = (experts_update, most) if operation == "experts" else (experts_decode, experts_decode.MOST_RANK)
    monkeypatch.setattr(experts_update, "compute_capability", lambda: card)
    lines, calls = [], []
    monkeypatch.setattr(fallback.logging, "warning", lambda text, *values: lines.append(text % values))
    for name, kind in (("moe_reference", "reference"), ("moe_sorted", "kernel"), ("moe_routed", "kernel")):
        monkeypatch.setattr(module, name, lambda *_, kind=kind, **__: calls.append(kind), raising=False)
    fallback.warn_reference.cache_clear()
    for rank in (most, most + 1):
        matrices = [_Held(_tiled(name, 4, rank)) for name in SLABS]
        choices = (_shape(2, CHOSEN, dtype=jnp.int32), _shape(2, CHOSEN, dtype=jnp.float32))
        options = {"experts": 4, "adapted": True, "limit": LIMIT, "alpha": ALPHA}
        (experts_update.moe_update if operation == "experts" else experts_decode.moe_decode)(
            _shape(2, WIDTH), *choices, *matrices, **options
        )
    assert calls == ["kernel", "reference"]
    (line,) = lines
    assert f"kernel of {operation} " in line
    assert f"rank {most + 1} is above {most}" in line
    assert "reference" in line


@pytest.mark.parametrize(
    ("rank", "packed", "said"), [(128, False, ""), (129, False, "rank 129 is above 128"), (8, True, "not laid out in tiles")]
)
def test_experts_of_a_layer_use_the_reference_for_the_same_reasons(monkeypatch, rank, packed, said):
    from discover_jax.kernels import experts_decode, layer_decode, layer_parts

    lines, calls = [], []
    monkeypatch.setattr(fallback.logging, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(layer_decode, "moe_parts", lambda *_, **__: calls.append("kernel"))
    monkeypatch.setattr(layer_parts, "moe_reference", lambda *_, **__: calls.append("reference") or jnp.zeros((2, WIDTH)))
    fallback.warn_reference.cache_clear()
    held = [_Held(_tiled(name, 4, rank)) for name in SLABS]
    if packed:
        for one in held:
            one.arrays = lambda *, adapted: {"blocks": None}
    choices = (_shape(2, CHOSEN, dtype=jnp.int32), _shape(2, CHOSEN, dtype=jnp.float32))
    options = {"experts": 4, "adapted": True, "limit": LIMIT, "alpha": ALPHA, "layer": 0, "rows": None}
    branch = layer_decode.experts(_shape(2, WIDTH), *choices, *held, **options)
    assert calls == (["reference"] if said else ["kernel"])
    assert (branch.weights_TX is None) == bool(said)  # the reference has weighed the experts
    assert [said in line for line in lines] == [True] * bool(said)
    assert experts_decode.MOST_RANK == 128


class _Held:
    """An ExpertMatrix that holds the arrays of tiles."""

    scale = 1.0

    def __init__(self, tiled):
        self._tiled = tiled

    def arrays(self, *, adapted):
        assert adapted
        return {name: getattr(self._tiled, name) for name in ("words", "factors", "bias", "lora_a", "lora_b")}


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_the_largest_adapter_fits_the_card(monkeypatch, tmp_path, card):
    from discover_jax.kernels import experts_decode, experts_update

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(experts_update, "compute_capability", lambda: card)
    launches = _update(monkeypatch, 4, experts_update.most_rank())
    launches += _decode(monkeypatch, 4, 128, experts_decode.MOST_RANK)
    for launch in {repr(launch): launch for launch in launches}.values():
        if launch.name not in ("sort", "unpack"):
            _check(launch, card)


def _check(launch: Recorded, card: int) -> None:
    compiled = compile_for(card, launch)
    assert compiled.target.arch == card
    assert compiled.shared <= SHARED_KIB[card] * 1024, launch
    assert getattr(compiled, "tmem_size", 0) <= TENSOR_MEMORY, launch


def test_every_kernel_of_the_experts_is_launched(monkeypatch):
    launches = _launches(monkeypatch, RANK)
    assert {launch.name for launch in launches} == set(KERNELS)
    assert {launch.constants["N"] for launch in launches if launch.name == "matmul"} == {8, 16, 32}  # rows of a block


@pytest.mark.parametrize(
    ("card", "kernel"),
    [
        # Compiling all of them takes minutes. The default run has the least shared memory.
        pytest.param(*case, marks=[] if case == (89, "outer") else pytest.mark.slow)
        for case in itertools.product(CARDS, KERNELS)
    ],
)
def test_kernels_fit_the_card(monkeypatch, tmp_path, card, kernel):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for rank in (RANK, 0):
        for launch in _launches(monkeypatch, rank):
            if launch.name == kernel and (rank or kernel in ("matmul", "grouped")):
                _check(launch, card)
