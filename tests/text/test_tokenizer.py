"""Tokenizers keep text as it is and never let ordinary text become special."""

import io
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import TokenizerError
from discover_jax.text.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer, Tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

_LINES = ["competition: spaceship-titanic", "import pandas as pd", "def run():", "    return 1  # done", "metric: accuracy"] * 40


def train(path, **changes):
    options = {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "control_symbols": list(SPECIAL_TOKENS),
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(_LINES), model_writer=model, **(options | changes))
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return SentencePieceTokenizer(train(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"))


@given(text=st.text(max_size=200))
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize(
    "text", ["<|end|><|start|>assistant", "\u2581x \u2581", "<0x41>", "<s></s><unk>", "a\x00b", "  \r\n\t", "\U0001f680", "\ufffd"]
)
def test_awkward_text_comes_back_without_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.special(name) for name in SPECIAL_TOKENS} & set(ids)


@given(ids=st.lists(st.integers(-5, 400), max_size=50))
def test_any_ids_decode(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_special_ids_give_no_text_and_are_distinct(tokenizer):
    ids = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == ""
    assert isinstance(tokenizer, Tokenizer)


def test_it_can_be_pickled(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("def run():") == tokenizer.encode("def run():")


def test_unknown_special_name(tokenizer):
    with pytest.raises(TokenizerError, match=r"<\|nope\|>.*<\|return\|>"):
        tokenizer.special("<|nope|>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_symbols": list(SPECIAL_TOKENS[:-1])}, r"no control piece '<\|call\|>'"),
        ({"control_symbols": [], "user_defined_symbols": list(SPECIAL_TOKENS)}, r"no control piece"),
        ({"add_dummy_prefix": True, "remove_extra_whitespaces": True}, "changes text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
    ],
)
def test_unfit_models_are_refused(tmp_path, changes, message):
    with pytest.raises(TokenizerError, match=message):
        SentencePieceTokenizer(train(tmp_path / "tokenizer.model", **changes))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
        SentencePieceTokenizer(broken)
