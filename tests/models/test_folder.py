"""Checkpoint folders: layouts, shards, partial reads, and errors about damaged files."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from discover_jax.exceptions import ConfigError, WeightsError
from discover_jax.models import folder as folders
from discover_jax.models import shards, synthetic
from discover_jax.models.config import ModelConfig
from discover_jax.models.families import config_content, read_model_config
from discover_jax.models.families.gpt_oss import GPT_OSS_20B, GPT_OSS_120B, HUGGINGFACE, ORIGINAL
from discover_jax.models.folder import load_folder, read_config
from discover_jax.models.folder_writer import save_folder
from discover_jax.models.synthetic import write_synthetic

LAYOUTS = {layout.name: layout for layout in (HUGGINGFACE, ORIGINAL)}

# All sizes differ, so that a mistaken axis fails. eos_id and pad_id are the published ones: the original layout does not store them.
CONFIG = ModelConfig(
    num_layers=4,
    width=96,
    num_heads=6,
    num_kv_heads=2,
    head_size=8,
    num_experts=5,
    experts_per_token=2,
    mlp_width=64,
    vocab_size=37,
    sliding_window=16,
    rope_theta=10_000.0,
)


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    write_synthetic(path, CONFIG, seed=3, layout=request.param)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), first, second)


def test_both_layouts_of_a_seed_are_the_same_model(folder, tmp_path):
    write_synthetic(tmp_path, CONFIG, seed=3)
    for experts in ("packed", "dense"):
        config, tree = load_folder(folder, dtype="bfloat16", experts=experts)
        assert config == CONFIG
        _assert_equal(tree, load_folder(tmp_path, dtype="bfloat16", experts=experts)[1])
    write_synthetic(tmp_path, CONFIG, seed=4)
    other = load_folder(tmp_path, dtype="bfloat16")[1]
    assert not np.array_equal(other["embedding"].astype(jnp.float32), tree["embedding"].astype(jnp.float32))


def test_values_equal_those_in_the_file(folder):
    """Two tensors located by hand: layer 3 is the second full layer, and its keys are rows of the fused projection or a tensor."""
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}
    _, tree = load_folder(folder, dtype="float32", experts="packed")
    k3 = tree["pairs"]["full"]["attention"]["k"]["weight"][1]
    assert k3.shape == (16, 96)
    original = "embedding.weight" in tensors
    expected = tensors["block.3.attn.qkv.weight"][48:64] if original else tensors["model.layers.3.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(k3, expected.astype(np.float32))
    name = "block.2.mlp.mlp2_weight.scales" if original else "model.layers.2.mlp.experts.down_proj_scales"
    np.testing.assert_array_equal(tree["pairs"]["sliding"]["experts"]["down"]["scales"][1], tensors[name])


def test_sharded_files_load_the_same_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    layout = ORIGINAL if (json.loads((folder / "config.json").read_text())).get("model_type") is None else HUGGINGFACE
    write_synthetic(tmp_path, CONFIG, seed=3, layout=layout.name)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == layout.file.format(number=1, count=len(files))
    _assert_equal(load_folder(tmp_path)[1], load_folder(folder)[1])


@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_reading_in_parts_gives_equal_values(folder, monkeypatch, size):
    expected = load_folder(folder, experts="packed")[1]
    monkeypatch.setattr(folders, "READ_BYTES", size)
    _assert_equal(load_folder(folder, experts="packed")[1], expected)


def test_layers_read_one_by_one_and_all_at_once_are_equal(folder, monkeypatch):
    expected = load_folder(folder, experts="packed")[1]
    monkeypatch.setattr(folders, "_AT_ONCE_BYTES", 5000)  # some stacks are larger
    stacked = []
    stack = folders._stack_layers
    monkeypatch.setattr(folders, "_stack_layers", lambda struct, layers: stacked.append(struct.shape) or stack(struct, layers))
    _assert_equal(load_folder(folder, experts="packed")[1], expected)
    assert 0 < len(stacked) < len(jax.tree.leaves(expected["pairs"]))


@pytest.mark.parametrize("experts", ["packed", "dense"])
def test_saving_and_loading_is_exact(folder, tmp_path, experts):
    """Also for dense experts, which are rounded to MXFP4: their values come from MXFP4."""
    config, tree = load_folder(folder, dtype="bfloat16", experts=experts)
    for layout in LAYOUTS:
        save_folder(tmp_path / layout, config, tree, layout=layout)
        _assert_equal(load_folder(tmp_path / layout, dtype="bfloat16", experts="dense")[1], load_folder(folder, dtype="bfloat16")[1])


def test_the_original_folder_is_found_inside_a_repository(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "repository" / "original")
    (tmp_path / "repository" / "config.json").write_text("{}")
    assert read_config(tmp_path / "repository") == CONFIG


def test_config_json_of_both_layouts_round_trips():
    for config in (GPT_OSS_20B, GPT_OSS_120B, CONFIG):
        assert all(read_model_config(config_content(config, layout)) == config for layout in LAYOUTS.values())
    with pytest.raises(WeightsError, match="head_dim"):
        read_model_config({k: v for k, v in config_content(CONFIG, ORIGINAL).items() if k != "head_dim"})


def test_progress_counts_the_bytes_of_the_files(folder):
    seen = []
    load_folder(folder, dtype="bfloat16", experts="packed", on_progress=lambda *counts: seen.append(counts))
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[0] == total[-1]
    size = sum(array.nbytes for file in folder.glob("*.safetensors") for array in safetensors.numpy.load_file(file).values())
    assert total[0] == size


def test_folders_without_a_gpt_oss_model_are_refused(tmp_path, copy):
    with pytest.raises(WeightsError, match=r"nowhere.*config\.json.*config\.model\.weights"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(config_content(CONFIG, HUGGINGFACE)))
    with pytest.raises(WeightsError, match=r"\*\.safetensors"):
        load_folder(tmp_path)
    safetensors.numpy.save_file({"transformer.wte.weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"gpt_oss.*transformer\.wte"):
        load_folder(tmp_path)
    for content, message in (({"model_type": "mamba"}, "mamba.*gpt_oss.*llama"), ({}, "gpt_oss"), ([], r"config\.json.*list")):
        (copy / "config.json").write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=message):
            load_folder(copy)


def _edit(path, change):
    """Applies `change` to the tensors of the folder's only file."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def test_missing_tensors_are_named_and_counted(copy):
    def drop(tensors):
        for name in [name for name in tensors if (".3." in name and "sinks" in name) or ("norm" in name and ".1." in name)]:
            del tensors[name]

    _edit(copy, drop)
    with pytest.raises(WeightsError, match=r"lacks 3\b.*(layers|block)\.1\..*norm"):
        load_folder(copy)


def test_wrong_shapes_and_types_are_named_before_any_weight_is_read(copy, monkeypatch):
    def change(tensors):
        for name, array in list(tensors.items()):
            if name.endswith("scales") and ".2." in name:
                tensors[name] = array.astype(np.int32)
            if name in ("norm.scale", "model.norm.weight"):
                tensors[name] = array[:-1]

    _edit(copy, change)
    monkeypatch.setattr(folders, "_Reader", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(WeightsError) as caught:
        load_folder(copy)
    text = str(caught.value)
    assert "3 tensors" in text
    assert "(95,)" in text
    assert "(96,)" in text
    assert "I32" in text
    assert "U8" in text


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_files_are_named(copy, keep):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors.*truncated"):
        load_folder(copy)


def test_missing_shards_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    write_synthetic(tmp_path, CONFIG)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(WeightsError, match=f"lacks 1 of .*{lost.name}"):
        load_folder(tmp_path)


def test_dequantised_experts_are_not_packed_again(tmp_path):
    pytest.importorskip("torch", reason="transformers writes such folders")
    write_synthetic(tmp_path / "mxfp4", CONFIG)
    tensors = {}
    _, tree = load_folder(tmp_path / "mxfp4")
    for name, array in safetensors.numpy.load_file(tmp_path / "mxfp4" / "model.safetensors").items():
        if not name.endswith(("blocks", "scales")):
            tensors[name] = array
    for layer in range(4):
        for matrix in ("gate_up", "down"):
            weight = tree["pairs"][("sliding", "full")[layer % 2]]["experts"][matrix]["weight"][layer // 2]
            tensors[f"model.layers.{layer}.mlp.experts.{matrix}_proj"] = np.ascontiguousarray(weight.swapaxes(1, 2))
    (tmp_path / "dense").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "dense" / "model.safetensors")
    shutil.copy(tmp_path / "mxfp4" / "config.json", tmp_path / "dense")
    _assert_equal(load_folder(tmp_path / "dense")[1], tree)
    with pytest.raises(WeightsError, match=r"config\.model\.experts='dense'"):
        load_folder(tmp_path / "dense", experts="packed")


def test_writing_refuses_other_weights_unknown_layouts_and_full_disks(tmp_path, monkeypatch):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="model-00001-of-00002"):
        write_synthetic(tmp_path, CONFIG)
    with pytest.raises(WeightsError, match=r"'gguf'.*original, huggingface"):
        write_synthetic(tmp_path, CONFIG, layout="gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10))
    with pytest.raises(WeightsError, match=r"\b10 bytes"):
        write_synthetic(tmp_path / "full", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="/file"):
        write_synthetic(tmp_path / "file", CONFIG)


def test_the_command_writes_a_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(synthetic.SHAPES, "small", CONFIG)
    monkeypatch.setattr(sys, "argv", ["synthetic", "--shape=small", f"--out={tmp_path}", "--layers=2", "--layout=original"])
    synthetic.main()
    out = capsys.readouterr().out
    assert "2 layers" in out
    assert "original" in out
    assert read_config(tmp_path) == dataclasses.replace(CONFIG, num_layers=2)
    monkeypatch.setattr(sys, "argv", ["synthetic", "--shape=gpt-4", f"--out={tmp_path}"])
    with pytest.raises(SystemExit):
        synthetic.main()
    assert re.search("'gpt-4'.*gpt-oss-120b, gpt-oss-20b,.*small", capsys.readouterr().err)
    with pytest.raises(ConfigError, match="num_layers = 3"):
        synthetic.shape_of("gpt-oss-20b", 3)


@pytest.mark.slow
def test_each_device_reads_only_its_part():
    """On a mesh of four CPU devices, in a separate process: values are equal, and each read is a part of the tensor."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _ON_A_MESH], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"


_ON_A_MESH = """
import dataclasses, tempfile
import jax, numpy as np
from discover_jax.models import folder as folders
from discover_jax.models.config import ModelConfig
from discover_jax.models.folder import load_folder
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import make_mesh
from discover_jax.models.synthetic import write_synthetic

config = ModelConfig(2, 64, 4, 2, 16, 6, 2, 64, 32, sliding_window=8)
mesh = make_mesh(expert=2, tensor=2)
read, largest = folders._StoredParameter.read, {}

def recorded(self, index):
    array = read(self, index)
    largest[self.name] = max(largest.get(self.name, 0), array.size / np.prod(self.shape))
    return array

for layout in ("huggingface", "original"):
    with tempfile.TemporaryDirectory() as path:
        write_synthetic(path, config, seed=1, layout=layout)
        for experts in ("packed", "dense"):
            _, whole = load_folder(path, experts=experts)
            expected = Model(config, experts=experts, mesh=mesh).abstract_frozen()
            for folders._AT_ONCE_BYTES in (1 << 20, 0):
                folders._StoredParameter.read, largest = recorded, {}
                _, parts = load_folder(path, experts=experts, mesh=mesh)
                folders._StoredParameter.read = read
                jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, parts)
                jax.tree.map(lambda a, b: None if a.sharding.is_equivalent_to(b.sharding, a.ndim) else 1 / 0, parts, expected)
                assert all(part <= 0.25 for name, part in largest.items() if "mlp1_weight.blocks" in name or "gate_up_proj_blocks" in name)
                assert len(largest) > 20
print("equal")
"""
