"""Predicted seconds against counts by hand, the shapes of the model's arrays, and measurements."""

import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from discover_jax import costs
from discover_jax.costs import MeshShape
from discover_jax.machines import speeds_of
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import SHAPES
from discover_jax.models.families.gpt_oss import GPT_OSS_20B, GPT_OSS_120B
from discover_jax.models.sharding import local_bytes

_H200 = speeds_of("h200")
_LORA = LoraConfig()


def _predictions():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "predictions.py"
    spec = importlib.util.spec_from_file_location("predictions", path)
    module = sys.modules["predictions"] = importlib.util.module_from_spec(spec)  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


_PREDICTIONS = _predictions()
_ROWS = list(_PREDICTIONS.rows())


@pytest.mark.parametrize("row", _ROWS, ids=[row.what for row in _ROWS])
def test_predictions_are_near_measurements(row):
    assert abs(row.error) < (0.05 if row.use == _PREDICTIONS.FITTED and "references" not in row.what else 0.15)


def test_most_measurements_are_held_out():
    used = [row.use for row in _ROWS if "references" not in row.what]
    assert used.count(_PREDICTIONS.FITTED) == 3  # DECODE_LAYER_SECONDS, DECODE_ROW_SECONDS, UPDATE_PRODUCT_FRACTION
    assert used.count(_PREDICTIONS.HELD_OUT) >= 12


def test_bytes_equal_counts_by_hand():
    tiny = ModelConfig(2, 64, 4, 2, 16, 4, 2, 32, 100, sliding_window=8)
    # Matrices [64, 64] and [64, 32] have 6,144 weights: 3,072 bytes and 192 scales. 64 + 64 biases. Rank 2: 2 (64 + 64 + 32 + 64) weights.
    assert costs.expert_bytes(tiny) == 3072 + 192 + 2 * 128
    assert costs.expert_bytes(tiny, rank=2) == 3072 + 192 + 2 * 128 + 2 * 448
    # A layer: q and o 64 x 64, k and v 32 x 64, router 4 x 64; biases 64 + 32 + 32 + 64 + 4; two norms; 4 sinks. Then final norm and head.
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 4 * 64 + 196 + 2 * 64 + 4
    assert costs.other_bytes(tiny, LoraConfig(0, 0, 0)) == 2 * (2 * layer + 64 + 100 * 64)
    # Rank 3 on q, k, v and o, rank 5 on the head.
    adapter = 2 * 3 * (128 + 96 + 96 + 128) + 5 * (100 + 64)
    assert costs.other_bytes(tiny, LoraConfig(3, 0, 5)) == 2 * (2 * layer + 64 + 100 * 64 + adapter)
    # Keys and values of 2 heads of 16 in bfloat16: 128 bytes a position. The full layer reads 30, the sliding one 8.
    assert costs.cached_bytes(tiny, 30) == 128 * (30 + 8)
    assert costs.cached_bytes(tiny, 5) == 128 * (5 + 5)


@pytest.mark.parametrize("sizes", [GPT_OSS_20B, GPT_OSS_120B])
def test_bytes_equal_those_of_the_models_arrays(sizes):
    model = Model(sizes, _LORA, "bfloat16", "packed")
    experts = sizes.num_layers * sizes.num_experts
    embedding = 2 * sizes.vocab_size * sizes.width
    without = costs.other_bytes(sizes, LoraConfig(0, 0, 0))
    assert local_bytes(model.abstract_frozen()) == experts * costs.expert_bytes(sizes) + without + embedding
    adapter = experts * (costs.expert_bytes(sizes, 8) - costs.expert_bytes(sizes)) + costs.other_bytes(sizes, _LORA) - without
    assert local_bytes(model.abstract_lora()) == 2 * adapter  # float32


def test_one_row_reads_only_its_chosen_experts():
    step = costs.decode_step(GPT_OSS_120B, _LORA, _H200, 1, 100)
    read = step["experts"] * costs.DECODE_BANDWIDTH_FRACTION * _H200.copy
    assert read == pytest.approx(36 * 4 * costs.expert_bytes(GPT_OSS_120B, 8))


def test_operations_of_the_gradient_equal_the_documented_ones():
    # 36.4 GFLOP a token of the 120b at 8,192 tokens, full rematerialisation (docs/performance.md).
    products = costs.microbatch(GPT_OSS_120B, _LORA, _H200, 8192, 8192, gradient=True)["products"]
    assert products * costs.UPDATE_PRODUCT_FRACTION * _H200.product / 8192 == pytest.approx(36.4e9, rel=2e-3)


def test_attention_operations_count_causality_and_the_window():
    tiny = ModelConfig(2, 64, 4, 2, 16, 4, 2, 32, 100, sliding_window=8)
    for length in (5, 8, 30):
        pairs = sum(t + 1 + min(t + 1, 8) for t in range(length))
        assert costs.attention_operations(tiny, length) * length == pytest.approx(4 * 4 * 16 * pairs)


def _seconds(rows=128, context=4096, mesh=costs.ONE, speeds=_H200, **options):
    return sum(costs.decode_step(GPT_OSS_120B, _LORA, speeds, rows, context, mesh, **options).values())


def test_more_rows_take_longer_but_give_more_tokens_per_second():
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
    # 16 rows use 1 - (31/32)^16 of all experts; 128 rows use 1 - (31/32)^128.
    assert data["experts"] / one["experts"] == pytest.approx((1 - (31 / 32) ** 16) / (1 - (31 / 32) ** 128), rel=0.02)
    assert expert["keys and values"] == data["keys and values"] == pytest.approx(one["keys and values"] / 8)
    assert one["collectives"] == 0 < data["collectives"] < expert["collectives"]


def test_references_are_slower_because_experts_compute_every_row():
    one, expert, tensor = (_seconds(mesh=MeshShape(*mesh), kernels=False) for mesh in ((1, 1), (1, 8), (1, 1, 8)))
    assert one > tensor > expert > 10 * _seconds(mesh=MeshShape(1, 8))
    # 128 / 4 times the operations of experts, which are four fifths of all operations.
    with_kernels, with_references = (
        sum(costs.microbatch(GPT_OSS_120B, _LORA, _H200, 8192, 8192, gradient=True, kernels=kernels).values()) for kernels in (True, False)
    )
    assert with_references > 25 * with_kernels


def test_groups_across_nodes_use_the_network_of_their_devices_in_a_node():
    two_nodes = MeshShape(2, 8)
    assert costs.network(_H200, two_nodes, "expert") == (_H200.link, _H200.latency)
    # A pair with one device in each node; then 16 devices, 8 in each node, whose 8 networks nearly equal a link.
    assert costs.network(_H200, two_nodes, "data") == (_H200.network, _H200.network_latency)
    assert costs.network(_H200, MeshShape(1, 16), "expert") == (min(_H200.link, 8 * _H200.network), _H200.network_latency)
    assert costs.network(_H200, MeshShape(4, 4), "data")[0] == 2 * _H200.network
    tpu = speeds_of("v5p")
    assert costs.network(tpu, MeshShape(16, 16), "data") == (tpu.link, tpu.latency)


def _measured(id):
    with (Path(__file__).resolve().parents[1] / "benchmarks" / "measurements.csv").open(newline="") as file:
        (value,) = (float(row["value"]) for row in csv.DictReader(file) if row["id"] == id)
    return value


_LINEAR = LoraConfig(attention_rank=32, expert_rank=0, head_rank=0, mlp_rank=32)


@pytest.mark.parametrize(("model", "id"), [("qwen2.5-coder-1.5b", "qwen15"), ("qwen2.5-coder-7b", "qwen7")])
@pytest.mark.parametrize("rows", [128, 1])
def test_decoding_of_dense_models_is_near_measurements(model, id, rows):
    """On an H100; the constants come from an H200."""
    seconds = sum(costs.decode_step(SHAPES[model], _LINEAR, speeds_of("h100"), rows, 2096).values())
    assert rows / seconds == pytest.approx(_measured(f"decode_{id}_h100_b{rows}_ctx2096_tokens_per_s"), rel=0.1)


@pytest.mark.parametrize(
    ("model", "card", "id", "least", "most"),
    [("qwen2.5-coder-7b", "h200", "qwen7", 0.85, 1.0), ("qwen2.5-coder-1.5b", "h100", "qwen15", 1.0, 1.5)],
)
def test_updates_of_dense_models_are_as_far_from_measurements_as_the_remark_says(model, card, id, least, most):
    seconds = sum(costs.microbatch(SHAPES[model], _LINEAR, speeds_of(card), 16_384, 4_096, gradient=True).values())
    assert least < 16_384 / seconds / _measured(f"gradient_{id}_{card}_4x4096_tokens_per_s") < most


def test_sizes_of_dense_models_equal_their_arrays():
    tiny = dataclasses.replace(SHAPES["qwen2.5-coder-1.5b"], num_layers=3, vocab_size=1_000)
    arrays = Model(tiny, LoraConfig(2, 0, 0, mlp_rank=3), "bfloat16")
    read = local_bytes(arrays.abstract_frozen()) + local_bytes(arrays.abstract_lora()) // 2  # the adapter is stored in float32
    sinks = 2 * tiny.num_layers * (tiny.num_heads + tiny.width)  # counted for every model: sinks, and a bias of the output
    assert costs.other_bytes(tiny, LoraConfig(2, 0, 0, mlp_rank=3)) == read + sinks
