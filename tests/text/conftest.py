"""Small tokenizers of both kinds, trained for the tests."""

import io

import pytest

from discover_jax.text.tokenizer import SPECIAL_TOKENS

_LINES = ["competition: spaceship-titanic", "import pandas as pd", "def run():", "    return 1  # done", "metric: accuracy"] * 40


def _train_sentencepiece(path, **changes):
    """Writes a valid `tokenizer.model`; `changes` override the trainer's options."""
    import sentencepiece

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


def _train_hugging_face(path, special=SPECIAL_TOKENS, ordinary=()):
    """Writes a byte-level `tokenizer.json` with `special` tokens, and `ordinary` added tokens that match in any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_LINES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.add_tokens(list(ordinary))
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def train_sentencepiece():
    return _train_sentencepiece


@pytest.fixture(scope="session")
def train_hugging_face():
    return _train_hugging_face


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    _train_sentencepiece(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    _train_hugging_face(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session", params=["sentencepiece", "hugging_face"])
def tokenizer(request):
    """A tokenizer of each kind."""
    from discover_jax.text.tokenizer import load_tokenizer

    return load_tokenizer(request.getfixturevalue(f"{request.param}_folder"))
