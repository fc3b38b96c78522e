"""The benchmark of peers builds the model of each family as transformers configures it. No memory is used: the device is torch's `meta`."""

import importlib.util
import sys
from pathlib import Path

import pytest

from discover_jax.models.families import SHAPES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch", reason="parity needs torch (make test installs it; PARITY=0 leaves it out)")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("peers", BENCHMARKS / "peers.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.slow  # importing these models of transformers takes 20 seconds, and only a benchmark needs them
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ["qwen2.5-coder-7b", "gpt-oss-20b", "qwen3-8b", "llama-3.1-8b"])
def test_the_peer_of_each_family_has_its_sizes(peers, monkeypatch, shape):
    monkeypatch.setattr(peers, "DEVICE", "meta")
    sizes, model = SHAPES[shape], peers.build(shape, 2)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.bfloat16"}
    assert model.get_input_embeddings().weight.shape == (sizes.vocab_size, sizes.width)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (sizes.num_heads * sizes.head_size, sizes.width)
    assert peers.is_routed(model) == bool(sizes.num_experts)
    assert peers.experts_of(model) == ("grouped_mm" if sizes.num_experts else None)
