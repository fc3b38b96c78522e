"""A whole decoding step of gpt-oss, with the kernels that a GPU gets by default: it is chosen, launched and compiled without the GPU."""

import collections
import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from recorded_launches import compile_for, record

from discover_jax.config import default_config
from discover_jax.engine import build_model
from discover_jax.kernels.triton_call import SHARED_KIB
from discover_jax.models.families import SHAPES

pytest.importorskip("triton", reason="needs triton (extra `parity` or `kernels`)")

CARDS = (80, 89, 90, 100, 120)
MODULES = ("attention_decode", "expert_rows_decode", "experts_decode", "layer_decode", "projections_decode", "route_decode")
SMALL = ("add_and_norm", "rotate_and_write", "route", "choose")
PAGE, TOKENS = 128, 512


def _model(name, **changes):
    config = default_config()
    for setting, value in changes.items():
        config.model[setting] = value
    return build_model(config, dataclasses.replace(SHAPES[name], num_layers=2), platform="gpu")


def _launches(monkeypatch, model, rows, card=90):
    """Those of one token a row, of two layers."""
    modules = tuple(importlib.import_module(f"discover_jax.kernels.{name}") for name in MODULES)
    monkeypatch.setattr(importlib.import_module("discover_jax.kernels.projections_decode"), "compute_capability", lambda: card)
    lora = jax.eval_shape(model.cast, model.abstract_lora())
    cache = jax.eval_shape(lambda: model.init_cache(rows, rows * TOKENS, page_size=PAGE))
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return record(monkeypatch, modules, model.decode, model.abstract_frozen(), lora, tokens, cache)


@pytest.mark.parametrize(
    ("name", "rows", "routing"), [("gpt-oss-20b", 1, 1), ("gpt-oss-20b", 128, 1), ("gpt-oss-120b", 1, 1), ("gpt-oss-120b", 128, 2)]
)
def test_a_step_of_gpt_oss_launches_the_fused_kernels_by_default(monkeypatch, pretended_gpu, name, rows, routing):
    """Twice each layer, once before the head; rotation with the writing, and the router's product before the choice, once each layer."""
    model = _model(name)
    found = collections.Counter(launch.name for launch in _launches(monkeypatch, model, rows))
    # The step is traced twice: once for the shape of the branch that a repeat leaves.
    assert found["rotate_and_write"] == 4
    assert found["add_and_norm"] == 9
    assert found["project"] == 12  # queries, keys and values; output; router
    assert found["matmul"] == found["times_a"] == 8
    assert (found["route"], found["choose"], found["sort"]) == ((4, 0, 0) if routing == 1 else (0, 4, 4))

    separate = dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, layer=None))
    names = {launch.name for launch in _launches(monkeypatch, separate, rows)}
    assert not names & {"add_and_norm", "rotate_and_write"}
    assert {"project", "attend", "matmul"} <= names


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt-oss-120b", {}, "layer_decode.KERNELS"),
        ("gpt-oss-20b", {"experts": "dense"}, "separate operations, because the experts' weights are dense"),
        ("gpt-oss-20b", {"dtype": "float32"}, "separate operations, because the experts' weights are packed and activations float32"),
        ("qwen2.5-coder-1.5b", {}, "separate operations, because kernels of a layer do not support models without experts"),
        ("qwen3-8b", {}, "do not support models without experts and norms of queries and keys"),
    ],
)
def test_the_log_says_which_kernels_decode_a_layer_and_why(monkeypatch, pretended_gpu, name, changes, said):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    model = _model(name, **changes)
    (line,) = (line for line in lines if line.startswith("kernels of a decoding layer"))
    assert line.startswith("kernels of a decoding layer on gpu: ")
    assert said in line
    assert (model.kernels.layer is None) == ("separate" in line)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        # Compiling a step takes a minute. The default run compiles the small kernels for one card.
        pytest.param(*case, marks=[] if case == (89, "gpt-oss-120b") else pytest.mark.slow)
        for case in itertools.product(CARDS, ("gpt-oss-20b", "gpt-oss-120b"))
    ],
)
def test_the_kernels_of_a_step_fit_the_card(monkeypatch, pretended_gpu, request, tmp_path, card, name):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [launch for rows in (1, 128) for launch in _launches(monkeypatch, _model(name), rows, card)]
    if request.node.get_closest_marker("slow") is None:
        chosen = [launch for launch in chosen if launch.name in SMALL]
    for launch in {repr(launch): launch for launch in chosen}.values():
        compiled = compile_for(card, launch)
        assert compiled.target.arch == card
        assert compiled.shared <= SHARED_KIB[card] * 1024, launch
