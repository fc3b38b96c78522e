"""Small tokenizers of each kind, trained for the tests."""

import functools
import io
import json
import sys
from pathlib import Path

import pytest

from discover_jax.text.tokenizer import SPECIAL_TOKENS

sys.path.insert(0, str(Path(__file__).parent))  # for test_prompts

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


def _train_hugging_face(path, special=SPECIAL_TOKENS, ordinary=(), unicode_form=None):
    """Writes a byte-level `tokenizer.json` with `special` tokens, and `ordinary` added tokens that match in any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if unicode_form is not None:
        tokenizer.normalizer = getattr(normalizers, unicode_form)()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_LINES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ordinary])
    tokenizer.save(str(path))
    return path


_THINK = ("<think>", "</think>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATS = {
    # Template: special tokens, other added tokens, tokenizer_config.json, generation_config.json.
    "qwen2.5": (_CHATML, ("<tool_call>",), {"eos_token": "<|im_end|>"}, {"eos_token_id": [0, 2]}),
    "qwen3": (_CHATML, _THINK, {"eos_token": "<|im_end|>"}, {"eos_token_id": [0, 2]}),
    "qwq": (_CHATML, _THINK, {"eos_token": "<|im_end|>"}, None),
    "llama3.2": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        (),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        {"eos_token_id": [1, 4]},
    ),
    "gemma": (("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), (), {"bos_token": "<bos>", "eos_token": "<eos>"}, None),
}


def _write_chat_folder(folder, name, *, template=None, ordinary=None, generation=None):
    """Writes the tokenizer of a chat model with the template of that name. Numbers in `eos_token_id` count the special tokens."""
    special, added, config, published = CHATS[name]
    folder.mkdir(exist_ok=True)
    path = _train_hugging_face(folder / "tokenizer.json", special, added if ordinary is None else ordinary, "NFC")
    first = json.loads(path.read_text())["added_tokens"][0]["id"]
    template = Path(__file__).with_name("templates").joinpath(f"{name}.jinja").read_text() if template is None else template
    if name == "qwq":  # some folders have the template in a file of its own
        (folder / "chat_template.jinja").write_text(template)
    else:
        config = config | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = published if generation is None else generation
    if generation is not None:
        ids = [first + number for number in generation["eos_token_id"]]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


@pytest.fixture(scope="session")
def train_sentencepiece():
    return _train_sentencepiece


@pytest.fixture(scope="session")
def train_hugging_face():
    return _train_hugging_face


@pytest.fixture(scope="session")
def write_chat_folder():
    return _write_chat_folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """The folder of a chat model by the name of its template."""

    @functools.cache
    def folder(name):
        return _write_chat_folder(tmp_path_factory.mktemp("chat") / name, name)

    return folder


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


@pytest.fixture(scope="session")
def hugging_face_chat(hugging_face_folder):
    """Harmony with one tokenizer."""
    from discover_jax.text.harmony import Harmony
    from discover_jax.text.tokenizer import load_tokenizer

    return Harmony(load_tokenizer(hugging_face_folder))


@pytest.fixture(scope="session")
def chat(tokenizer):
    """Harmony with a tokenizer of each kind."""
    from discover_jax.text.harmony import Harmony

    return Harmony(tokenizer)
