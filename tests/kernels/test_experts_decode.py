"""The decoding kernels: in Triton's interpreter on the CPU, on a GPU against float32, and the fallback to the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from triton_interpreter import needs_interpreter, results_of

from discover_jax.kernels.experts import moe_reference, route_top
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.kernel_set import kernel_set
from discover_jax.kernels.mxfp4_tiles import SLABS, lay_out, restore
from discover_jax.models.mxfp4 import dequantise

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.fixture(scope="module")
def errors():
    return results_of("interpreted_experts.py")[-1]


@pytest.mark.slow  # run it after changing the kernels
@needs_interpreter
def test_kernels_are_accurate_to_bfloat16_rounding(errors):
    assert len(errors) == 5
    for name, error in errors.items():
        assert error < 8e-3, name  # false for NaN, from an output that was not written


@dataclasses.dataclass(frozen=True)
class Tiled:
    """A tiled expert matrix with a plain computation of one expert."""

    held: dict
    paired: bool
    scale: float = 0.5

    def arrays(self, *, adapted):
        return {name: array for name, array in self.held.items() if adapted or not name.startswith("lora")}

    def apply(self, x_Ti, one):
        blocks, scales = restore(one["words"][None], one["factors"][None], paired=self.paired)
        y = x_Ti @ dequantise(blocks[0], scales[0], x_Ti.dtype).T + one["bias"].astype(x_Ti.dtype)
        if "lora_a" in one:
            y += self.scale * ((x_Ti @ one["lora_a"].T.astype(x_Ti.dtype)) @ one["lora_b"].T.astype(x_Ti.dtype))
        return y


def _normal(rng, *shape):
    """Numbers that bfloat16 holds."""
    return jnp.asarray(rng.standard_normal(shape).astype(jnp.bfloat16).astype(np.float32))


def _matrix(rng, experts, out, into, paired):
    blocks = jnp.asarray(rng.integers(0, 256, (experts, out, into // 32, 16), np.uint8))
    scales = jnp.asarray(rng.integers(119, 123, (experts, out, into // 32), np.uint8))
    words, factors = lay_out(blocks, scales, SLABS["gate_up" if paired else "down"])
    shapes = {"bias": (experts, out), "lora_a": (experts, 8, into), "lora_b": (experts, out, 8)}
    return Tiled({"words": words, "factors": factors} | {name: 0.125 * _normal(rng, *shape) for name, shape in shapes.items()}, paired)


EXPERTS, WIDTH, HIDDEN, ACTIVE = 8, 192, 128, 3
OPTIONS = {"experts": EXPERTS, "limit": 7.0, "alpha": 1.702}


def _problem(tokens, skew):
    rng = np.random.default_rng(tokens)
    gate_up, down = _matrix(rng, EXPERTS, 2 * HIDDEN, WIDTH, True), _matrix(rng, EXPERTS, WIDTH, HIDDEN, False)
    logits_TE = (rng.normal(size=(tokens, EXPERTS)) + skew * np.arange(EXPERTS)).astype(np.float32)
    return _normal(rng, tokens, WIDTH), *jax.jit(route_top, static_argnums=1)(logits_TE, ACTIVE), gate_up, down


def _relative(got, expected):
    return float(jnp.linalg.norm(got.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


@pytest.mark.accelerator
@on_gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 37, 128, 1024, 4096])
@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("adapted", [False, True])
def test_any_routing_matches_the_float32_reference(tokens, skew, adapted):
    x_TD, index_TX, weights_TX, gate_up, down = _problem(tokens, skew)
    moe = kernel_set("gpu").decode_experts
    assert moe is not moe_reference
    got = jax.jit(lambda x, index, weights: moe(x, index, weights, gate_up, down, adapted=adapted, **OPTIONS))(x_TD, index_TX, weights_TX)
    with jax.default_matmul_precision("highest"):
        expected = moe_reference(x_TD, index_TX, weights_TX, gate_up, down, adapted=adapted, **OPTIONS)
    assert _relative(got, expected) < 3e-3


@pytest.mark.accelerator
@on_gpu
def test_scan_over_layers():
    x_TD, index_TX, weights_TX, gate_up, down = _problem(16, 0.0)

    def layers(moe):
        def layer(x, _):
            return x + 0.1 * moe(x, index_TX, weights_TX, gate_up, down, adapted=True, **OPTIONS), None

        return jax.jit(lambda x: jax.lax.scan(layer, x, length=5)[0])(x_TD)

    with jax.default_matmul_precision("highest"):
        expected = layers(moe_reference)
    assert _relative(layers(kernel_set("gpu").decode_experts), expected) < 5e-3


@pytest.mark.accelerator
@on_gpu
def test_layer_of_a_stack_is_read_in_place():
    x_TD, index_TX, weights_TX, _, _ = _problem(16, 0.0)
    layers = [_problem(tokens, 0.0)[3:] for tokens in (16, 17, 18)]
    stacks = [
        dataclasses.replace(of_layers[0], held=jax.tree.map(lambda *arrays: jnp.stack(arrays), *(m.held for m in of_layers)))
        for of_layers in zip(*layers, strict=True)
    ]
    moe = kernel_set("gpu").decode_experts
    run = jax.jit(lambda layer: moe(x_TD, index_TX, weights_TX, *stacks, adapted=True, layer=layer, **OPTIONS))
    for i, layer in enumerate(layers):
        expected = moe(x_TD, index_TX, weights_TX, *layer, adapted=True, **OPTIONS)
        np.testing.assert_array_equal(run(jnp.int32(i)), expected)


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_untiled_weights_use_the_reference_and_are_logged(logged):
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    from discover_jax.kernels import experts_decode

    warn_reference.cache_clear()
    x_TD, index_TX, weights_TX, gate_up, down = _problem(5, 0.0)
    dense = [dataclasses.replace(m, held={k: v for k, v in m.held.items() if k != "words"}) for m in (gate_up, down)]
    for matrix in dense:
        object.__setattr__(matrix, "apply", lambda x, one: x[:, :1] + one["bias"])
    functions = (experts_decode.moe_decode, experts_decode.moe_decode, moe_reference)
    run = jax.jit(lambda *arguments: [function(*arguments, *dense, adapted=False, **OPTIONS) for function in functions])
    found = run(x_TD, index_TX, weights_TX)
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])
    (line,) = logged
    assert "decode_experts" in line
    assert "tiles" in line
