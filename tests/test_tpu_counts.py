"""Counted bytes and operations of TPU programs, against counts by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

from discover_jax import costs, costs_tpu
from discover_jax.costs import MeshShape
from discover_jax.models.config import LoraConfig
from discover_jax.models.families import SHAPES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _load(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def hlo():
    return _load("hlo_counts")


@pytest.fixture(scope="module")
def counts():
    return _load("tpu_counts")


def _module(instructions, *, more=""):
    lines = "\n".join(f"  {line}" for line in instructions)
    return f"HloModule m\n\n{more}\nENTRY %main.1 (p: f32[8,128]) -> f32[8,128] {{\n{lines}\n}}\n"


P = "%p = f32[8,128]{1,0:T(8,128)} parameter(0)"
F = "f32[8,128]{1,0:T(8,128)}"
"""4,096 bytes."""


@pytest.mark.parametrize(
    ("instructions", "moved"),
    [
        ([f"ROOT %a = {F} add(%p, %p)"], 3 * 4_096),
        ([f"ROOT %a = {F} add(f32[8,128]{{1,0:T(8,128)}} %p, f32[8,128]{{1,0:T(8,128)}} %p)"], 3 * 4_096),
        ([f"%b = {F} bitcast(%p)", "ROOT %c = bf16[8,128]{1,0:T(8,128)(2,1)} convert(%b)"], 4_096 + 2_048),
        (["%a = f32[8,128]{1,0:T(8,128)S(1)} copy(%p)", f"ROOT %b = {F} negate(%a)"], 2 * 4_096),  # through the vector memory
        ([f"%s = ({F}, {F}, u32[]{{:S(2)}}) copy-start(%p)", f"ROOT %d = {F} copy-done(%s)"], 2 * 4_096),
        (["%s = (f32[8,128], f32[16,128]) all-gather-start(%p)", "ROOT %d = f32[16,128]{1,0} all-gather-done(%s)"], 4_096 + 8_192),
        (["%i = s32[]{:T(128)} constant(0)", "ROOT %s = f32[1,128]{1,0} dynamic-slice(%p, %i, %i)"], 2 * 512),
        (["%u = f32[1,128]{1,0} constant({...})", f"ROOT %s = {F} dynamic-update-slice(%p, %u, %u, %u)"], 2 * 512),
        ([f'ROOT %k = ({F}, {F}) custom-call(%p), custom_call_target="tpu_custom_call"'], 0),
        (["%n = pred[8,128] compare(%p, %p)", f"ROOT %t = ({F}, /*index=1*/pred[8,128]) tuple(%p, %n)"], 2 * 4_096 + 1_024),
        (["ROOT %q = s4[8,128]{1,0} convert(%p)"], 4_096 + 512),
    ],
)
def test_operations_move_their_operands_and_results(hlo, instructions, moved):
    assert hlo.bytes_by_depth(_module([P, *instructions])) == [moved]


_SLICED = """%slices (x: f32[8,128], i: s32[]) -> f32[1,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,128]{1,0} bitcast(%x)
  ROOT %y = f32[1,128]{1,0} dynamic-slice(%b, %i, %i)
}
"""
_UPDATED = """%updates (x: f32[8,128], u: f32[1,128], i: s32[]) -> (f32[8,128], f32[1,128]) {
  %x = f32[8,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %y = f32[8,128]{1,0} dynamic-update-slice(%x, %u, %i, %i)
  %z = f32[1,128]{1,0} negate(%u)
  ROOT %t = (f32[8,128]{1,0}, f32[1,128]{1,0}) tuple(%y, %z)
}
"""


def test_fusions_move_only_the_slices_that_they_use(hlo):
    number = "%i = s32[] constant(0)"
    sliced = [P, number, "ROOT %f = f32[1,128]{1,0} fusion(%p, %i), kind=kLoop, calls=%slices"]
    assert hlo.bytes_by_depth(_module(sliced, more=_SLICED)) == [512 + 512 + 4]  # and the number, read
    update = "%f = (f32[8,128]{1,0}, f32[1,128]{1,0}) fusion(%p, %u, %i), kind=kLoop, calls=%updates"
    updated = [P, number, "%u = f32[1,128]{1,0} constant({...})", update, "ROOT %r = f32[8,128]{1,0} get-tuple-element(%f), index=0"]
    assert hlo.bytes_by_depth(_module(updated, more=_UPDATED)) == [512 + 4 + 512 + 512]


_LOOPS = f"""%inner (t: ({F})) -> ({F}) {{
  %t = ({F}) parameter(0)
  %g = {F} get-tuple-element(%t), index=0
  %n = {F} negate(%g)
  ROOT %r = ({F}) tuple(%n)
}}
%yes (a: {F}) -> {F} {{
  %a = {F} parameter(0)
  ROOT %n = {F} add(%a, %a)
}}
%no (a: {F}) -> {F} {{
  ROOT %a = {F} parameter(0)
}}
%outer (t: ({F})) -> ({F}) {{
  %t = ({F}) parameter(0)
  %w = ({F}) while(%t), condition=%some, body=%inner
  %g = {F} get-tuple-element(%w), index=0
  %c = s32[] constant(1)
  %k = {F} conditional(%c, %g, %g), branch_computations={{%no, %yes}}
  ROOT %r = ({F}) tuple(%k)
}}
"""


def test_turns_of_loops_are_counted_by_depth(hlo):
    main = [P, f"%n = {F} negate(%p)", f"%t = ({F}) tuple(%n)", f"%w = ({F}) while(%t), condition=%some, body=%outer"]
    text = _module([*main, f"ROOT %r = {F} get-tuple-element(%w), index=0"], more=_LOOPS)
    assert hlo.bytes_by_depth(text) == [2 * 4_096, 3 * 4_096, 2 * 4_096]


_PRODUCTS = """%product (x: bf16[64,32], w: bf16[16,32]) -> f32[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  ROOT %c = f32[64,16]{1,0} convolution(%x, %w), dim_labels=bf_oi->bf
}
%some (t: (s32[])) -> pred[] {
  %t = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[]{:T(128)} constant(28)
  ROOT %l = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%turn (t: (s32[])) -> (s32[]) {
  %t = (s32[]) parameter(0)
  %x = bf16[64,32]{1,0} constant({...})
  %w = bf16[16,32]{1,0} constant({...})
  %f = f32[64,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
  ROOT %r = (s32[]) tuple(%t)
}
"""


def test_products_are_counted_in_fusions_and_loops(hlo):
    dot = "%d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    main = [P, dot, "%t = (s32[]) tuple(%p)", "ROOT %w = (s32[]) while(%t), condition=%some, body=%turn"]
    assert hlo.product_operations(_module(main, more=_PRODUCTS)) == 2 * 8 * 8 * 128 + 28 * 2 * 64 * 16 * 32
    with pytest.raises(ValueError, match="number of turns"):
        hlo.product_operations(_module(main, more=_PRODUCTS.replace("direction=LT", "direction=GT")))


def test_text_of_something_else_is_refused(hlo):
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.bytes_by_depth("module @jit_f {\n}\n")


def test_a_step_moves_the_program_and_what_the_kernels_read(counts):
    """A program whose layers copy 1 MB each, by hand."""
    sizes, lora, mesh = SHAPES["gpt-oss-20b"], LoraConfig(), MeshShape(1, 4)
    loop = [f"%t = ({F}) tuple(%p)", f"%w = ({F}) while(%t), body=%outer", f"ROOT %r = {F} get-tuple-element(%w), index=0"]
    text = _module([P, *loop], more=_LOOPS)
    found = counts.decoding_bytes(sizes, lora, mesh, text)
    assert found["program"] == 3 * 4_096 + 12 * 2 * 4_096  # a step, and 12 pairs of layers
    assert found["keys and values"] / (32 * costs.cached_bytes(sizes, 8_192)) == pytest.approx(1.07, abs=0.01)
    assert found["least"] == pytest.approx(11.61e9, rel=1e-3)
    # Biases of 12 layers instead of one, two norms and the router's bias; and activations of 32 rows, the logits last.
    lines = 24 * 11 * 2 * (4_096 + 2 * 512 + 2_880 + 2 * 2_880 + 32)
    activations = 24 * 32 * 4 * ((2_880 + 4_096 + 4 * 2_880) + (4_096 + 2 * 512 + 2_880 + 3 * 2_880)) + 32 * (2 * 2_880 + 4 * 201_088)
    assert found["other weights"] == costs.other_bytes(sizes, lora) + lines + activations
    with pytest.raises(ValueError, match="loops 0 deep"):
        counts.decoding_bytes(sizes, lora, mesh, _module([P, f"ROOT %n = {F} negate(%p)"]))


def test_attention_reads_whole_pages_and_writes_tiles(counts):
    """A page has 128 places, so half of one is read in vain. A token is written by tiles of 16 places with heads of 128, and of 128 places
    with heads of 64; gpt-oss has as many windows of 128 tokens as full layers."""
    dense, gpt_oss = (counts.cache_factor(SHAPES[name], rows=4_096) for name in ("qwen2.5-coder-1.5b", "gpt-oss-20b"))
    assert dense == pytest.approx((8_192 + 64 + 2 * 16) / 8_192, abs=1e-3)
    assert gpt_oss == pytest.approx((8_192 + 64 + 128 + 2 * 2 * 128) / (8_192 + 128), abs=1e-3)


@pytest.mark.parametrize(("held", "least", "most"), [(128, 1.02, 1.04), (16, 1.05, 1.1)])
def test_the_experts_kernel_reads_little_more_than_the_chosen_experts(counts, held, least, most):
    """All experts of the 120b, and those of one of eight devices, which reads some twice: their rows do not fit one block."""
    assert least < counts.experts_factor(SHAPES["gpt-oss-120b"], held, draws=4) < most


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("20b_row", 1.08),
        pytest.param("120b_8_rows", 1.04, marks=pytest.mark.slow),
        pytest.param("120b_8_rows_unequal", 1.12, marks=pytest.mark.slow),
        pytest.param("120b_16_short_rows", 1.2, marks=pytest.mark.slow),
    ],
)
def test_operations_over_those_needed_with_full_rematerialisation(counts, name, most):
    assert 0.85 < counts.operations_ratio(counts.ROUTINGS[name]) < most


@pytest.fixture(scope="module")
def schedule():
    return _load("tpu_schedule")


def _bundles(*lengths_and_operations):
    """A schedule whose parts have this many cycles, the last of each a branch, after a prologue of two."""
    lines = ["     0   :  { %1 = vmov 0 }", "   0x1   :  {}"]
    for number, (length, operation) in enumerate(lengths_and_operations):
        last = [f" 0x{number}0 PF: > {{ %3 = sbr.rel (%p1) target = $region{number} }}"]
        lines += [f" 0x{number}1 {'LB' if not number else '  '}: > {{ %2 = {operation} }}", *["  0xff   : > {}"] * (length - 2), *last]
    return "\n".join(["= control target key start", "LB: loop body", *lines])


def test_a_step_has_the_longest_of_its_parts_with_products(schedule):
    text = _bundles((10, "vadd"), (100, "vmatmul.bf16.gmra.mxu0"), (120, "vmatmul.bf16.gmra.mxu0"), (30, "vst"))
    assert schedule.cycles_of(text) == 10 + 120 + 30
    once_for_a_row = _bundles((400, "vst")).replace("LB", "PB")
    assert schedule.cycles_of(f"{text}\n{once_for_a_row}") == 10 + 120 + 30
    text = _bundles((10, "vadd"), (120, "vmatmul.bf16.gmra.mxu0"), (60, "vst"), (30, "vst"))
    assert schedule.cycles_of(text) == 10 + 120 + 60 + 30
    assert schedule.cycles_of(text, heads=4) == 10 + 120 + 30  # the products of one head take 30
    with pytest.raises(ValueError, match="no loop"):
        schedule.cycles_of("     0   :  { %1 = vmov 0 }")


def test_needed_operations_of_scheduled_kernels(schedule):
    """Blocks of 256 rows by 2,880 x 2,880: gates and ups, then down. Attention: two products of 512 x 512 x 64."""
    needed = {kernel.name: kernel.needed for kernel in schedule.kernels()}
    assert needed["experts_activation"] == needed["experts_d_inputs"] == 2 * needed["experts_down"] == 2 * 2 * 256 * 2_880**2
    assert needed["attention_forward"] == 4 * 512 * 512 * 64
    assert all(set(one.kernels) <= set(needed) for one in schedule.PASSES.values())


def test_an_update_needs_the_products_of_text_and_kernels(counts):
    """Attention of 1,024 tokens: three of four pairs of blocks of 512, with two products forward and five backward."""
    sizes = SHAPES["qwen2.5-coder-1.5b"]
    kernels = 7 * 3 * 2 * 512 * 512 * 128 * 12
    assert counts.attention_operations(sizes, 1_024) == kernels
    text = _module([P, "ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}"])
    needed = costs_tpu.microbatch_needs(sizes, LoraConfig(), 1_024, 1_024, gradient=True).operations
    assert counts.update_ratio(sizes, 1_024, text) == pytest.approx((28 * kernels + 2 * 8 * 8 * 128) / needed)
