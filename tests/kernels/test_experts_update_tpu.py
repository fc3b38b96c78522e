"""The TPU kernels of the update's experts, interpreted on a CPU and compared with the reference, and compiled for TPUs without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from tpu_compiler import compiled, needs_libtpu, of_all_chips

from discover_jax.kernels import experts_update_tpu, mxfp4_lanes
from discover_jax.kernels.exchange import Exchange, chunk_of
from discover_jax.kernels.expert_matrices_tpu import unpacked
from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import moe_reference
from discover_jax.kernels.experts_update_pallas import Owners, Tiles, grouped, outer, unpack
from discover_jax.kernels.experts_update_tpu import Layer, choose_tiles, moe_sorted, moe_update
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.kernel_set import find_kernel
from discover_jax.models.mxfp4 import dequantise

LIMIT, ALPHA, SCALES = 2.0, 1.702, (0.5, 0.25)
SMALL = Tiles(rows=16, columns=128, blocks=2, interpret=True)
EXPERTS, TOKENS, SHARE = 4, 23, 2
NO_EXCHANGE = Exchange()


class Matrix:
    """A matrix of all experts. With `weight` it has exact float32 weights for the reference, without it MXFP4 for the kernels."""

    def __init__(self, arrays, scale, adapter=None, weight=None):
        self.scale, self.own = scale, arrays | (dict(zip(("lora_a", "lora_b"), adapter, strict=True)) if adapter else {})
        if weight is not None:
            self.own = {"weight": weight} | {name: array for name, array in self.own.items() if name not in ("blocks", "scales")}

    def arrays(self, *, adapted):
        return self.own

    def apply(self, x_Ti, one):
        y = x_Ti @ one["weight"].T + one["bias"]
        return y + self.scale * (x_Ti @ one["lora_a"].T) @ one["lora_b"].T if "lora_a" in one else y


def _packed(rng, experts, out, into):
    blocks = rng.integers(0, 256, (experts, out, into // 32, 16), dtype=np.uint8)
    scales = rng.integers(121, 124, (experts, out, into // 32), dtype=np.uint8)
    bias = (0.3 * rng.normal(size=(experts, out))).astype(jnp.bfloat16).astype(np.float32)
    return {"blocks": blocks, "scales": scales, "bias": bias}


def _problem(tokens=TOKENS, share=SHARE, experts=EXPERTS, *, width=64, hidden=32, rank=4):
    """Numbers that bfloat16 holds: activations, weights of the choices, adapters; matrices; and the output's gradient."""
    rng = np.random.default_rng(tokens)

    def exact(*shape, scale=0.3):
        return (scale * rng.normal(size=shape)).astype(jnp.bfloat16).astype(np.float32)

    x, d_out = exact(tokens, width, scale=0.5), exact(tokens, width)
    weights = rng.uniform(0.1, 1, size=(tokens, share)).astype(np.float32)
    shapes = ((experts, rank, width), (experts, 2 * hidden, rank)), ((experts, rank, hidden), (experts, width, rank))
    adapters = tuple(tuple(exact(*shape) for shape in pair) for pair in shapes) if rank else None
    matrices = _packed(rng, experts, 2 * hidden, width), _packed(rng, experts, width, hidden)
    return (x, weights, adapters), matrices, d_out


@functools.partial(jax.jit, static_argnames=("tiles", "dtype", "exchange", "limit"))
def _by_kernels(leaves, index, matrices, d_out, *, tiles=SMALL, dtype=jnp.float32, exchange=NO_EXCHANGE, limit=LIMIT):
    """The output and its gradients in the leaves."""
    layer = Layer(limit, ALPHA, *SCALES, tiles, exchange)
    out, pull = jax.vjp(lambda x, weights, adapters: moe_sorted(x.astype(dtype), weights, adapters, index, *matrices, layer), *leaves)
    return out, pull(d_out)


@functools.partial(jax.jit, static_argnames="limit")
def _by_reference(leaves, index, matrices, d_out, *, limit=LIMIT):
    def reference(x, weights, adapters):
        exact = [dequantise(one["blocks"], one["scales"], jnp.float32) for one in matrices]
        both = zip(matrices, SCALES, adapters or (None, None), exact, strict=True)
        options = {"experts": matrices[0]["bias"].shape[0], "adapted": adapters is not None, "limit": limit, "alpha": ALPHA}
        return moe_reference(x, index, weights, *(Matrix(*one) for one in both), **options)

    out, pull = jax.vjp(reference, *leaves)
    return out, pull(d_out)


def _compare(problem, index, tolerance, *, limit=LIMIT, **options):
    """The output and the gradients of x, weights and the adapters' four matrices, relative to the norm of each."""
    leaves, matrices, d_out = problem
    index = jnp.asarray(index, jnp.int32)
    found, expected = (
        jax.tree.leaves(f(leaves, index, matrices, d_out, limit=limit, **more)) for f, more in ((_by_kernels, options), (_by_reference, {}))
    )
    assert len(found) == len(expected) == (7 if leaves[2] else 3)
    for number, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want), number
        assert np.abs(want).max() > 0.001


def _random(tokens=TOKENS, share=SHARE, experts=EXPERTS, seed=0):
    """Different experts for each token."""
    return np.argsort(np.random.default_rng(seed).normal(size=(tokens, experts)), axis=1)[:, :share]


def _one_row():
    index = np.full((TOKENS, SHARE), EXPERTS)
    index[5, 1] = 2
    return index


_ROUTINGS = {
    "no block is full, and one choice in three is on another device": np.where(
        np.arange(2 * TOKENS).reshape(-1, 2) % 3, _random(), EXPERTS
    ),
    "two experts have all rows": np.tile([3, 1], (TOKENS, 1)),
    "one expert has all rows": np.tile([2, EXPERTS], (TOKENS, 1)),
    "one row": _one_row(),
}


@pytest.mark.parametrize("routing", _ROUTINGS)
def test_the_kernels_agree_with_the_reference(routing):
    _compare(_problem(), _ROUTINGS[routing], 1e-5)


def test_devices_without_rows_add_nothing():
    (x, *more), matrices, d_out = _problem()
    for found in jax.tree.leaves(_by_kernels((x, *more), jnp.full((TOKENS, SHARE), EXPERTS, jnp.int32), matrices, d_out)):
        assert not np.any(found)


@pytest.mark.parametrize(("tokens", "devices", "chunk"), [(34_192, 8, 5_712), (34_192, 16, 2_864), (4_096, 16, 2_048), (5, 8, 16)])
def test_chunks_of_devices_are_whole_tiles(tokens, devices, chunk):
    """Six chunks of 5,699 tokens, twelve of 2,850, two that need no rounding, and one that is mostly padding."""
    assert chunk_of(tokens, devices, 49_152, experts_update_tpu.TOKEN_TILE) == chunk


@pytest.mark.parametrize(
    ("most", "tile"), [pytest.param(TOKENS, 1, marks=pytest.mark.slow), (10, 1), pytest.param(10, 5, marks=pytest.mark.slow)]
)
def test_chunks_of_tokens_change_no_digit_of_a_token(most, tile):
    """One chunk, three that a token of padding fills up, and three with seven tokens of padding. A mesh of one device exchanges tokens with
    itself. Only the sums over all tokens, the adapters' gradients, change their order."""
    (x, weights, adapters), matrices, d_out = _problem()
    index, mesh = jnp.asarray(_random(), jnp.int32), jax.make_mesh((1,), ("expert",))
    run = functools.partial(_by_kernels, exchange=Exchange("expert", most, tile))
    spread = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False))
    arguments = (x, weights, adapters), index, matrices, d_out
    (out, (d_x, d_weights, found)), (out_1, (d_x_1, d_weights_1, expected)) = spread(*arguments), _by_kernels(*arguments)
    for one, same in ((out, out_1), (d_x, d_x_1), (d_weights, d_weights_1)):
        np.testing.assert_array_equal(one, same)
    for one, close in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, close, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("routing", _ROUTINGS)
def test_without_adapters(routing):
    _compare(_problem(rank=0), _ROUTINGS[routing], 1e-5)


ROUNDED = {"tolerance": 6e-3, "dtype": jnp.bfloat16, "limit": 1e3}
"""bfloat16 has 8 bits. With the other limit, rounding moves many gates of these problems across it, and a clamped gate has no gradient."""


@pytest.mark.slow
def test_bfloat16_within_its_rounding():
    _compare(_problem(), _random(), **ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tolerance": 1e-5}, ROUNDED], ids=["float32", "bfloat16"])
def test_larger_sizes(options):
    """Widths that fill no whole number of columns, several parts of unpacking, and experts of several blocks."""
    problem = _problem(700, 4, 9, width=704, hidden=416, rank=8)
    _compare(problem, _random(700, 4, 9), tiles=Tiles(rows=128, columns=256, blocks=4, interpret=True), **options)


@pytest.mark.slow
def test_a_simulated_tpu_finds_no_races(capfd):
    """The simulator has the chip's memories and copies, two cores, and NaN where nothing was written. It prints the races."""
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    problem = _problem(40, width=320, hidden=160)
    _compare(problem, np.where(np.arange(80).reshape(-1, 2) % 3, _random(40), EXPERTS), 1e-5, tiles=Tiles(16, 128, 2, interpret))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("groups", "width"), [(3, 130), pytest.param(1, 16, marks=pytest.mark.slow), (38, 24)]
)  # 38 scales are unpacked in several parts
def test_unpacking_is_exact(groups, width):
    rng = np.random.default_rng(groups)
    blocks, scales = rng.integers(0, 256, (2, width, groups, 16), dtype=np.uint8), rng.integers(4, 250, (2, width, groups), dtype=np.uint8)
    packed = blocks.transpose(0, 2, 3, 1).reshape(2, -1, width)
    found = jax.jit(unpack, static_argnums=2)(packed, scales.swapaxes(1, 2), SMALL)
    np.testing.assert_array_equal(found, np.asarray(jax.jit(dequantise)(blocks, scales)).swapaxes(1, 2))


@pytest.mark.parametrize(("parts", "groups", "width"), [pytest.param(1, 2, 24, marks=pytest.mark.slow), (2, 6, 130)])
def test_unpacking_the_layout_of_decoding_is_exact(parts, groups, width):
    rng = np.random.default_rng(groups)
    blocks = rng.integers(0, 256, (2, parts * width, groups, 16), dtype=np.uint8)
    scales = rng.integers(4, 250, (2, parts * width, groups), dtype=np.uint8)
    bias = np.zeros((2, parts * width), np.float32)
    laid_out = {"lanes": mxfp4_lanes.lay_out_blocks(blocks, parts), "powers": mxfp4_lanes.lay_out_scales(scales, parts), "bias": bias}
    both = jax.jit(lambda one: [unpacked(one, SMALL, part, parts) for part in range(parts)])
    for found, expected in zip(both(laid_out), both({"blocks": blocks, "scales": scales}), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_bfloat16_products_have_float32_sums():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=size).astype(jnp.bfloat16) for size in ((32, 96), (3, 96, 200)))
    owners = Owners(np.array([2, 2], np.int32), np.array([16, 3], np.int32))
    exact = np.asarray(x, np.float32) @ np.asarray(w[2], np.float32)
    np.testing.assert_allclose(jax.jit(lambda x, w: grouped([(x, w)], owners, SMALL))(x, w), exact, atol=1e-4)
    sums = np.einsum("pr,pn->rn", exact[:, :5].astype(jnp.bfloat16), np.asarray(x, np.float32))
    found = np.asarray(jax.jit(lambda left, x: outer(left, x, 3, owners, SMALL))(exact[:, :5], x))
    np.testing.assert_allclose(found[2], sums, rtol=1e-5, atol=1e-2)
    assert not found[:2].any()


@pytest.mark.parametrize(("choices", "experts", "rows"), [(4 * 34_192, 32, 512), (4 * 34_192, 128, 256), (100, 128, 128)])
def test_blocks_are_small_where_experts_have_few_rows(choices, experts, rows):
    assert choose_tiles(choices, experts, experts).rows == rows


def test_slots_are_sorted_as_on_other_platforms():
    for seed, tokens in enumerate((24, 1_100)):
        index = np.where(np.arange(tokens)[:, None] % 5 == 0, EXPERTS, _random(tokens, seed=seed)).astype(np.int32)
        found, expected = jax.jit(lambda x: (experts_update_tpu._sorted_slots(x, EXPERTS), sort_rows(x, EXPERTS, 16).slots))(index)
        np.testing.assert_array_equal(found, expected)


def test_the_platform_has_them():
    assert find_kernel("experts", "tpu") == (moe_update, "")


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_models_call_them_with_packed_and_with_dense_experts(monkeypatch, form):
    """Shapes only; both forms reach `moe_sorted`."""
    (x, weights, adapters), matrices, _ = _problem()
    seen = []
    monkeypatch.setattr(experts_update_tpu, "moe_sorted", lambda x, *rest: seen.append(rest) or jnp.zeros(x.shape, jnp.float32))

    def update(x, weights, matrices):
        exact = [dequantise(one["blocks"], one["scales"]) if form == "dense" else None for one in matrices]
        both = (Matrix(*one) for one in zip(matrices, SCALES, adapters, exact, strict=True))
        return moe_update(x, _random(), weights, *both, experts=EXPERTS, adapted=True, limit=LIMIT, alpha=ALPHA)

    jax.eval_shape(update, x.astype(jnp.bfloat16), weights, matrices)
    ((_, given, _, gate_up, _, layer),) = seen
    assert jax.tree.structure(given) == jax.tree.structure(adapters)
    assert set(gate_up) == ({"weight", "bias"} if form == "dense" else {"blocks", "scales", "bias"})
    assert (layer.scale_up, layer.scale_down) == SCALES


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, both: (x.astype(jnp.float32), both), "float32"),
        (lambda x, both: (x, [Matrix(one.own, 1.0, weight=jnp.zeros((EXPERTS, 1, 1), jnp.float32)) for one in both]), "weights"),
        (lambda x, both: (x, [Matrix({"words": one.own["blocks"]}, 1.0) for one in both]), "packed"),
        (lambda x, both: (x, [both[0], Matrix(_problem(rank=0)[1][1], 1.0)]), "adapter"),
    ],
)
def test_what_the_kernels_do_not_support_uses_the_reference_and_is_logged(monkeypatch, change, said):
    (x, weights, adapters), matrices, _ = _problem()
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(experts_update_tpu, "moe_reference", lambda x, *_, **__: x)
    warn_reference.cache_clear()
    x, both = change(x.astype(jnp.bfloat16), [Matrix(*one) for one in zip(matrices, SCALES, adapters, strict=True)])
    moe_update(x, jnp.asarray(_random()), weights, *both, experts=EXPERTS, adapted=True, limit=LIMIT, alpha=ALPHA)
    warn_reference.cache_clear()
    (line,) = lines
    assert "experts on tpu" in line
    assert said in line


@pytest.mark.slow
@needs_libtpu
@of_all_chips
def test_they_compile_for_tpus_and_memory_is_bounded(topology):
    """A layer of gpt-oss, forward and backward, with the longest row of the report's third run on each device."""
    printed = compiled("tpu_compile_program.py", topology, "experts", seconds=3000)
    temporaries = [int(line.split()[-1]) for line in printed.splitlines() if line.startswith("temporaries")]
    assert len(temporaries) == 2
    assert max(temporaries) < 16 * 2**30
