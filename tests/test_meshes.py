"""Recommended meshes, excluded meshes with the reason, measured memory, and names of machines."""

import dataclasses
import math
import re

import jax
import optax
import pytest
from jax.sharding import AbstractMesh

from discover_jax import formulas, machines, mesh_report, meshes
from discover_jax.config import default_config
from discover_jax.costs import MeshShape, expert_weights, layer_weights, microbatch
from discover_jax.engine import beside_the_cache, build_optimizer, tpu_copies
from discover_jax.exceptions import ConfigError
from discover_jax.kernels.kernel_set import PLATFORMS, Platform
from discover_jax.learning.train_state import abstract_train_state
from discover_jax.machines import Machine, find_machine, memory_of, speeds_of
from discover_jax.meshes import Lengths
from discover_jax.models.config import LoraConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import SHAPES
from discover_jax.models.families.gpt_oss import GPT_OSS_20B, GPT_OSS_120B
from discover_jax.models.sharding import MESH_AXES

_H200_MEMORY = int(0.9 * 143_771 * 2**20)


def _machine(devices, name="h200", memory=_H200_MEMORY):
    speeds = speeds_of(name)
    return Machine(f"{devices} x {name}", [None] * devices, memory, "", speeds.platform, exact=False, speeds=speeds)


def _config(**settings):
    config = default_config()
    config.model.weights, config.model.shape = "random", "gpt-oss-120b"
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = 2048, 8192
    for name, value in settings.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


_LENGTHS = Lengths(1500, 4000)


def test_all_meshes_of_some_devices():
    found = meshes.shapes(12)
    assert len(found) == len(set(found)) == 18  # 12 = 2^2 x 3 in three ordered factors: 6 x 3
    assert all(math.prod(mesh) == 12 for mesh in found)


def test_fastest_mesh_that_fits_is_recommended_first():
    found = meshes.recommend(_config(), GPT_OSS_120B, _machine(8), _LENGTHS)
    assert len(found) == len(meshes.shapes(8))
    usable = [one for one in found if not one.obstacle]
    assert usable == found[: len(usable)]
    assert [one.seconds for one in usable] == sorted(one.seconds for one in usable)
    assert usable[0].kernels
    assert usable[0].rows % 8 == 0
    assert all(one.kernels == (one.mesh.tensor == 1) for one in usable)
    one_device = meshes.predict(_config(), GPT_OSS_120B, _machine(1), MeshShape(1, 1), _LENGTHS)
    assert one_device.seconds / 8 < usable[0].seconds < one_device.seconds / 3


def test_the_optimiser_is_traced_once_for_all_meshes():
    """A trace takes longer than the rest of a prediction."""
    optimizer, traced = build_optimizer(_config()), []
    assert build_optimizer(_config()) is optimizer
    assert build_optimizer(_config(train__learning_rate=0.5)) is not optimizer

    def init(lora):
        traced.extend(leaf for leaf in jax.tree.leaves(lora)[:1] if isinstance(leaf, jax.core.Tracer))
        return optimizer.init(lora)

    counting = optax.GradientTransformation(init, optimizer.update)
    for data, expert in ((1, 4), (2, 2), (4, 1)):
        mesh = AbstractMesh((data, expert, 1), MESH_AXES)
        state = abstract_train_state(Model(GPT_OSS_20B, LoraConfig(8, 8, 8), mesh=mesh).abstract_lora(), counting)
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {mesh}
    assert len(traced) == 1


def test_indivisible_and_too_large_meshes_are_excluded_with_the_reason():
    def obstacle(sizes, machine, *mesh):
        return meshes.predict(_config(), sizes, machine, MeshShape(*mesh), _LENGTHS).obstacle

    assert "Axis 'experts' of size 32 cannot be split over mesh axis 'expert' of size 3" in obstacle(GPT_OSS_20B, _machine(3), 1, 3, 1)
    assert "size 16" in obstacle(GPT_OSS_20B, _machine(16), 1, 1, 16)  # 8 key/value heads
    assert not obstacle(GPT_OSS_20B, _machine(16), 1, 16, 1)
    h100 = _machine(8, "h100", int(0.9 * 81_559 * 2**20))
    assert "the update needs about" in obstacle(GPT_OSS_120B, h100, 8, 1, 1)
    assert "no room" in obstacle(GPT_OSS_120B, _machine(8, "v6e", int(31.24 * 2**30)), 8, 1, 1)  # 65 GB of weights
    assert not obstacle(GPT_OSS_120B, h100, 1, 8, 1)


@pytest.mark.parametrize(("mesh", "measured"), [((1, 1), 116.2), ((1, 2), 85.2), ((2, 1), 116.2)])
def test_memory_is_close_to_the_measured_peaks(mesh, measured):
    # One row of 32,768 tokens per device (docs/scaling.md).
    config = _config(train__row_tokens=32_768)
    one = meshes.predict(config, GPT_OSS_120B, _machine(math.prod(mesh)), MeshShape(*mesh), _LENGTHS)
    assert one.bytes / 1e9 == pytest.approx(measured, rel=0.02)


def test_memory_of_references_is_close_to_the_tpu_compilers(monkeypatch):
    # v5p:2x2x2, libtpu 0.0.42, jax 0.10.2, before TPUs had kernels of experts: the gradient with a row of 4,096 tokens on each of eight
    # devices of `expert` takes 86.0 GB.
    monkeypatch.setitem(PLATFORMS, "tpu", Platform("jax", {}))
    config = _config(train__row_tokens=4096, train__rows=8)
    machine = _machine(8, "v5p", int(95.73 * 2**30))
    one = meshes.predict(config, GPT_OSS_120B, machine, MeshShape(1, 8), _LENGTHS)
    assert one.bytes / 1e9 == pytest.approx(86.0, rel=0.03)
    assert not one.kernels


_UPDATE_ON_TPUS = [
    ("v5p:2x2x1", "gpt-oss-20b", 4, 35.45),
    ("v5p:2x2x1", "gpt-oss-120b", 4, 62.87),
    ("v5p:2x2x1", "qwen2.5-coder-1.5b", 4, 22.82),
    ("v5p:2x2x2", "gpt-oss-20b", 8, 32.89),
    ("v5p:2x2x2", "gpt-oss-120b", 8, 51.90),
    ("v5p:2x2x2", "qwen2.5-coder-1.5b", 8, 22.82),  # to which the formula for dense models was fitted
    ("v6e:4x4", "gpt-oss-20b", 16, 21.28),
    ("v6e:4x4", "gpt-oss-120b", 16, 32.90),  # to which the formula for gpt-oss was fitted
    ("v6e:4x4", "qwen2.5-coder-1.5b", 16, 22.83),
    ("tpu7x:2x2x1", "gpt-oss-20b", 8, 33.40),
    ("tpu7x:2x2x1", "gpt-oss-120b", 8, 52.98),
]
"""Slice, model, devices, and the TPU compiler's GB for the gradient of run 3's longest row on each device: libtpu 0.0.42.1, jax 0.10.2
(benchmarks/tpu_memory.py)."""


@pytest.mark.parametrize(("slice", "shape", "devices", "compiled"), _UPDATE_ON_TPUS)
def test_memory_of_the_update_on_tpus_is_close_to_the_compilers_or_above(slice, shape, devices, compiled):
    sizes = SHAPES[shape]
    mesh = MeshShape(1, devices) if sizes.num_experts else MeshShape(devices, 1)
    remat = "pairs" if slice == "v6e:4x4" and sizes.num_experts else "layers"
    config = _config(train__row_tokens=34_192, train__rows=devices, model__remat=remat, lora__attention_rank=32)
    machine = _machine(devices, slice.split(":")[0], memory_of(slice))
    one = meshes.predict(config, sizes, machine, mesh, _LENGTHS)
    assert 0.99 * compiled < one.bytes / 1e9 < (1.21 if sizes.num_experts else 1.01) * compiled
    assert one.kernels


_DECODING_ON_TPUS = [
    ("v5p:2x2x1", "gpt-oss-20b", 4, 36.23),
    ("v5p:2x2x1", "gpt-oss-120b", 4, 65.81),
    ("v5p:2x2x1", "qwen2.5-coder-1.5b", 4, 35.58),
    ("v5p:2x2x2", "gpt-oss-20b", 8, 21.15),
    ("v5p:2x2x2", "gpt-oss-120b", 8, 35.31),
    ("v5p:2x2x2", "qwen2.5-coder-1.5b", 8, 19.82),
    ("v6e:4x4", "gpt-oss-20b", 16, 13.61),
    ("v6e:4x4", "gpt-oss-120b", 16, 20.75),
    ("v6e:4x4", "qwen2.5-coder-1.5b", 16, 11.94),
    ("tpu7x:2x2x1", "gpt-oss-20b", 8, 22.87),
    ("tpu7x:2x2x1", "gpt-oss-120b", 8, 38.83),
    ("tpu7x:2x2x1", "qwen2.5-coder-1.5b", 8, 22.89),  # a dry run does not show it: see below
]
"""Slice, model, devices, and the TPU compiler's GB for decoding (benchmarks/tpu_memory.py): libtpu 0.0.42.1, jax 0.10.2."""


@pytest.mark.parametrize(("slice", "shape", "devices", "compiled"), _DECODING_ON_TPUS)
def test_memory_of_decoding_on_tpus_is_close_to_the_compilers(slice, shape, devices, compiled):
    """Run 3's 128 slots and lengths."""
    sizes = SHAPES[shape]
    axis = "mesh__expert" if sizes.num_experts else "mesh__data"
    config = _config(train__rows=devices, lora__attention_rank=32, **{axis: devices})
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens, config.groups, config.group_size = 8_192, 26_000, 16, 8
    machine = Machine(slice, (), memory_of(slice), "", "tpu", exact=False)
    parts = formulas.parts(config, sizes, machine, learn=True)["sampling", "decode"]
    assert 0.98 * compiled < sum(parts.values()) / 1e9 < 1.065 * compiled


def test_the_cache_of_a_tpu_leaves_room_for_copies_in_other_layouts():
    """The copies: the embedding and the weights of queries, keys and values, 2 bytes a weight, and the scales of experts, a byte for 32
    weights."""
    config = _config(mesh__expert=8)
    abstract = AbstractMesh((1, 8, 1), ("data", "expert", "tensor"))
    packed, lanes = (Model(GPT_OSS_120B, LoraConfig(), "bfloat16", form, abstract) for form in ("packed", "lanes"))
    c = GPT_OSS_120B
    scales = c.num_layers * c.num_experts // 8 * 3 * c.width * c.mlp_width // 32
    inputs = c.num_layers * (c.num_heads + 2 * c.num_kv_heads) * c.head_size * c.width
    assert tpu_copies(packed) == 2 * (c.vocab_size * c.width + inputs) + scales
    assert tpu_copies(packed) < tpu_copies(lanes) < 1.1 * tpu_copies(packed)  # lanes are padded
    assert beside_the_cache(config, packed, 10**11, learn=True)["copies in other layouts"] == 0
    assert beside_the_cache(config, lanes, 10**11, learn=True)["copies in other layouts"] == tpu_copies(lanes)
    large = beside_the_cache(config, lanes, 10**11, learn=True, large_tiles=True)
    assert large["copies in other layouts"] == tpu_copies(lanes, large_tiles=True) > tpu_copies(lanes)


@pytest.mark.parametrize(
    ("slice", "shape"),
    [("v6e:4x4", "gpt-oss-120b"), ("v5p:2x2x2", "gpt-oss-20b"), ("tpu7x:2x2x1", "gpt-oss-120b"), ("tpu7x:2x2x1", "qwen2.5-coder-7b")],
)
def test_a_cache_that_takes_all_memory_of_a_tpu_fits(slice, shape):
    """With more slots than a device has room for, the cache takes what weights, adapter and copies in other layouts leave."""
    sizes, devices = SHAPES[shape], 16 if slice == "v6e:4x4" else 8
    axis = "mesh__expert" if sizes.num_experts else "mesh__data"
    config = _config(train__rows=devices, sampling__slots=4_096, sampling__max_new_tokens=26_000, **{axis: devices})
    config.groups, config.group_size = 128, 32
    config.lora.mlp_rank = 0 if sizes.num_experts else 8
    machine = Machine(slice, (), memory_of(slice), "", "tpu", exact=False)
    parts = formulas.parts(config, sizes, machine, learn=True)["sampling", "decode"]
    assert 0.95 * machine.memory < sum(parts.values()) <= 0.98 * machine.memory


def test_tpus_with_large_tiles_copy_all_matrices_of_plain_products():
    abstract = AbstractMesh((8, 1, 1), ("data", "expert", "tensor"))
    for sizes, packed in ((GPT_OSS_120B, True), (SHAPES["qwen2.5-coder-1.5b"], False)):
        model = Model(sizes, LoraConfig(), "bfloat16", "packed", abstract)
        matrices = sizes.num_layers * layer_weights(sizes) + (1 + packed) * sizes.vocab_size * sizes.width
        scales = sizes.num_layers * sizes.num_experts * expert_weights(sizes) // 32 if packed else 0
        assert tpu_copies(model, large_tiles=True) == 2 * matrices + scales
    assert tpu_copies(model) == 0


def test_memory_of_the_update_of_a_dense_model_on_tpus_is_close_to_the_compilers():
    """The 1.5B on v5p:2x2x2, to which the formula was fitted: 22.82 GB (benchmarks/tpu_memory.py)."""
    config = _config(train__row_tokens=34_192, train__rows=8, mesh__data=8, lora__attention_rank=32)
    sizes = SHAPES["qwen2.5-coder-1.5b"]
    one = meshes.predict(config, sizes, _machine(8, "v5p", 10**11), MeshShape(8, 1), _LENGTHS)
    assert not one.obstacle
    assert one.bytes / 1e9 == pytest.approx(22.82, rel=0.01)
    machine = Machine("v5p:2x2x2", (), 10**11, "", "tpu", exact=False)
    totals = formulas.remat_totals(config, sizes, machine, ("none", "layers", "pairs"))
    assert totals["layers"] == one.bytes
    assert totals["none"] > totals["layers"] > totals["pairs"] > 10e9


@pytest.mark.parametrize(
    ("name", "mesh", "why"), [("tpu7x", MeshShape(8, 1), "TPU7x"), ("v5p", MeshShape(4, 1, 2), "only"), ("v6e", MeshShape(1, 8), "only")]
)
def test_dense_models_are_predicted_only_where_they_were_compiled(name, mesh, why):
    """The compiler's 28.9 GB for the update of the 1.5B on tpu7x:2x2x1 are a quarter more than on v5p:2x2x2."""
    dense = SHAPES["qwen2.5-coder-1.5b"]
    config = _config(mesh__data=mesh.data, mesh__expert=mesh.expert, mesh__tensor=mesh.tensor)
    machine = _machine(8, name, 10**11)
    one = meshes.predict(config, dense, machine, mesh, _LENGTHS)
    assert why in one.obstacle
    assert why in formulas.why_not(config, dense, machine)


def test_memory_of_an_adapter_on_attention_and_of_less_rematerialisation():
    # 20b, a row of 8,192 tokens, without an optimiser: 21.9 GB measured; its two moments add twice the adapter.
    config = _config(train__row_tokens=10_240, lora__expert_rank=0, lora__head_rank=0)
    config.sampling.max_prompt_tokens = 0
    config.train.row_tokens = 8192
    one = meshes.predict(config, GPT_OSS_20B, _machine(1), MeshShape(1, 1), _LENGTHS)
    assert one.bytes / 1e9 == pytest.approx(21.9, rel=0.03)
    pairs = meshes.predict(_config(model__remat="pairs", train__row_tokens=32_768), GPT_OSS_120B, _machine(1), MeshShape(1, 1), _LENGTHS)
    assert pairs.bytes / 1e9 == pytest.approx(100.7, rel=0.03)


def test_cache_limits_concurrent_rollouts():
    config = _config(sampling__slots=512)
    config.groups, config.group_size = 8, 64
    config.sampling.max_new_tokens = 26_000
    lengths = Lengths(1500, 26_000)
    one = meshes.predict(config, GPT_OSS_120B, _machine(1), MeshShape(1, 1), lengths)
    eight = meshes.predict(config, GPT_OSS_120B, _machine(8), MeshShape(1, 8), lengths)
    assert one.live < 512 <= eight.live


@pytest.mark.parametrize(("tokens", "obstacle"), [(128 * 1_000, ""), (128 * 20, "no room for one rollout"), (10**8, "cache_tokens needs")])
def test_a_cache_of_a_given_size_is_checked(tokens, obstacle):
    """Of 10^8 tokens, one device has 512 rollouts of up to 10,240 tokens: more than its memory."""
    config = _config(sampling__cache_tokens=tokens, sampling__slots=512)
    config.groups, config.group_size = 8, 64
    one = meshes.predict(config, GPT_OSS_120B, _machine(1), MeshShape(1, 1), _LENGTHS)
    assert obstacle in one.obstacle
    assert bool(one.obstacle) == bool(obstacle)


def test_search_has_neither_optimiser_nor_gradient():
    config = _config()
    search, run = (meshes.predict(config, GPT_OSS_120B, _machine(1), MeshShape(1, 1), _LENGTHS, learn=learn) for learn in (False, True))
    assert search.bytes < run.bytes - 9e9
    assert search.update["optimiser"] == 0
    assert sum(search.update.values()) < 0.5 * sum(run.update.values())


@pytest.mark.parametrize(
    ("settings", "base", "gradient"),
    [
        ({}, 0.5, 0.5),  # the shortest rows have half of the length
        ({"waves": 6}, 0.5, 3.0),  # the base model reads all rollouts at once
        ({"waves": 6, "num_substeps": 3}, 0.5, 3.0),
        ({"num_substeps": 4}, 2.0, 2.0),
        ({"num_substeps": 4, "row_lengths": 1}, 4.0, 4.0),
        ({"row_lengths": 1}, 1.0, 1.0),
        ({"waves": 2, "measure_kl": False}, 0.0, 1.0),
    ],
    ids=str,
)
def test_waves_and_optimiser_steps_have_rows_of_their_own(settings, base, gradient):
    """A step of few short rollouts, which a tenth of a microbatch would hold. Times of a pass are those of `costs.microbatch`."""
    config = _config()
    config.groups, config.group_size = 6, 2
    config.train.update(settings)
    lengths = Lengths(30, 30)
    one = meshes.predict(config, GPT_OSS_120B, _machine(1), MeshShape(1, 1), lengths)
    tokens = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens

    def products(gradient):
        return microbatch(GPT_OSS_120B, LoraConfig(**config.lora), speeds_of("h200"), tokens, lengths.both, gradient=gradient)["products"]

    assert one.update["products"] == pytest.approx(base * products(gradient=False) + gradient * products(gradient=True))


def _report(config, machine, sizes=GPT_OSS_120B):
    return "\n".join(mesh_report.report(config, sizes, machine, _LENGTHS))


def test_report_lists_recommendations_and_assumptions():
    config = _config(mesh__expert=8)
    text = _report(config, _machine(8))
    best = meshes.recommend(config, GPT_OSS_120B, _machine(8), _LENGTHS)[0]
    recommended = f"--config.mesh.data={best.mesh.data} --config.mesh.expert={best.mesh.expert} --config.mesh.tensor=1"
    assert f"{recommended} --config.train.rows={best.rows}" in text
    assert sum(line.startswith(("  * ", "->* ")) for line in text.splitlines()) == 1
    assert re.search(r"\blink, network, network latency\b", text)  # assumed speeds
    assert "tensor above 1" not in text
    assert "tensor above 1" in _report(_config(mesh__tensor=8), _machine(8))
    narrow = dataclasses.replace(GPT_OSS_20B, mlp_width=2880 + 32)  # no kernel has tiles of this size
    assert re.search(r"references: for experts of these sizes\b", _report(_config(), _machine(1), narrow))


@pytest.mark.parametrize(("rows", "told"), [(0, "8. This config has 1,"), (4, "8. This config has 4,"), (8, ""), (16, "")])
def test_report_says_for_which_rows_the_configs_mesh_is_predicted(rows, told):
    """By default, a microbatch has `mesh.data` rows. Predictions are for a multiple of data x expert."""
    text = _report(_config(mesh__expert=8, train__rows=rows), _machine(8))
    assert ("The line with * is for config.train.rows = " in text) == bool(told)
    assert told in text


def test_report_says_that_no_tpu_has_run_the_kernels():
    text = _report(_config(), _machine(8, "v5p", int(95.73 * 2**30)))
    assert "Nothing of this was ever run on a TPU" in text
    assert re.search(r"(?i)\bno mesh\b", _report(_config(), _machine(4, "v5e", int(15.75 * 2**30))))


def test_unknown_machines_get_no_prediction():
    here = dataclasses.replace(_machine(1), name="1 x cpu", speeds=None)
    assert "1 x cpu" in _report(_config(), here)
    for report in (_report(_config(), here), _report(_config(model__dtype="float32"), _machine(1))):
        assert "--config.mesh" not in report
        assert len(report.splitlines()) == 1


def test_lengths():
    config = _config()
    assert meshes.lengths_of("", config) == Lengths(2048, 8192)
    assert meshes.lengths_of("1500, 8000", config) == Lengths(1500, 8000)
    for wrong in ("8000", "1500,9000", "0,10", "a,b", "1,2,3"):
        with pytest.raises(ConfigError, match=re.escape(repr(wrong))):
            meshes.lengths_of(wrong, config)


@pytest.mark.parametrize(
    ("name", "needed", "devices", "node"),
    [
        ("h200", 4, 4, 4),
        ("h200", 16, 16, 8),
        ("h200x8", 1, 8, 8),
        ("2xh200x8", 16, 16, 8),
        ("v5p-16", 8, 8, 0),
        ("v6e-16", 16, 16, 0),
        ("v5p:2x2x2", 1, 8, 0),
    ],
)
def test_names_of_machines(monkeypatch, name, needed, devices, node):
    monkeypatch.setattr(machines, "_cpus", lambda count: [None] * count)
    found = find_machine(name, needed)
    assert len(found.devices) == devices
    assert found.speeds.node == node


@pytest.mark.parametrize(("name", "needed"), [("h200x4", 8), ("v5p-16", 16), ("v5p-12", 1), ("3xh200", 1), ("0xh200x8", 1)])
def test_too_small_and_unknown_machines_are_refused(monkeypatch, name, needed):
    monkeypatch.setattr(machines, "_cpus", lambda count: [None] * count)
    with pytest.raises(ConfigError, match=rf"config\.mesh\b.*\b{needed} devices\b|{name}\b"):
        find_machine(name, needed)


def test_speeds_are_found_by_jaxs_device_names():
    assert speeds_of("NVIDIA H200") == speeds_of("h200")
    assert speeds_of("TPU v6 lite") == speeds_of("v6e")
    assert speeds_of("cpu") is None
    assert speeds_of("h100").copy == 3.01e12
    assert "copy" not in speeds_of("h100").assumed


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "in use by another process.*ALLOW_MULTIPLE_LIBTPU_LOAD"),
        (
            "ABORTED: The TPU is already in use by process with pid 7. Not attempting to load libtpu.so (lockfile)",
            "in use by another process",
        ),
        ("INVALID_ARGUMENT: Unsupported topology", "not a slice that the TPU compiler supports"),
    ],
)
def test_a_compiler_in_use_is_not_taken_for_a_wrong_slice(monkeypatch, said, expected):
    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(machines.topologies, "get_topology_desc", fail)
    with pytest.raises(ConfigError, match=expected):
        find_machine("v5p:2x2x1", 1)
