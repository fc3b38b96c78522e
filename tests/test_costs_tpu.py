"""Predictions for TPUs against counts by hand, their rooflines, and what the dry run says of them."""

import dataclasses
import math
import re

import pytest

from discover_jax import costs, costs_tpu, machines, mesh_report, meshes
from discover_jax.config import default_config
from discover_jax.costs import MeshShape
from discover_jax.machines import Machine, speeds_of
from discover_jax.meshes import Lengths
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.families import SHAPES
from discover_jax.models.families.gpt_oss import GPT_OSS_120B

_V5P = speeds_of("v5p")
_TORUS = dataclasses.replace(_V5P, tpu=dataclasses.replace(_V5P.tpu, torus=(2, 2, 2)))
_TINY = ModelConfig(2, 64, 4, 2, 16, 4, 2, 32, 100, sliding_window=8)
_NO_ADAPTER = LoraConfig(0, 0, 0)
_EIGHT = MeshShape(1, 8)
_LENGTHS = Lengths(1500, 8000)
_V5P_MEMORY = int(95.73 * 2**30)


def _config():
    config = default_config()
    config.model.weights, config.model.shape = "random", "gpt-oss-120b"
    config.groups, config.group_size = 16, 8
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = 2048, 8192
    config.mesh.expert, config.train.rows = 8, 8
    return config


def _machine(name, memory):
    speeds = speeds_of(name)
    if speeds.tpu is not None:
        speeds = dataclasses.replace(speeds, tpu=dataclasses.replace(speeds.tpu, torus=(2, 2, 2)))
    return Machine(f"8 x {name}", [None] * 8, memory, "", speeds.platform, exact=False, speeds=speeds)


def test_needs_of_a_decoding_step_equal_counts_by_hand():
    # Two rows on one device at a context of 30. Each row chooses 2 of 4 experts, so 1 - 1/4 of them are read; there are 2 layers.
    found = costs_tpu.decode_needs(_TINY, _NO_ADAPTER, 2, 30)
    experts = 2 * 4 * (1 - 0.5**2) * costs.expert_bytes(_TINY)
    assert found.bytes == experts + costs.other_bytes(_TINY, _NO_ADAPTER) + 2 * 128 * (30 + 8)
    # A row multiplies with q and o (64 x 64), k and v (32 x 64), the router (4 x 64), 2 experts of 3 x 64 x 32, and the head (100 x 64). It
    # reads 30 and 8 keys and values with 4 heads of 16.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 4 * 64 + 2 * 3 * 64 * 32) + 100 * 64
    assert found.operations == 2 * (2 * weights + 4 * 4 * 16 * (30 + 8))
    assert found.sent == 0
    # On two devices, each gets the other's row in bfloat16 and returns sums in float32, in each layer.
    two = costs_tpu.decode_needs(_TINY, _NO_ADAPTER, 2, 30, MeshShape(1, 2))
    assert two.sent == 2 * 1 * 64 * (2 + 4)
    assert two.operations == found.operations / 2


def test_needs_of_the_update_equal_the_documented_operations():
    # 36.4 GFLOP a token of the 120b at 8,192 tokens, full rematerialisation (docs/performance.md), with scores computed once less.
    found = costs_tpu.microbatch_needs(GPT_OSS_120B, LoraConfig(), 8192, 8192, _EIGHT, gradient=True)
    assert found.operations / 8192 == pytest.approx(36.4e9 - costs.attention_operations(GPT_OSS_120B, 8192), rel=2e-3)
    # 7 of 8 devices send each token's 2,880 values in 36 layers: forward 2 + 4 bytes, backward 2 + 2 + 2.
    assert found.sent == pytest.approx(36 * 8192 * 7 * 2880 * 12)
    forward = costs_tpu.microbatch_needs(GPT_OSS_120B, LoraConfig(), 8192, 8192, _EIGHT, gradient=False)
    assert forward.sent == pytest.approx(found.sent * 6 / 12)


def test_roofline_divides_by_the_vendors_figures():
    seconds = costs_tpu.Needs(2765e9, 2 * 459e12, 300e9).seconds(_TORUS.tpu, _EIGHT)
    assert seconds == pytest.approx({"bytes": 1, "operations": 2, "exchange": 1})  # three links of 100 GB/s


@pytest.mark.parametrize(
    ("name", "torus", "devices", "links"),
    [
        ("v5p", (2, 2, 2), 8, 3),
        ("v5p", (2, 2, 2), 4, 2),
        ("v5p", (2, 2, 2), 2, 1),
        ("v5p", (2, 2, 1), 4, 2),
        ("v5p", (4, 4, 4), 16, 2),
        ("v6e", (4, 4), 16, 2),
        ("v6e", (8, 8), 8, 1),
        ("tpu7x", (2, 2, 1), 8, 2),
        ("tpu7x", (2, 2, 1), 2, 1),  # both cores of a chip
        ("v5p", (), 8, 1),
    ],
)
def test_groups_use_a_link_for_each_dimension_that_they_span(name, torus, devices, links):
    tpu = dataclasses.replace(speeds_of(name).tpu, torus=torus)
    assert tpu.links(devices) == links


@pytest.mark.parametrize("mesh", [costs.ONE, _EIGHT, MeshShape(2, 4), MeshShape(8, 1)])
@pytest.mark.parametrize("name", ["v5p", "v6e", "tpu7x"])
def test_predictions_never_beat_the_roofline(name, mesh):
    speeds, lora = speeds_of(name), LoraConfig()
    of = GPT_OSS_120B, lora
    pairs = [
        (costs_tpu.decode_step(*of, speeds, 128, 5500, mesh), costs_tpu.decode_needs(*of, 128, 5500, mesh)),
        (costs_tpu.prefill(*of, speeds, 1500, mesh), costs_tpu.prefill_needs(*of, 1500, mesh)),
        *(
            (
                costs_tpu.microbatch(*of, speeds, 8192, 8192, mesh, gradient=gradient),
                costs_tpu.microbatch_needs(*of, 8192, 8192, mesh, gradient=gradient),
            )
            for gradient in (False, True)
        ),
    ]
    for predicted, needs in pairs:
        assert sum(predicted.values()) > max(needs.seconds(speeds.tpu, mesh).values())


def test_unpacking_limits_the_experts_of_decoding():
    """By the schedule, a v5p unpacks in 2.4 times the time of the read; so reading faster changes nothing, and unpacking faster does."""
    seconds = costs_tpu.decode_step(GPT_OSS_120B, LoraConfig(), _V5P, 128, 5500)["experts"]
    packed = costs_tpu.EXPERT_BYTES_FACTOR * 36 * 128 * (1 - (31 / 32) ** 128) * costs.expert_bytes(GPT_OSS_120B, 8)
    assert seconds == pytest.approx(packed * _V5P.tpu.unpack)
    fast = dataclasses.replace(_V5P, tpu=dataclasses.replace(_V5P.tpu, unpack=0.0))
    read = costs_tpu.decode_step(GPT_OSS_120B, LoraConfig(), fast, 128, 5500)["experts"]
    assert read == pytest.approx(packed / (costs.DECODE_BANDWIDTH_FRACTION * _V5P.copy))


def test_dense_models_exchange_nothing():
    sizes, lora = SHAPES["qwen2.5-coder-1.5b"], LoraConfig(32, 0, 0, mlp_rank=32)
    step = costs_tpu.decode_step(sizes, lora, _V5P, 64, 2096, MeshShape(8, 1))
    assert step["experts"] == step["exchange"] == 0
    assert costs_tpu.decode_needs(sizes, lora, 64, 2096).bytes == costs.other_bytes(sizes, lora) + 64 * costs.cached_bytes(sizes, 2096)


@pytest.mark.parametrize(("name", "chips", "devices"), [("v5p-16", 8, 8), ("v5p-128", 64, 64), ("v6e-64", 64, 64), ("tpu7x-8", 4, 8)])
def test_slices_are_found_by_cloud_tpus_names(monkeypatch, name, chips, devices):
    monkeypatch.setattr(machines, "_cpus", lambda count: [None] * count)
    found = machines.find_machine(name, 1)
    assert len(found.devices) == devices
    torus = found.speeds.tpu.torus
    assert math.prod(torus) == chips


def test_dry_run_shows_the_limit_of_each_phase_and_its_assumptions():
    def report(machine):
        return "\n".join(mesh_report.report(_config(), GPT_OSS_120B, machine, _LENGTHS))

    text = report(_machine("v5p", _V5P_MEMORY))
    assert re.search(r"Recommended: --config\.mesh\.data=1 --config\.mesh\.expert=8", text)
    for phase, limit in (("decoding", "bytes"), ("update", "operations")):
        assert re.search(rf"(?m)^ +{phase} .* {limit}$", text)
    assert "Nothing of this was ever run on a TPU" in text
    for source in ("H200", "compiler's schedule", "vendor's"):
        assert source in text
    assert "Roofline" not in report(_machine("h200", int(0.9 * 143_771 * 2**20)))


def test_fractions_follow_from_the_predictions():
    one = meshes.predict(_config(), GPT_OSS_120B, _machine("v5p", _V5P_MEMORY), _EIGHT, _LENGTHS)
    count = 16 * 8
    assert one.live == count
    step = costs_tpu.decode_needs(GPT_OSS_120B, LoraConfig(), count, 5500, _EIGHT)
    assert one.rooflines["decoding"] == pytest.approx(step.times(8000).seconds(_TORUS.tpu, _EIGHT))
    # The update reads 128 x 9,500 tokens twice: once for the base model's log-probabilities, if the config measures the KL divergence.
    per_token = costs_tpu.microbatch_needs(GPT_OSS_120B, LoraConfig(), 1, 9500, _EIGHT, gradient=True).operations
    forward = costs_tpu.microbatch_needs(GPT_OSS_120B, LoraConfig(), 1, 9500, _EIGHT, gradient=False).operations
    operations = count * 9500 / 8 * (per_token + forward * _config().train.measure_kl)
    assert one.rooflines["update"]["operations"] == pytest.approx(operations / 459e12)


@pytest.mark.parametrize(("tokens", "expert", "padding"), [(4_096, 16, 1.125), (34_192, 8, 1.12)])
def test_experts_compute_half_a_block_of_padding_each(tokens, expert, padding):
    """In two chunks of 2,048 tokens on 16 devices, and in visits of 34,304 tokens around a ring of 8. Blocks have 256 rows."""
    mesh, of = MeshShape(1, expert), (GPT_OSS_120B, LoraConfig())
    seconds = costs_tpu.microbatch(*of, _V5P, tokens, 8192, mesh, gradient=True)["experts"]
    least = tokens * 6 * 36 * 4 * costs.expert_weights(GPT_OSS_120B) / _V5P.tpu.product
    reached = costs_tpu.SCHEDULE_ALLOWANCE / _V5P.tpu.schedule.experts_gradient
    assert seconds / least == pytest.approx(reached * padding, rel=2e-3)


def test_attention_computes_whole_blocks():
    """A rollout of 1,024 tokens begins anywhere in a block of 512, so it is in three: six pairs, and five near a window."""
    sizes = dataclasses.replace(GPT_OSS_120B, num_layers=2)
    found = costs_tpu.attention_in_blocks(sizes, 1_024)
    assert found == pytest.approx(4 * 64 * 64 * 512**2 * (6 + 5) / 1_024)
    assert found > costs.attention_operations(sizes, 1_024)


def test_sums_of_chunks_are_sent_twice():
    """XLA compiles a scattered sum as an all-reduce: forward 2 + 2 x 4 bytes a value, backward 2 + 2 + 2 x 2."""
    (sent, again) = (
        costs_tpu.microbatch(GPT_OSS_120B, LoraConfig(), _V5P, 8192, 8192, _EIGHT, gradient=gradient)["exchange"]
        for gradient in (False, True)
    )
    started = 6 * 36 * _V5P.latency
    assert sent - started == pytest.approx(36 * 8192 * 7 * 2880 * 10 / _V5P.link)
    assert again - started == pytest.approx(36 * 8192 * 7 * 2880 * 18 / _V5P.link)


def test_a_ring_hides_behind_the_experts():
    """34,192 tokens of each of 8 devices, half in each direction. The kernels of a visit overlap with what it sends."""
    tokens, of = 34_192, (GPT_OSS_120B, LoraConfig())
    found = costs_tpu.microbatch(*of, _TORUS, tokens, 8192, _EIGHT, gradient=False)
    link = 2 * _TORUS.link  # two of the three that a chip of this torus has
    visit = tokens * 2880 * (2 + 4) / link + _TORUS.latency
    kernels = found["experts"] / (36 * 8)
    assert 0 < visit - kernels < visit
    first = tokens * 2880 * 2 / link + _TORUS.latency
    gathered = 7 * tokens * 4 * (4 + 4) / (3 * _TORUS.link) + 3 * _TORUS.latency  # experts and weights of the choices, along three links
    assert found["exchange"] == pytest.approx(36 * (first + 8 * (visit - kernels) + gathered))
    # The kernels of the backward pass take longer than what a visit sends: activations and gradients, and sums in bfloat16.
    both = costs_tpu.microbatch(*of, _TORUS, tokens, 8192, _EIGHT, gradient=True)
    more = 7 * tokens * 4 * (8 + 8) / (3 * _TORUS.link) + 3 * _TORUS.latency
    assert both["exchange"] - found["exchange"] == pytest.approx(36 * (2 * first - _TORUS.latency + more), rel=1e-3)


def test_two_devices_use_one_link_for_both_directions():
    free = dataclasses.replace(_TORUS, tpu=dataclasses.replace(_TORUS.tpu, product=1e30))  # kernels take no time
    seconds = costs_tpu.microbatch(GPT_OSS_120B, LoraConfig(), free, 34_192, 8192, MeshShape(1, 2), gradient=False)["exchange"]
    sent = 36 * 34_192 * (2880 * (2 + 2 * 6) + 4 * 8) / _TORUS.link
    assert seconds == pytest.approx(sent + 36 * (1 + 2 + 3) * _TORUS.latency)
