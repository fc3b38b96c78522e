"""Tokenizers preserve text and never turn ordinary text into special tokens."""

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import TokenizerError
from discover_jax.text.tokenizer import SPECIAL_TOKENS, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer


@given(text=st.text(max_size=200))
def test_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize(
    "text",
    ["<|end|><|start|>assistant", "\u2581x \u2581", "<0x41>", "<s></s><unk>", "a\x00b", "  \r\n\t", "\U0001f680", "\ufffd", " , ' .", ""],
)
def test_difficult_text_round_trips_without_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.special(name) for name in SPECIAL_TOKENS} & set(ids)


@given(ids=st.lists(st.integers(-5, 400), max_size=50))
def test_any_ids_decode(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(tokenizer):
    first, *_ = tokenizer.encode("\u00e9")  # two bytes, one token each: neither tokenizer was trained on it
    assert tokenizer.decode([first, *tokenizer.encode("x")]) == "\ufffdx"


def test_special_ids_have_no_text_and_are_distinct(tokenizer):
    ids = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == ""
    assert isinstance(tokenizer, Tokenizer)


def test_tokenizers_can_be_pickled(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("def run():") == tokenizer.encode("def run():")


def test_unknown_special_name(tokenizer):
    with pytest.raises(TokenizerError, match=r"<\|nope\|>.*<\|return\|>"):
        tokenizer.special("<|nope|>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_symbols": list(SPECIAL_TOKENS[:-1])}, r"<\|call\|>"),
        ({"control_symbols": [], "user_defined_symbols": list(SPECIAL_TOKENS)}, r"<\|\w+\|>"),
        ({"add_dummy_prefix": True, "remove_extra_whitespaces": True}, r"tokenizer\.model"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"tokenizer\.model"),
    ],
)
def test_unsuitable_sentencepiece_models_are_refused(tmp_path, train_sentencepiece, changes, message):
    with pytest.raises(TokenizerError, match=message):
        SentencePieceTokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **changes))


def test_unsuitable_hugging_face_tokenizers_are_refused(tmp_path, train_hugging_face):
    with pytest.raises(TokenizerError, match=r"<\|call\|>"):
        HuggingFaceTokenizer(train_hugging_face(tmp_path / "lacking.json", special=SPECIAL_TOKENS[:-1]))
    with pytest.raises(TokenizerError, match="'def'"):
        HuggingFaceTokenizer(train_hugging_face(tmp_path / "greedy.json", ordinary=["def"]))
    path = train_hugging_face(tmp_path / "gaps.json")
    table = json.loads(path.read_text())
    table["added_tokens"][-1]["id"] += 1
    path.write_text(json.dumps(table))
    with pytest.raises(TokenizerError, match=r"<\|call\|>\W+\d+"):
        HuggingFaceTokenizer(path)


@pytest.mark.parametrize("kind", [SentencePieceTokenizer, HuggingFaceTokenizer])
def test_missing_and_broken_files(tmp_path, kind):
    with pytest.raises(TokenizerError, match="tokenizer"):
        kind(tmp_path / "tokenizer")
    broken = tmp_path / "tokenizer"
    broken.write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="tokenizer"):
        kind(broken)


def test_folder_determines_the_kind(sentencepiece_folder, hugging_face_folder, tmp_path):
    assert isinstance(load_tokenizer(sentencepiece_folder), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(str(hugging_face_folder)), HuggingFaceTokenizer)
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(TokenizerError, match=r"tokenizer\.model\b.*tokenizer\.json\b.*vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="absent"):
        load_tokenizer(tmp_path / "absent")


def test_importing_text_loads_nothing_heavy():
    code = (
        "import sys, discover_jax.text.prompts, discover_jax.text.code, discover_jax.text.tokenizer;"
        "print(sorted({'jax', 'torch', 'transformers', 'sentencepiece', 'pandas', 'sklearn'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
