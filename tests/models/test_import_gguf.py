"""GGUF import: logits against transformers, what is written, and the command."""

import json
import re
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf_files import FAMILIES, SIZES, TYPES, classes_of, load_model, logits_of, matrices_of, random_model, write_model

from discover_jax.exceptions import WeightsError
from discover_jax.models import gguf_tensors, import_gguf, shards

pytestmark = pytest.mark.usefixtures("torch", "transformers")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_file_gives_the_models_logits(family, tied, tmp_path, torch):
    model = random_model(family, tied=tied)
    source = write_model(tmp_path / "model.gguf", model, family)
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    assert imported.config["tie_word_embeddings"] is tied
    loaded = load_model(tmp_path / "out")
    assert type(loaded) is classes_of(family)[1]
    np.testing.assert_array_equal(logits_of(loaded), logits_of(model))
    # transformers assumes a head size for qwen3 instead of reading it, so it gets the config.
    reference = classes_of(family)[1].from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32, config=model.config).eval()
    np.testing.assert_allclose(logits_of(loaded), logits_of(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_may_be_wider_than_the_model(family, tmp_path):
    model = random_model(family, head_dim=32)
    sizes = {f"{family}.attention.{name}_length": 32 for name in ("key", "value")}
    import_gguf.import_gguf(write_model(tmp_path / "model.gguf", model, family, metadata=sizes), tmp_path / "out")
    np.testing.assert_array_equal(logits_of(load_model(tmp_path / "out")), logits_of(model))


def _unpack_by_hand(data, kind):
    """Values of Q8_0 or Q4_0 blocks, from ggml's definition: a float16 scale and 32 integers."""
    size = {TYPES.Q8_0: 34, TYPES.Q4_0: 18}[kind]
    blocks = data.reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == TYPES.Q8_0:
        values = blocks[:, 2:].view(np.int8).astype(np.float32)
    else:
        values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    return (scale * values).reshape(data.shape[0], -1)


@pytest.mark.parametrize("kind", [TYPES.Q8_0, TYPES.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_file_gives_the_logits_of_the_dequantised_model(family, kind, tmp_path, torch):
    model = random_model(family)
    source = write_model(tmp_path / "model.gguf", model, family, types=dict.fromkeys(matrices_of(model, family), kind))
    import_gguf.import_gguf(source, tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                values = _unpack_by_hand(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(values).to(torch.bfloat16).float())
    np.testing.assert_array_equal(logits_of(load_model(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize("output", [TYPES.Q8_0, TYPES.Q4_0], ids=lambda kind: kind.name)
def test_tied_matrix_stored_twice_becomes_one_from_the_better_copy(output, tmp_path, torch):
    model = random_model("qwen2", tied=True)
    embedding = model.model.embed_tokens.weight.detach().numpy()
    other = TYPES.Q5_0
    source = write_model(
        tmp_path / "model.gguf",
        model,
        "qwen2",
        types={"token_embd.weight": other, "output.weight": output},
        tensors={"output.weight": embedding},
    )
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    better = output if output == TYPES.Q8_0 else other
    assert imported.config["tie_word_embeddings"] is True
    assert "twice" in imported.remarks[0]
    assert ("output.weight is used" in imported.remarks[0]) == (better == output)
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(embedding, better), better)).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"].astype(np.float32), expected)


def test_head_that_was_trained_away_from_the_embedding_stays_separate(tmp_path, torch):
    model = random_model("qwen2")
    embedding = model.model.embed_tokens.weight.detach()
    with torch.no_grad():
        model.lm_head.weight.copy_((embedding * 1.25).to(torch.bfloat16))  # 20% of its size away: more than Q8_0 explains
    types = {"token_embd.weight": TYPES.Q8_0, "output.weight": TYPES.Q8_0}
    imported = import_gguf.import_gguf(write_model(tmp_path / "model.gguf", model, "qwen2", types=types), tmp_path / "out")
    assert imported.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")


def test_shards_have_an_index_and_the_same_logits(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    source, model = qwen
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == imported.files > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == imported.total == 2 * sum(p.numel() for p in model.parameters())
    np.testing.assert_array_equal(logits_of(load_model(tmp_path / "out")), logits_of(model))


def test_progress_reaches_the_total(qwen, tmp_path):
    calls = []
    imported = import_gguf.import_gguf(qwen[0], tmp_path / "out", lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (imported.total, imported.total)


def test_memory_is_one_tensor(tmp_path, monkeypatch):
    for name, size in {"num_hidden_layers": 12, "intermediate_size": 1024, "hidden_size": 288}.items():
        monkeypatch.setitem(SIZES, name, size)
    model = random_model("llama")
    source = write_model(tmp_path / "m.gguf", model, "llama", types=dict.fromkeys(matrices_of(model, "llama"), TYPES.Q8_0))
    tracemalloc.start()
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 1024 * 288 * 4  # in float32
    assert peak < 5 * largest < imported.total / 3


def test_interrupted_import_can_be_repeated(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    read, calls = gguf_tensors.read, []

    def interrupt(tensor, heads=0):
        calls.append(tensor.name)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return read(tensor, heads)

    monkeypatch.setattr(gguf_tensors, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_gguf.import_gguf(qwen[0], tmp_path / "out")
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    np.testing.assert_array_equal(logits_of(load_model(tmp_path / "out")), logits_of(qwen[1]))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_folder_with_other_weights_is_left_alone(name, qwen, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"weights")
    (out / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=rf"{re.escape(str(out))} already contains a model: .*--out"):
        import_gguf.import_gguf(qwen[0], out)
    assert sorted(file.name for file in out.iterdir()) == sorted([name, "config.json"])
    assert (out / name).read_bytes() == b"weights"


def test_too_little_space_is_an_error_before_anything_is_written(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(import_gguf.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(WeightsError, match=r"1,000 bytes free"):
        import_gguf.import_gguf(qwen[0], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_folder_below_a_file_is_an_error(qwen, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"Cannot write to .*--out"):
        import_gguf.import_gguf(qwen[0], tmp_path / "file" / "out")


def test_missing_package(qwen, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"requires the package gguf.*'\.\[gguf\]'"):
        import_gguf.import_gguf(qwen[0], tmp_path / "out")


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import_gguf", *arguments])
    import_gguf.main()


def test_command_says_what_it_wrote_and_what_to_do_next(qwen, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    _run(monkeypatch, f"--gguf={qwen[0]}", f"--out={out}")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Wrote qwen2 (2 layers, width 96, separate head)") for line in lines)
    assert f"--config.model.weights={out}" in lines[-1]
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_command_prints_an_error_without_traceback(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        _run(monkeypatch, f"--gguf={tmp_path / 'absent.gguf'}", f"--out={tmp_path / 'out'}")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: Cannot read")
