"""Which file counts for each tensor: the one that the index names, and left-over, hidden and special files never."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy

from discover_jax.exceptions import WeightsError
from discover_jax.models import shards
from discover_jax.models.config import ModelConfig
from discover_jax.models.folder import check_folder, find_folder, load_folder, read_config
from discover_jax.models.shards import INDEX
from discover_jax.models.synthetic import write_synthetic

CONFIG = ModelConfig(
    num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_size=8, num_experts=2, experts_per_token=1, mlp_width=32, vocab_size=11
)
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint of several files with an index."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    write_synthetic(tmp_path / "model", CONFIG, seed=1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def norm_of(folder):
    return np.asarray(load_folder(folder)[1]["norm"])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00099.safetensors", "zzz.safetensors", "._model-00001-of-00003.safetensors"]
)
def test_stale_files_do_not_count(folder, name):
    expected = norm_of(folder)
    safetensors.numpy.save_file({NORM: np.full(CONFIG.width, 7, np.float32)}, folder / name)
    np.testing.assert_array_equal(norm_of(folder), expected)
    (folder / name).write_bytes(b"not even a file of weights")
    np.testing.assert_array_equal(norm_of(folder), expected)


def test_a_stale_copy_in_another_file_of_the_index_does_not_count(folder):
    expected = norm_of(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(folder / file for file in index.values() if file != index[NORM])
    safetensors.numpy.save_file(safetensors.numpy.load_file(other) | {NORM: np.full(CONFIG.width, 7, np.float32)}, other)
    np.testing.assert_array_equal(norm_of(folder), expected)


def test_without_an_index_a_tensor_in_two_files_is_refused(folder):
    (folder / INDEX).unlink()
    norm_of(folder)
    for hidden in ("._model-00001-of-00002.safetensors", "._" + INDEX, ".DS_Store"):
        (folder / hidden).write_bytes(b"\0\5")
    norm_of(folder)
    safetensors.numpy.save_file({NORM: np.full(CONFIG.width, 7, np.float32)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"{NORM}.*twice"):
        read_config(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "tf_model.h5.index.json", "._" + INDEX, "x.fp16.safetensors.index.json"])
def test_indices_of_other_formats_do_not_count(folder, name):
    expected = norm_of(folder)
    (folder / name).write_text(json.dumps({"weight_map": {NORM: "pytorch_model-00001-of-00002.bin"}}))
    np.testing.assert_array_equal(norm_of(folder), expected)


def test_several_indices_of_which_none_has_the_usual_name(folder):
    for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
        (folder / name).write_bytes((folder / INDEX).read_bytes())
    (folder / INDEX).unlink()
    with pytest.raises(WeightsError, match=r"a\.safetensors\.index\.json, b"):
        read_config(folder)
    (folder / "b.safetensors.index.json").unlink()
    assert read_config(folder) == CONFIG


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "{}", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "x"}', '{"weight_map": 3}',
     '{"weight_map": {"a": null}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["model.safetensors"]}}',
     '{"weight_map": {"a": {"file": "model.safetensors"}}}', '{"weight_map": {"a": "../model.safetensors"}}',
     '{"weight_map": {"a": "/dev/zero"}}', '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": ""}}', '{"weight_map": {"a": "x\\u0000"}}',
     '{"weight_map": {"a": "model.safetensors", "a": "x.safetensors"}}',
     "[" * 100_000, "{", "\xff", '{"weight_map": {"a": "absent.safetensors"}}'],
)  # fmt: skip
def test_an_index_of_another_shape_is_refused(folder, content):
    (folder / INDEX).write_text(content, encoding="latin-1")
    for read in (read_config, check_folder, load_folder):
        with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json|absent|Cannot read"):
            read(folder)


def test_an_index_and_files_of_different_checkpoints(folder):
    index = json.loads((folder / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    lost = index["weight_map"][NORM] == first
    index["weight_map"][NORM] = last if lost else first
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"lacks 1 of .*{NORM}"):
        read_config(folder)
    del index["weight_map"][NORM]  # a tensor that the index does not name is not there
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"lacks 1: {NORM}"):
        load_folder(folder)


@pytest.mark.parametrize("name", [INDEX, "model-00001-of-00003.safetensors"])
def test_special_files_are_refused(folder, name):
    name = name if name == INDEX else min(file.name for file in folder.glob("*.safetensors"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(WeightsError, match="FIFO"):
        read_config(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(WeightsError, match="directory"):
        read_config(folder)


def test_hidden_files_do_not_decide_where_the_weights_are(folder):
    (folder.parent / "repository").mkdir()
    folder.rename(folder.parent / "repository" / "original")
    repository = folder.parent / "repository"
    (repository / "._model.safetensors").write_bytes(b"\0\5")
    assert find_folder(repository) == repository / "original"
    assert read_config(repository) == CONFIG


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("openai/gpt-oss-20b", r"no such folder \(current directory: .*hf download openai/gpt-oss-20b --local-dir"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", r"hf download Qwen/Qwen2\.5-Coder-7B-Instruct --local-dir"),
        ("gpt-oss-120b", r"no such folder \(current directory: (?!.*download)"),
        ("/nowhere/gpt-oss-20b", r"no such folder \(current directory: (?!.*download)"),
        ("model.gguf", r"is a file, not a folder\. .*import_gguf --gguf=FILE --out=FOLDER"),
        ("model.safetensors", r"is a file, not a folder\. (?!.*import_gguf)"),
        ("empty", r"(?<=missing\. )Set config\.model\.weights"),
    ],
)
def test_a_path_that_is_not_a_folder_of_weights_says_what_it_is(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=rf"^No weights at '{given}': config\.json is missing\. .*{said}"):
        read_config(given)


def test_a_folder_of_the_cache_leads_to_its_snapshot(folder, tmp_path):
    cache = tmp_path / "hub" / "models--openai--gpt-oss-20b"
    (cache / "snapshots").mkdir(parents=True)
    with pytest.raises(WeightsError, match="is empty"):
        read_config(cache)
    for revision in ("0ld", "n3w"):
        (cache / "snapshots" / revision).mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0ld\n")
    for given in (cache, cache / "snapshots"):
        with pytest.raises(WeightsError, match=r"snapshots/0ld\b.*config\.model\.weights"):
            read_config(given)
    with pytest.raises(WeightsError, match="models--openai--gpt-oss-20b"):
        read_config(tmp_path / "hub")
    (cache / "refs" / "main").unlink()
    os.mkfifo(cache / "refs" / "main")
    with pytest.raises(WeightsError, match="snapshots/n3w"):
        read_config(cache)
    # The files of a snapshot are links to blobs.
    (cache / "blobs").mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(cache / "blobs" / str(number))
        (cache / "snapshots" / "0ld" / file.name).symlink_to(f"../../blobs/{number}")
    assert read_config(cache / "snapshots" / "0ld") == CONFIG
