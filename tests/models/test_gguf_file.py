"""Reading GGUF files, and errors that say what is wrong with one."""

import os
import re
import struct

import gguf
import numpy as np
import pytest
from gguf_files import TOKEN_TYPES, TOKENS, TYPES, error_of, load_model, logits_of, metadata_of, random_model, write_gguf, write_model

from discover_jax.exceptions import TokenizerError, WeightsError
from discover_jax.models import import_gguf
from discover_jax.models.gguf_file import GgufFile

pytestmark = pytest.mark.usefixtures("torch", "transformers")


def test_file_is_read_as_the_package_gguf_reads_it(tmp_path):
    arrays = {
        "vector": np.arange(7, dtype=np.float32),
        "matrix": np.arange(192, dtype=np.float32).reshape(3, 64),
        "cube": np.ones((2, 3, 32), np.float32),
    }
    types = {"matrix": TYPES.Q4_0, "cube": TYPES.F16}
    metadata = metadata_of("llama") | {
        "a.flag": True,
        "a.negative": -1.5,
        "a.bytes": [1, 2, 3],
        "a.texts": ["é", ""],
        "a.flags": [True, False],
    }
    source = write_gguf(tmp_path / "model.gguf", metadata, arrays, types)
    file, reference = GgufFile(source), gguf.GGUFReader(source)
    keys = [key for key in reference.fields if not key.startswith("GGUF.")]
    assert list(file._metadata) == keys
    for key in keys:
        assert file._metadata[key] == reference.fields[key].contents(), key
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for expected in reference.tensors:
        tensor = file.tensors[expected.name]
        assert tensor.shape == arrays[expected.name].shape
        assert tensor.type == expected.tensor_type.name
        assert tensor.data.dtype == expected.data.dtype
        np.testing.assert_array_equal(tensor.data, expected.data)


def test_split_file_is_read_as_one(qwen, tmp_path):
    write_model(tmp_path / "model.gguf", qwen[1], "qwen2", split=10)
    parts = [tmp_path / f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == parts
    import_gguf.import_gguf(parts[0], tmp_path / "out")
    np.testing.assert_array_equal(logits_of(load_model(tmp_path / "out")), logits_of(qwen[1]))
    assert "Set --gguf to the first part, model-00001-of-00003.gguf" in str(error_of(parts[1], tmp_path / "other"))
    parts[2].unlink()
    assert "missing: model-00003-of-00003.gguf" in str(error_of(parts[0], tmp_path / "other"))


@pytest.mark.parametrize("part", [4, 16, 100, 3000, 0.2, 0.5, 0.999])
def test_truncated_file(part, qwen, tmp_path):
    whole = qwen[0].read_bytes()
    source = tmp_path / "model.gguf"
    source.write_bytes(whole[: part if isinstance(part, int) else int(len(whole) * part)])
    error = error_of(source, tmp_path / "out")
    assert isinstance(error, WeightsError)
    assert "truncated or damaged" in str(error)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive", b"{}"])
def test_file_that_is_not_gguf(content, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    assert "is not a GGUF file" in str(error_of(source, tmp_path / "out"))


def test_missing_file_and_folder_as_file(tmp_path):
    assert "No such file" in str(error_of(tmp_path / "absent.gguf", tmp_path / "out"))
    (tmp_path / "folder").mkdir()
    assert "directory" in str(error_of(tmp_path / "folder", tmp_path / "out"))


BAD_METADATA = {
    "architecture": ({"general.architecture": "gemma3"}, WeightsError, r"'gemma3'\. Supported: llama, qwen2, qwen3"),
    "experts": ({"qwen2.expert_count": 8}, WeightsError, "mixture of 8 experts"),
    "window": ({"qwen2.attention.sliding_window": 4096}, WeightsError, "sliding window of 4096"),
    "yarn": ({"qwen2.rope.scaling.type": "yarn"}, WeightsError, "rope scaling 'yarn'. Supported: none, and llama3"),
    "partial rope": ({"qwen2.rope.dimension_count": 8}, WeightsError, "rope.dimension_count is 8"),
    "missing size": ({"qwen2.block_count": None}, WeightsError, "lacks the metadata key 'qwen2.block_count'"),
    "wrong type": ({"qwen2.block_count": "two"}, WeightsError, "'qwen2.block_count' must be an integer; got 'two'"),
    "sizes per layer": ({"qwen2.attention.head_count_kv": [2, 4]}, WeightsError, "must be an integer"),
    "zero heads": ({"qwen2.attention.head_count": 0}, WeightsError, "head_count is 0"),
    "more layers": ({"qwen2.block_count": 3}, WeightsError, r"lacks 12 of the .* blk\.2\."),
    "name of a part": ({"split.count": 3, "split.no": 0}, WeightsError, "part 1 of 3.*'-00001-of-00003.gguf'"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, TokenizerError, r"kind 'llama'\. Supported: 'gpt2'"),
    "splitting": ({"tokenizer.ggml.pre": "tekken"}, TokenizerError, "is 'tekken'. Supported: llama-bpe"),
    "no splitting": ({"tokenizer.ggml.pre": None}, TokenizerError, "is 'default'. Supported: llama-bpe"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, WeightsError, "lacks the metadata key 'tokenizer.ggml.tokens'"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, WeightsError, "352 tokens and 2 token types"),
    "twice": ({"tokenizer.ggml.tokens": [*TOKENS[:8], TOKENS[0], *TOKENS[9:]]}, TokenizerError, "1 tokens more than once"),
    "merge of three": ({"tokenizer.ggml.merges": ["a b c"]}, TokenizerError, "'a b c'"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["zz qq"]}, TokenizerError, "give no tokenizer"),
    "stop id": ({"tokenizer.ggml.eos_token_id": 999}, TokenizerError, "eos_token_id is 999.*352 tokens"),
    "no stop id": ({"tokenizer.ggml.eos_token_id": None}, TokenizerError, "lacks the metadata key 'tokenizer.ggml.eos_token_id'"),
    "more tokens": (
        {"tokenizer.ggml.tokens": [*TOKENS, "extra"], "tokenizer.ggml.token_type": [*map(int, TOKEN_TYPES), 1]},
        WeightsError,
        "353 tokens, but embeddings of only 352",
    ),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata(case, qwen, tmp_path):
    changes, error, message = BAD_METADATA[case]
    refused = error_of(write_model(tmp_path / "model.gguf", qwen[1], "qwen2", metadata=changes), tmp_path / "out")
    assert isinstance(refused, error)
    assert re.search(message, str(refused)), refused


BAD_TENSORS = {
    "missing": ({"blk.1.attn_k.bias": None}, r"lacks 1 of the 26 tensors .* blk\.1\.attn_k\.bias"),
    "no embedding": ({"token_embd.weight": None}, "token_embd.weight"),
    "unknown": ({"blk.0.ffn_gate_inp.weight": np.ones((4, 96), np.float32)}, "does not have: blk.0.ffn_gate_inp.weight"),
    "shape": ({"blk.0.ffn_up.weight": np.ones((95, 96), np.float32)}, r"blk.0.ffn_up.weight has \(95, 96\), expected \(160, 96\)"),
    "vocabulary of the head": ({"output.weight": np.ones((351, 96), np.float32)}, r"output.weight has \(351, 96\), expected \(352, 96\)"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, qwen, tmp_path):
    changes, message = BAD_TENSORS[case]
    refused = error_of(write_model(tmp_path / "model.gguf", qwen[1], "qwen2", tensors=changes), tmp_path / "out")
    assert isinstance(refused, WeightsError)
    assert re.search(message, str(refused)), refused


def test_unsupported_type_of_a_tensor(qwen, tmp_path):
    source = tmp_path / "model.gguf"
    block, size = gguf.GGML_QUANT_SIZES[TYPES.MXFP4]
    packed = np.zeros((160, 96 // block * size), np.uint8)
    write_model(source, qwen[1], "qwen2", types={"blk.1.ffn_up.weight": TYPES.MXFP4}, tensors={"blk.1.ffn_up.weight": packed})
    message = str(error_of(source, tmp_path / "out"))
    assert "blk.1.ffn_up.weight is MXFP4" in message
    assert "Supported: F32, F16, BF16, Q8_0" in message


def _replaced(source, path, old, new):
    """A copy of a file with the only occurrence of some bytes replaced by others of the same length."""
    content = source.read_bytes()
    assert content.count(old) == 1
    assert len(new) == len(old)
    path.write_bytes(content.replace(old, new))
    return path


def _entry(tensor, kind):
    """The header's bytes of a matrix of the file `qwen`: name, axes, shape and type."""
    name = tensor.encode()
    return len(name).to_bytes(8, "little") + name + struct.pack("<IQQI", 2, 96, 160, kind)


def test_type_that_the_package_does_not_know(qwen, tmp_path):
    name = "blk.1.ffn_up.weight"
    source = _replaced(qwen[0], tmp_path / "model.gguf", _entry(name, 0), _entry(name, 999))
    assert f"{name} is type 999" in str(error_of(source, tmp_path / "out"))


def test_damaged_header(qwen, tmp_path):
    source = tmp_path / "model.gguf"
    for old, new, message in [
        (b"GGUF\3\0\0\0", b"GGUF\1\0\0\0", "version 1 of the GGUF format"),
        (b"GGUF\3\0\0\0", b"GGUF\0\0\0\3", "big-endian"),
        (b"qwen2.block_count", b"qwen2.\xff\xffock_count", "not valid UTF-8"),
        (_entry("blk.1.ffn_up.weight", 0), _entry("blk.0.ffn_up.weight", 0), "'blk.0.ffn_up.weight' twice"),
        (struct.pack("<Q", 17) + b"qwen2.block_count", struct.pack("<Q", 2**60) + b"qwen2.block_count", "needs more than"),
        (b"blk.1.ffn_up.weight" + struct.pack("<I", 2), b"blk.1.ffn_up.weight" + struct.pack("<I", 9), "has 9 axes"),
    ]:
        error = str(error_of(_replaced(qwen[0], source, old, new), tmp_path / "out"))
        assert message in error


def test_rows_that_do_not_fit_the_blocks_of_their_type(qwen, tmp_path):
    name = "blk.1.ffn_up.weight"
    source = _replaced(qwen[0], tmp_path / "model.gguf", _entry(name, 0), _entry(name, int(TYPES.Q4_K)))
    assert f"rows of {name} have 96 values, but Q4_K stores 256 at a time" in str(error_of(source, tmp_path / "out"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.tokens", [1, 2, 3], r"tokens must be a list of texts; got '1'"),
        ("tokenizer.ggml.token_type", [0.5, 1.5], r"token_type must be a list of integers; got '0.5'"),
        ("tokenizer.ggml.merges", [1, 2], r"merges must be a list of texts; got '1'"),
    ],
)
def test_lists_of_another_type_are_refused(key, value, message, tmp_path):
    source = write_model(tmp_path / "m.gguf", random_model("qwen2"), "qwen2", metadata={key: value})
    with pytest.raises(WeightsError, match=message):
        import_gguf.import_gguf(source, tmp_path / "out")


def test_fifos_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match="FIFO"):
        import_gguf.import_gguf(tmp_path / "m.gguf", tmp_path / "out")
