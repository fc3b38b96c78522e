"""Predicted seconds, against counts by hand, against the shapes of the model's own arrays, and against what was measured."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from discover_jax import costs
from discover_jax.costs import MeshShape
from discover_jax.machines import speeds_of
from discover_jax.models.config import GPT_OSS_20B, GPT_OSS_120B, LoraConfig, ModelConfig
from discover_jax.models.gpt_oss import Model
from discover_jax.models.sharding import local_bytes

_H200 = speeds_of("h200")
_LORA = LoraConfig()


def _predictions():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "predictions.py"
    spec = importlib.util.spec_from_file_location("predictions", path)
    module = sys.modules["predictions"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_PREDICTIONS = _predictions()
_ROWS = list(_PREDICTIONS.rows())


@pytest.mark.parametrize("row", _ROWS, ids=[row.what for row in _ROWS])
def test_a_prediction_is_near_what_was_measured(row):
    assert abs(row.error) < (0.05 if row.use == _PREDICTIONS.FITTED and "references" not in row.what else 0.15)


def test_most_measurements_are_held_out():
    used = [row.use for row in _ROWS if "references" not in row.what]
    assert used.count(_PREDICTIONS.FITTED) == 3  # START, ROW, UPDATE
    assert used.count(_PREDICTIONS.HELD_OUT) >= 12


def test_bytes_of_an_expert_and_of_all_else_counted_by_hand():
    tiny = ModelConfig(2, 64, 4, 2, 16, 4, 2, 32, 100, sliding_window=8)
    # Matrices [64, 64] and [64, 32] are 6,144 weights: 3,072 bytes, and 192 scales; 64 + 64 biases. Rank 2: 2 (64 + 64 + 32 + 64) numbers.
    assert costs.expert_bytes(tiny) == 3072 + 192 + 2 * 128
    assert costs.expert_bytes(tiny, rank=2) == 3072 + 192 + 2 * 128 + 2 * 448
    # A layer: q and o 64 x 64, k and v 32 x 64, router 4 x 64; biases 64 + 32 + 32 + 64 + 4; two norms; 4 sinks. Then norm and head.
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 4 * 64 + 196 + 2 * 64 + 4
    assert costs.other_bytes(tiny, LoraConfig(0, 0, 0)) == 2 * (2 * layer + 64 + 100 * 64)
    # Rank 3 on q, k, v and o, rank 5 on the head.
    adapter = 2 * 3 * (128 + 96 + 96 + 128) + 5 * (100 + 64)
    assert costs.other_bytes(tiny, LoraConfig(3, 0, 5)) == 2 * (2 * layer + 64 + 100 * 64 + adapter)
    # Keys and values of 2 heads of 16 in bfloat16: 128 bytes a place; 30 places of the full layer, 8 of the sliding one.
    assert costs.cached_bytes(tiny, 30) == 128 * (30 + 8)
    assert costs.cached_bytes(tiny, 5) == 128 * (5 + 5)


@pytest.mark.parametrize("sizes", [GPT_OSS_20B, GPT_OSS_120B])
def test_bytes_are_those_of_the_models_own_arrays(sizes):
    model = Model(sizes, _LORA, "bfloat16", "packed")
    experts = sizes.num_layers * sizes.num_experts
    embedding = 2 * sizes.vocab_size * sizes.width
    without = costs.other_bytes(sizes, LoraConfig(0, 0, 0))
    assert local_bytes(model.abstract_frozen()) == experts * costs.expert_bytes(sizes) + without + embedding
    adapter = experts * (costs.expert_bytes(sizes, 8) - costs.expert_bytes(sizes)) + costs.other_bytes(sizes, _LORA) - without
    assert local_bytes(model.abstract_lora()) == 2 * adapter  # float32


def test_one_row_reads_the_experts_that_it_chose():
    step = costs.decode_step(GPT_OSS_120B, _LORA, _H200, 1, 100)
    read = step["experts"] * costs.DECODE * _H200.copy
    assert read == pytest.approx(36 * 4 * costs.expert_bytes(GPT_OSS_120B, 8))


def test_operations_of_the_gradient_are_those_that_are_quoted():
    # 36.4 GFLOP a token of the 120b at 8,192 tokens, full rematerialisation (docs/performance.md).
    products = costs.microbatch(GPT_OSS_120B, _LORA, _H200, 8192, 8192, gradient=True)["products"]
    assert products * costs.UPDATE * _H200.product / 8192 == pytest.approx(36.4e9, rel=2e-3)


def test_attention_sees_what_a_window_and_causality_leave():
    tiny = ModelConfig(2, 64, 4, 2, 16, 4, 2, 32, 100, sliding_window=8)
    for length in (5, 8, 30):
        pairs = sum(t + 1 + min(t + 1, 8) for t in range(length))
        assert costs.scores(tiny, length) * length == pytest.approx(4 * 4 * 16 * pairs)


def _seconds(rows=128, context=4096, mesh=costs.ONE, speeds=_H200, **options):
    return sum(costs.decode_step(GPT_OSS_120B, _LORA, speeds, rows, context, mesh, **options).values())


def test_more_rows_take_longer_and_give_more_tokens():
    counts = (1, 2, 4, 8, 16, 32, 64, 100, 128, 160, 192, 200, 256, 512, 1024)
    seconds = [_seconds(rows) for rows in counts]
    assert seconds == sorted(seconds)
    speeds = [rows / spent for rows, spent in zip(counts, seconds, strict=True)]
    assert speeds == sorted(speeds)


def test_longer_contexts_slower_memory_and_slower_links_take_longer():
    assert _seconds(context=100) < _seconds(context=4096) < _seconds(context=8192)
    assert _seconds(speeds=dataclasses.replace(_H200, copy=_H200.copy / 2)) > 1.5 * _seconds()
    spread = MeshShape(1, 8)
    assert _seconds(mesh=spread, speeds=dataclasses.replace(_H200, latency=2 * _H200.latency)) > _seconds(mesh=spread)
    fast, slow = (
        sum(costs.microbatch(GPT_OSS_120B, _LORA, speeds, 32_768, 8192, spread, gradient=True).values())
        for speeds in (_H200, dataclasses.replace(_H200, link=_H200.link / 10))
    )
    assert slow > 1.5 * fast


def test_devices_share_the_experts_or_the_rows():
    meshes = costs.ONE, MeshShape(1, 8), MeshShape(8, 1)
    one, expert, data = (costs.decode_step(GPT_OSS_120B, _LORA, _H200, 128, 4096, mesh) for mesh in meshes)
    assert expert["experts"] == pytest.approx(one["experts"] / 8)
    # 16 rows hit 1 - (31/32)^16 of all experts, 128 rows 1 - (31/32)^128 of them.
    assert data["experts"] / one["experts"] == pytest.approx((1 - (31 / 32) ** 16) / (1 - (31 / 32) ** 128), rel=0.02)
    assert expert["keys and values"] == data["keys and values"] == pytest.approx(one["keys and values"] / 8)
    assert one["collectives"] == 0 < data["collectives"] < expert["collectives"]


def test_references_are_many_times_slower_and_every_expert_sees_every_row():
    one, expert, tensor = (_seconds(mesh=MeshShape(*mesh), kernels=False) for mesh in ((1, 1), (1, 8), (1, 1, 8)))
    assert one > tensor > expert > 10 * _seconds(mesh=MeshShape(1, 8))
    # 128 / 4 times the operations in the experts, which are four fifths of a token's.
    of_kernels, of_references = (
        sum(costs.microbatch(GPT_OSS_120B, _LORA, _H200, 8192, 8192, gradient=True, kernels=kernels).values()) for kernels in (True, False)
    )
    assert of_references > 25 * of_kernels


def test_a_group_that_leaves_its_node_has_the_network_of_its_devices_there():
    two_nodes = MeshShape(2, 8)
    assert costs.network(_H200, two_nodes, "expert") == (_H200.link, _H200.latency)
    # A pair, one device in each node; then 16 of which 8 are in a node, whose 8 networks are nearly a link.
    assert costs.network(_H200, two_nodes, "data") == (_H200.network, _H200.network_latency)
    assert costs.network(_H200, MeshShape(1, 16), "expert") == (min(_H200.link, 8 * _H200.network), _H200.network_latency)
    assert costs.network(_H200, MeshShape(4, 4), "data")[0] == 2 * _H200.network
    tpu = speeds_of("v5p")
    assert costs.network(tpu, MeshShape(16, 16), "data") == (tpu.link, tpu.latency)
