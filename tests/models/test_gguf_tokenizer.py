"""Tokenizers of GGUF files against transformers."""

import json
import re

import pytest
from gguf_files import IDS, random_model, write_model
from tokenizers import Tokenizer

from discover_jax.models import import_gguf

pytestmark = pytest.mark.usefixtures("torch", "transformers")


TEXTS = [
    "def f(x):\n    return x**2 + 1  # café\n",
    "Größe naïve 日本語 русский",
    "😀 👩‍👩‍👧 hello",
    "It's we'll I'M",
    "  spaces\r\n\r\n\t\tend   ",
    "12345 3.14",
    "<|im_start|>user\nhello<|im_end|>\n<tool_call>x</tool_call>",
    "",
]


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm"])
def test_tokenizer_equals_transformers(pre, tmp_path, transformers):
    family = "qwen2" if pre == "qwen2" else "llama"
    source = write_model(
        tmp_path / "model.gguf",
        random_model(family),
        family,
        metadata={"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False},
    )
    import_gguf.import_gguf(source, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=source.name)
    # transformers' import does not know that SmolLM splits numbers into digits.
    for text in [text for text in TEXTS if pre != "smollm" or not re.search(r"\d", text)]:
        ids = tokenizer(text).input_ids
        assert ids == reference(text).input_ids, text
        assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "café 😀"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids == reference.apply_chat_template(chat, return_dict=False)
    assert ids[0] == IDS["<|im_start|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\ncafé 😀\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == IDS["<tool_call>"] + 1  # without the padding of the vocabulary


@pytest.mark.parametrize(("pre", "pieces"), [("qwen2", ["1", "2", "3", "4", "5"]), ("llama-bpe", ["123", "45"]), ("smollm", list("12345"))])
def test_digits_are_split_as_in_each_family(pre, pieces, tmp_path):
    source = write_model(tmp_path / "m.gguf", random_model("llama"), "llama", metadata={"tokenizer.ggml.pre": pre})
    import_gguf.import_gguf(source, tmp_path / "out")
    splitter = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("12345")] == pieces


def test_qwen_composes_accents_as_its_published_tokenizer_does(qwen, tmp_path, transformers):
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("cafe\u0301").input_ids == tokenizer("caf\u00e9").input_ids


@pytest.mark.parametrize(("pre", "stored", "expected"), [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", True, True)])
def test_first_token_is_added_as_the_metadata_or_the_family_says(pre, stored, expected, tmp_path, transformers):
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": stored}
    import_gguf.import_gguf(write_model(tmp_path / "m.gguf", random_model("llama"), "llama", metadata=metadata), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer("hello").input_ids[0] == IDS["<|endoftext|>"]) is expected
    assert tokenizer("hello", add_special_tokens=False).input_ids[0] != IDS["<|endoftext|>"]


def test_generation_config_lists_all_stop_ids(qwen, tmp_path, transformers):
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    assert generation.pad_token_id == IDS["<|endoftext|>"]


def test_config_names_a_version_of_transformers_that_trusts_the_tokenizer(qwen, tmp_path, transformers):
    """Without the version, or with one below 5, transformers 5.17 warns of a fault that only tokenizers of Mistral have."""
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    version = json.loads((tmp_path / "out" / "config.json").read_text())["transformers_version"]
    assert version == transformers.__version__
    assert int(version.split(".")[0]) >= 5


def test_missing_chat_template_is_remarked(tmp_path):
    source = write_model(tmp_path / "m.gguf", random_model("qwen2"), "qwen2", metadata={"tokenizer.chat_template": None})
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    assert any("no chat template" in remark for remark in imported.remarks)
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
