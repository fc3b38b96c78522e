"""The kernel set of a platform: its kernels, equality of sets, and the log."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from jax.sharding import AbstractMesh

from discover_jax.exceptions import ConfigError
from discover_jax.kernels import triton_call
from discover_jax.kernels.kernel_set import OPERATIONS, PLATFORMS, REFERENCE, Platform, find_kernel, kernel_set, reference_set, with_layer
from discover_jax.kernels.layer_parts import HeadSizes
from discover_jax.kernels.spread import SPREAD
from discover_jax.models.config import ModelConfig
from discover_jax.models.decoder import Model

SIZES = ModelConfig(2, 32, 2, 1, 16, 4, 2, 32, 61, sliding_window=16)


def _clear():
    find_kernel.cache_clear()
    kernel_set.cache_clear()


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    _clear()
    yield lines
    _clear()


def _mesh(data, expert, tensor):
    return AbstractMesh((data, expert, tensor), ("data", "expert", "tensor"))


def test_a_platform_without_kernels_uses_the_references(logged):
    assert kernel_set("cpu") == REFERENCE
    assert kernel_set("another platform", _mesh(1, 1, 1)) == REFERENCE
    assert not logged


def test_a_platform_replaces_the_references_that_it_has_kernels_for(logged, monkeypatch):
    monkeypatch.setitem(PLATFORMS, "tpu", Platform("jax", {"experts": ("discover_jax.kernels.experts", "gated")}))
    found = kernel_set("tpu")
    assert found.experts is not REFERENCE.experts
    assert found.kernels == {"experts"}
    assert all(getattr(found, name) is getattr(REFERENCE, name) for name in OPERATIONS if name != "experts")


@pytest.mark.parametrize("mesh", [None, (1, 4, 1), (2, 1, 2)])
def test_sets_of_one_platform_and_mesh_are_equal(logged, mesh):
    sets = []
    for _ in range(2):
        _clear()
        sets.append(kernel_set("cpu", mesh and _mesh(*mesh)))
    assert sets[0] is not sets[1]
    assert sets[0] == sets[1]
    assert hash(sets[0]) == hash(sets[1])
    assert sets[0] != reference_set(_mesh(4, 1, 1))


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2)])
def test_the_log_names_the_kernel_of_each_operation_or_why_it_is_the_reference(logged, monkeypatch, platform, shape):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    found = kernel_set(platform, _mesh(*shape))
    assert len(lines) == len(OPERATIONS)
    for operation, line in zip(OPERATIONS, lines, strict=True):
        start, said = line.split(": ", 1)
        assert start == f"kernel of {operation} on {platform}"
        if operation in found.kernels:
            assert (
                said == f"{getattr(found, operation).function.__module__.rpartition('.')[2]}.{getattr(found, operation).function.__name__}"
            )
        else:
            expected = (
                "config.mesh.tensor = 2"
                if platform == "tpu" and shape[2] == 2 and ("experts" in operation or operation in ("decode_projections", "decode_head"))
                else "no kernel of it"
            )
            assert said.startswith("reference, because")
            assert expected in said
    assert bool(found.kernels) == (platform == "tpu")


def test_operations_that_a_mesh_splits_use_the_reference_and_are_logged(logged, monkeypatch):
    functions = dict.fromkeys(("experts", "windowed_attention"), ("discover_jax.kernels.experts", "gated"))
    monkeypatch.setitem(PLATFORMS, "tpu", Platform("jax", functions))
    found = kernel_set("tpu", _mesh(1, 1, 2))
    assert found.experts is REFERENCE.experts
    assert found.kernels == {"windowed_attention"}
    (line,) = logged
    assert "experts" in line
    assert "config.mesh.tensor" in line


def test_missing_package_is_logged_once_and_the_references_run(logged, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert kernel_set("gpu") == kernel_set("gpu") == REFERENCE
    (line,) = logged
    assert "jax_triton" in line
    assert "-e '.[cuda]'" in line
    assert all(operation in line for operation in PLATFORMS["gpu"].functions)


@pytest.mark.parametrize(("capability", "said"), [(75, "7.5"), (0, "not an NVIDIA GPU")])
def test_unsupported_gpus_use_the_references_and_are_logged(logged, monkeypatch, capability, said):
    monkeypatch.setattr(triton_call, "compute_capability", lambda: capability)
    monkeypatch.setitem(PLATFORMS, "gpu", Platform("jax", {"experts": ("discover_jax.kernels.experts", "gated")}, triton_call.refusal))
    assert kernel_set("gpu") == REFERENCE
    (line,) = logged
    assert "experts" in line
    assert said in line


def test_every_operation_can_be_split():
    assert set(SPREAD) == set(OPERATIONS)


def test_model_uses_the_kernels_of_its_mesh():
    mesh = _mesh(2, 1, 1)
    assert Model(SIZES) == Model(SIZES, kernels=kernel_set("cpu"))
    assert Model(SIZES, mesh=mesh).kernels == reference_set(mesh)
    assert hash(Model(SIZES, mesh=mesh)) == hash(Model(SIZES, mesh=mesh, kernels=kernel_set("cpu", mesh)))
    with pytest.raises(ConfigError, match="mesh"):
        Model(SIZES, kernels=reference_set(mesh))


def test_models_with_equal_sets_share_compilations():
    traced = []

    def count(model, x):
        traced.append(model)
        return x

    jitted = jax.jit(count, static_argnums=0)
    for _ in range(2):
        _clear()
        jitted(Model(SIZES, kernels=kernel_set("cpu")), 1.0)
    assert len(traced) == 1


@pytest.mark.parametrize("shape", [None, (2, 2, 1)])
def test_tpus_have_kernels_of_a_whole_decoding_layer(monkeypatch, shape):
    """Over a mesh, equal ones compare equal. The log names them."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    kernels = kernel_set("tpu", None if shape is None else _mesh(*shape))
    supported = HeadSizes(64, 8, 64), 4, "lanes", jnp.dtype("bfloat16")
    found = with_layer(kernels, "tpu", *supported)
    assert lines[-1] == "kernels of a decoding layer on tpu: layer_tpu.KERNELS"
    assert found == with_layer(kernels, "tpu", *supported)
    assert hash(found) == hash(with_layer(kernels, "tpu", *supported))
    assert found.layer is not None
    assert found.layer.mesh == kernels.mesh
    assert found.layer.most_rows == (512 if shape is None else 256)  # 2,048 choices of the devices that exchange them


GPT_OSS = HeadSizes(64, 8, 64), 4, "tiled", jnp.dtype("bfloat16")


def _said(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_gpus_have_kernels_of_a_whole_decoding_layer(monkeypatch, pretended_gpu):
    from discover_jax.kernels import layer_decode

    kernels, lines = kernel_set("gpu"), _said(monkeypatch)
    found = with_layer(kernels, "gpu", *GPT_OSS)
    assert lines == ["kernels of a decoding layer on gpu: layer_decode.KERNELS"]
    assert found == with_layer(kernels, "gpu", *GPT_OSS)
    assert hash(found) == hash(with_layer(kernels, "gpu", *GPT_OSS))
    assert found.layer == dataclasses.replace(layer_decode.fused(("norm", "rotation", "router")), most_rows=256)
    assert dataclasses.replace(found, layer=None) == kernels


@pytest.mark.parametrize(
    ("mesh", "without", "change", "said"),
    [
        ((1, 2, 1), "", {}, "run on one device; the mesh has 2"),
        (None, "paged_attention", {}, "these use the reference: paged_attention"),
        (None, "", {0: HeadSizes(8, 8, 96)}, "the head size is 96; the kernels support 64 and 128"),
        (None, "", {2: "packed"}, "weights are packed"),
        (None, "", {3: jnp.dtype("float32")}, "activations float32"),
    ],
)
def test_other_meshes_and_models_use_separate_operations_on_a_gpu(monkeypatch, pretended_gpu, mesh, without, change, said):
    kernels = kernel_set("gpu", mesh and _mesh(*mesh))
    kernels = dataclasses.replace(kernels, kernels=kernels.kernels - {without})
    lines = _said(monkeypatch)
    assert with_layer(kernels, "gpu", *(change.get(i, one) for i, one in enumerate(GPT_OSS))) is kernels
    (line,) = lines
    assert line.startswith("kernels of a decoding layer on gpu: separate operations, because ")
    assert said in line


@pytest.mark.parametrize(
    ("platform", "heads", "refusal", "said"),
    [
        ("tpu", HeadSizes(64, 8, 128), "", "the head size is 128"),
        ("tpu", HeadSizes(64, 8, 64), "of its kind", "of its kind"),
        ("cpu", HeadSizes(64, 8, 64), "", "this platform has no kernels of a layer"),
        ("another", HeadSizes(64, 8, 64), "", "this platform has no kernels of a layer"),
    ],
)
def test_other_models_and_platforms_use_separate_operations(monkeypatch, platform, heads, refusal, said):
    kernels = kernel_set(platform)
    lines = _said(monkeypatch)
    assert with_layer(kernels, platform, heads, 4, "lanes", jnp.dtype("bfloat16"), refusal=refusal) is kernels
    (line,) = lines
    assert line.startswith(f"kernels of a decoding layer on {platform}: separate operations, because ")
    assert said in line
