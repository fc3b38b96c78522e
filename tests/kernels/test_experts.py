"""Routing, activation and mixture of experts, compared with plain loops in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from discover_jax.kernels.experts import gated, moe_reference, route_top

_route = jax.jit(route_top, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A matrix [E, in, out] of all experts, without bias or adapter."""

    weights: jax.Array
    scale: float = 0.0

    def arrays(self, *, adapted):
        return {"weights": self.weights}

    def apply(self, x_Ti, one):
        return x_Ti @ one["weights"]


def _act(h, limit, alpha):
    gate, up = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
    return (up + 1) * gate / (1 + np.exp(-alpha * gate))


def test_activation_clamps_the_gate_above_and_the_up_values_on_both_sides():
    h = np.array([[-20.0, -20.0, 20.0, 20.0, 1.0, -0.5]], np.float32)
    np.testing.assert_allclose(gated(h, limit=7.0, alpha=1.702)[0], _act(h[0].astype(np.float64), 7.0, 1.702), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("active", [1, 2, 5])
def test_routing_is_a_softmax_over_the_largest(active):
    logits = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    index, weights = map(np.asarray, _route(logits, active))
    for row, chosen, out in zip(logits.astype(np.float64), index, weights, strict=True):
        top = np.argsort(row)[::-1][:active]
        np.testing.assert_array_equal(chosen, top)
        np.testing.assert_allclose(out, np.exp(row[top]) / np.exp(row[top]).sum(), atol=1e-6)


def test_ties_still_choose_different_experts():
    index, weights = map(np.asarray, _route(np.zeros((3, 6), np.float32), 2))
    assert (index[:, 0] != index[:, 1]).all()
    np.testing.assert_allclose(weights, 0.5, rtol=1e-6)


@jax.jit
def _mixture(index, x, weights, up, down, layer):
    experts, options = up.shape[-3], {"adapted": False, "limit": 7.0, "alpha": 1.702}
    return moe_reference(x, index, weights, Dense(up), Dense(down), experts=experts, layer=layer, **options)


@pytest.mark.parametrize("layer", [None, 0, 2])
@pytest.mark.parametrize("skew", [0.0, 50.0])
def test_mixture_drops_no_token_for_any_routing(skew, layer):
    rng = np.random.default_rng(1)
    tokens, width, hidden, experts = 40, 6, 10, 4
    x = rng.normal(size=(tokens, width))
    up, down = rng.normal(size=(experts, width, 2 * hidden)), rng.normal(size=(experts, hidden, width))
    logits = rng.normal(size=(tokens, experts)) + skew * np.arange(experts)  # a large skew sends every token to the same two
    index, weights = map(np.asarray, _route(logits, 2))
    stacks = [a if layer is None else np.stack([a if i == layer else rng.normal(size=a.shape) for i in range(3)]) for a in (up, down)]
    out = _mixture(index, *(np.asarray(a, np.float32) for a in (x, weights, *stacks)), layer)
    expected = np.zeros((tokens, width))
    for t, j in np.ndindex(tokens, 2):
        e = index[t, j]
        expected[t] += weights[t, j] * (_act(x[t] @ up[e], 7.0, 1.702) @ down[e])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
