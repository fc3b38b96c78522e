"""The TPU kernel of decoding experts, interpreted on a CPU and compared with the reference."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler import compiled, needs_libtpu, of_all_chips

from discover_jax.kernels import experts_decode_tpu
from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import moe_reference, route_top
from discover_jax.kernels.experts_decode_tpu import choose_rows, moe_lanes, steps_of
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.mxfp4_lanes import lay_out_blocks, lay_out_scales, powers_shape, restore, words_shape
from discover_jax.models.mxfp4 import dequantise

WIDTH, HIDDEN, SCALE = 192, 128, 0.5


@dataclasses.dataclass(frozen=True)
class Matrix:
    """An expert matrix in the kernels' layout, with a plain computation of one expert."""

    held: dict
    out: int
    scale: float = SCALE

    def arrays(self, *, adapted):
        return {name: array for name, array in self.held.items() if adapted or not name.startswith("lora")}

    def apply(self, x, one):
        def product(x, weight):
            return jnp.einsum("ti,oi->to", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)

        blocks, scales = restore(one["lanes"][None], one["powers"][None], self.out)
        y = product(x, dequantise(blocks[0], scales[0], x.dtype)) + one["bias"]
        if "lora_a" in one:
            y += product((self.scale * product(x, one["lora_a"])).astype(x.dtype), one["lora_b"])
        return y


def _matrix(rng, layers, experts, out, into, parts, rank):
    blocks = rng.integers(0, 256, (layers * experts, out, into // 32, 16)).astype(np.uint8)
    scales = rng.integers(118, 123, (layers * experts, out, into // 32)).astype(np.uint8)
    shapes = {"bias": (out,), "lora_a": (rank, into), "lora_b": (out, rank)}
    held = {name: (0.1 * rng.normal(size=(layers, experts, *shape))).astype(np.float32) for name, shape in shapes.items()}
    for name, array in (("lanes", lay_out_blocks(blocks, parts)), ("powers", lay_out_scales(scales, parts))):
        held[name] = np.asarray(array).reshape(layers, experts, *array.shape[1:])
    return held


def _problem(tokens, experts=4, share=2, *, skew=0.0, layers=1, dtype=jnp.float32, width=WIDTH, hidden=HIDDEN, rank=3):
    rng = np.random.default_rng(tokens)
    gate_up, down = (
        Matrix(_matrix(rng, layers, experts, out, into, parts, rank), out)
        for out, into, parts in ((2 * hidden, width, 2), (width, hidden, 1))
    )
    x = rng.normal(size=(tokens, width)).astype(dtype)
    return x, *_routing(rng, tokens, experts, share, skew), gate_up, down


def _routing(rng, tokens, experts, share, skew):
    logits = (rng.normal(size=(tokens, experts)) + skew * np.arange(experts)).astype(np.float32)
    return jax.jit(route_top, static_argnums=1)(logits, share)


def _compare(problem, tolerance, *, adapted=True, layer=0, interpret: bool | pltpu.InterpretParams = True, **options):
    x, index, weights, gate_up, down = problem
    experts, common = gate_up.held["bias"].shape[1], {"limit": 7.0, "alpha": 1.702}
    kernel = functools.partial(moe_lanes, experts=experts, scales=(SCALE, SCALE), interpret=interpret, **common, **options)
    got = jax.jit(lambda *arguments: kernel(*arguments, layer=jnp.int32(layer)))(
        x, index, weights, gate_up.arrays(adapted=adapted), down.arrays(adapted=adapted)
    )
    with jax.default_matmul_precision("highest"):
        reference = functools.partial(moe_reference, experts=experts, adapted=adapted, layer=jnp.int32(layer), **common)
        expected = np.asarray(jax.jit(lambda *arguments: reference(*arguments, gate_up, down))(x, index, weights), np.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=tolerance * max(1, np.abs(expected).max()))
    assert np.abs(expected).max() > 0.1


def test_rows_that_fill_no_block_and_an_expert_that_needs_two():
    """23 tokens with adapters, in the second layer of a stack. Most of them choose the last two of the four experts."""
    problem = _problem(23, skew=3.0, layers=2)
    counts = np.bincount(np.asarray(problem[1]).ravel(), minlength=4)
    assert counts.max() > 16
    _compare(problem, 1e-5, layer=1, rows=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "adapted"),
    [
        ({"tokens": 1}, True),
        ({"tokens": 1}, False),
        ({"tokens": 40, "skew": 100.0}, True),  # all rows have the same experts; the others have none
        ({"tokens": 37, "experts": 8, "share": 3}, True),
        ({"tokens": 5, "experts": 3, "share": 3}, False),  # every expert has all rows
        ({"tokens": 64, "experts": 32, "share": 4, "width": 64, "hidden": 320}, True),  # sizes that fill no lanes; one piece
    ],
    ids=str,
)
def test_any_routing_and_sizes(problem, adapted):
    _compare(_problem(**problem), 1e-5, adapted=adapted)


@pytest.mark.slow
def test_bfloat16_within_its_rounding():
    """Products of bfloat16 and float32 sums, in the order of the reference, so that most digits are equal."""
    _compare(_problem(37, dtype=jnp.bfloat16), 2e-3)


@pytest.mark.slow
def test_more_tokens_than_a_call_takes(monkeypatch):
    monkeypatch.setattr(experts_decode_tpu, "MOST_TOKENS", 16)
    _compare(_problem(37), 1e-5)


@pytest.mark.slow
def test_experts_of_other_devices_add_nothing():
    x, index, weights, gate_up, down = _problem(21)
    elsewhere = jnp.where(index == 1, 4, index)  # 4 stands for experts elsewhere
    _compare((x, elsewhere, jnp.where(index == 1, 0, weights), gate_up, down), 1e-5, elsewhere=12)


@pytest.mark.slow
def test_a_simulated_tpu_finds_no_races(capfd):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    _compare(_problem(23, skew=3.0), 1e-5, interpret=interpret)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "experts", "skew"),
    [(50, 8, 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 8, 0.0), (50, 8, 100.0), (128, 16, 1.0)))],
)
def test_each_routed_row_is_in_one_step_and_steps_without_rows_read_nothing_new(tokens, experts, skew):
    index, weights = _routing(np.random.default_rng(tokens), tokens, experts, 4, skew)
    steps = jax.jit(steps_of, static_argnums=(2, 3, 4))(index, weights, experts, 16, 3)
    expert, first, rows, token, weight, stack = (np.asarray(x) for x in steps)
    seen = []
    for step in np.flatnonzero(rows):
        for row in range(first[step], first[step] + rows[step]):
            seen.append((token[row], expert[step], weight[row]))
    flat = [
        (t, e, w)
        for t, (es, ws) in enumerate(zip(np.asarray(index), np.asarray(weights), strict=True))
        for e, w in zip(es, ws, strict=True)
    ]
    assert sorted(seen) == sorted(flat)
    np.testing.assert_array_equal(stack, expert + 3 * experts)
    halves = rows.reshape(2, -1) > 0
    assert abs(int(halves[0].sum()) - int(halves[1].sum())) <= 1
    for number, half in enumerate(halves):
        used = int(half.sum())
        assert half[:used].all()
        own = expert.reshape(2, -1)[number]
        assert (own[used:] == own[max(used - 1, 0)]).all()


@pytest.mark.parametrize("layers", [1, 2])
def test_small_arrays_that_are_laid_out_before_give_the_same_operands(layers):
    """`lay_out_trees` runs once in a launch; without it, the kernel's wrapper lays them out in each layer."""
    *_, gate_up, down = _problem(3, layers=layers)
    declared = {"gate_up": gate_up.held, "down": down.held}
    frozen = {"norm": np.ones(2), "experts": {name: {k: v for k, v in held.items() if "lora" not in k} for name, held in declared.items()}}
    lora = {
        "experts": {name: {k: v for k, v in held.items() if "lora" in k} for name, held in declared.items()},
        "head": {"lora_a": np.ones(3)},
    }
    laid_out, adapter = experts_decode_tpu.lay_out_trees(frozen, lora)
    prepare = jax.jit(experts_decode_tpu._prepare)
    assert laid_out["norm"] is frozen["norm"]
    assert adapter["head"] is lora["head"]
    for name, held in declared.items():
        arrays = laid_out["experts"][name] | adapter["experts"][name]
        assert arrays["bias"].ndim == held["bias"].ndim + 1
        for found, expected in zip(*(prepare(one, np.int32(0)) for one in (arrays, held)), strict=True):
            assert found.shape[0] == layers * 4
            np.testing.assert_array_equal(found, expected)
    assert set(experts_decode_tpu.lay_out_trees(frozen, {})[1]) == set()


@pytest.mark.parametrize(("tokens", "experts", "held", "share", "rows"), [(1, 4, 2, 2, 16), (37, 8, 8, 3, 16), (128, 128, 16, 4, 32)])
def test_steps_are_those_of_sorted_blocks(tokens, experts, held, share, rows):
    """Comparisons with sums, against `expert_rows.sort_rows`. The number `held` stands for experts elsewhere."""
    rng = np.random.default_rng(tokens)
    index, weights = (np.asarray(x) for x in _routing(rng, tokens, experts, share, 0.0))
    index = np.minimum(index, held)
    steps = jax.jit(steps_of, static_argnums=(2, 3, 4))(index, weights, held, rows, 3)
    expert, first, count, token, weight, stack = (np.asarray(x) for x in steps)
    slots, blocks = (np.asarray(x) for x in jax.jit(sort_rows, static_argnums=(1, 2))(index.T, held, rows))
    np.testing.assert_array_equal(token, slots % tokens)
    np.testing.assert_array_equal(weight, weights.T.reshape(-1)[slots])
    used = count > 0
    np.testing.assert_array_equal(np.stack([expert, first, count])[:, used], blocks[:, blocks[2] > 0])
    np.testing.assert_array_equal(stack, expert + 3 * held)


def test_a_block_holds_the_rows_of_most_experts():
    assert [choose_rows(tokens * 4, 128) for tokens in (1, 128, 512, 4096)] == [16, 16, 64, 256]
    assert choose_rows(64, 16) == 16


def test_other_layouts_use_the_reference_and_are_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    warn_reference.cache_clear()
    x, index, weights, gate_up, down = _problem(3)
    held = [{name: array[0] for name, array in one.held.items() if name not in ("lanes", "powers")} for one in (gate_up, down)]

    class Plain(Matrix):
        def apply(self, x, one):
            return jnp.zeros((len(x), self.out)) + one["bias"]

    plain = [Plain(own, one.out) for own, one in zip(held, (gate_up, down), strict=True)]
    options = {"experts": 4, "adapted": False, "limit": 7.0, "alpha": 1.702}
    functions = (experts_decode_tpu.moe_decode, experts_decode_tpu.moe_decode, moe_reference)
    found = jax.jit(lambda *arguments: [function(*arguments, *plain, **options) for function in functions])(x, index, weights)
    warn_reference.cache_clear()
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])
    (line,) = lines
    assert "decode_experts on tpu" in line
    assert "layout" in line


@pytest.mark.slow
@pytest.mark.parametrize(("held", "skew"), [(128, 0.0), (16, 0.0), (16, 1.0)])
def test_a_step_of_gpt_oss_120b_reads_little_more_than_the_least(held, skew):
    """128 rows, all experts or an eighth of them on a device. A step with rows reads a whole expert."""
    rng = np.random.default_rng(held)
    logits = jnp.asarray(rng.normal(size=(128, 128)) + skew * np.arange(128) / 128, jnp.float32)
    index, weights = route_top(logits, 4)
    rows = choose_rows(128 * 4 * held // 128, held)
    _, _, count, *_ = steps_of(jnp.minimum(index, held), weights, held, rows, 0)
    shapes = ((5760, 2880, 2), (2880, 2880, 1))
    each = sum(4 * np.prod(words_shape(*shape)) + np.prod(powers_shape(*shape)) for shape in shapes)
    least = sum(out * into * (1 / 2 + 1 / 32) for out, into, _ in shapes) * len(set(np.asarray(index).ravel()) & set(range(held)))
    tokens = 128 * 2880 * 4 * 5  # read, written by two cores, read and added
    assert int((count > 0).sum()) * each + tokens < 1.15 * least


@pytest.mark.slow
@needs_libtpu
@of_all_chips
def test_the_decoding_kernels_compile_for_tpus_in_place(topology):
    """Neither pools nor packed experts are copied or padded by XLA: see the program."""
    printed = compiled("tpu_decode_program.py", topology, seconds=1800)
    lines = [re.search(r"arguments (\d+), with padding (\d+), temporaries: (\d+)", line) for line in printed.splitlines()]
    sizes = [[int(number) for number in line.groups()] for line in lines if line]
    assert len(sizes) == 9
    for held, padded, temporaries in sizes:
        assert padded < 1.01 * held
        assert temporaries < 0.25 * 2**30
