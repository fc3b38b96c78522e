"""Files of a tokenizer that have the right syntax and another shape, or are not files: an error of this project, or a working tokenizer."""

import json
import os
import shutil
from pathlib import Path

import pytest

from discover_jax.exceptions import ConfigError, DiscoverError, TokenizerError
from discover_jax.text.folder_tokenizer import FolderTokenizer
from discover_jax.text.formats import load_chat_format
from discover_jax.text.template import Template
from discover_jax.text.tokenizer import load_tokenizer

_WRONG = [None, 3, True, "x", [], ["x"], {}, {"x": 1}, [{}], [[]], -1, 1.5]


def outcome(load, folder):
    """Whether the folder loads and keeps text; None for an error of this project. Anything else raises."""
    try:
        loaded = load(folder)
    except DiscoverError:
        return None
    tokenizer = getattr(loaded, "tokenizer", loaded)
    return tokenizer.decode(tokenizer.encode("x = 1")) == "x = 1"


@pytest.fixture
def harmony(hugging_face_folder, tmp_path):
    return Path(shutil.copytree(hugging_face_folder, tmp_path / "harmony"))


@pytest.fixture
def template(chat_folder, tmp_path):
    return Path(shutil.copytree(chat_folder("qwen2.5"), tmp_path / "template"))


@pytest.mark.parametrize("kind", ["harmony", "template"])
def test_any_value_of_any_field_of_tokenizer_json(kind, request):
    folder = request.getfixturevalue(kind)
    load = {"harmony": load_tokenizer, "template": FolderTokenizer}[kind]
    content = json.loads((folder / "tokenizer.json").read_text())
    assert outcome(load, folder)
    refused = 0
    for name in ("added_tokens", "model", "pre_tokenizer", "decoder", "normalizer", "post_processor", "version", "padding"):
        for value in _WRONG[::2]:
            (folder / "tokenizer.json").write_text(json.dumps(content | {name: value}))
            found = outcome(load, folder)
            assert found is not False
            refused += found is None
    assert refused > 15
    del content["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if kind == "harmony":
        with pytest.raises(TokenizerError, match="special tokens"):
            load(folder)
    else:
        assert outcome(load, folder) is not False


@pytest.mark.parametrize(
    "tokens", [{"a": 1}, "x", 3, ["x"], [{}], [{"content": "a"}], [{"content": 1, "id": 1}], [{"content": "a", "id": "1"}]]
)
@pytest.mark.parametrize("kind", ["harmony", "template"])
def test_added_tokens_of_another_shape(kind, tokens, request):
    folder = request.getfixturevalue(kind)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": tokens}))
    with pytest.raises(TokenizerError, match=r"tokenizer"):
        {"harmony": load_tokenizer, "template": FolderTokenizer}[kind](folder)


def test_any_value_of_any_field_of_tokenizer_config(template):
    path = template / "tokenizer_config.json"
    content = json.loads(path.read_text())
    names = [*content, "bos_token", "pad_token", "added_tokens_decoder", "tokenizer_class", "extra_special_tokens", "model_max_length"]
    for name in names:
        for value in _WRONG:
            path.write_text(json.dumps(content | {name: value}))
            assert outcome(Template, template) is not False
    for value in ([], 3, ["x"], {"default": 3}, {"default": None}, [{"name": "default"}], [{"name": "default", "template": 3}]):
        path.write_text(json.dumps(content | {"chat_template": value}))
        with pytest.raises(TokenizerError):
            Template(template)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000, "\ufeff{}"])
def test_other_json(template, name, text):
    (template / name).write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"\.json|tokenizer"):
        Template(template)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen2"])
def test_fifos_are_not_opened(request, family, name):
    folder = request.getfixturevalue("harmony" if family == "gpt_oss" else "template")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(TokenizerError, match="FIFO"):
        load_chat_format(folder, family)


@pytest.mark.parametrize("name", ["tokenizer.model", "o200k_base.tiktoken", "special_tokens_map.json", "added_tokens.json", "merges.txt"])
def test_fifos_of_other_files_are_not_opened(template, name):
    os.mkfifo(template / name)
    for family in ("gpt_oss", "qwen2"):
        with pytest.raises(TokenizerError, match="FIFO"):
            load_chat_format(template, family)


def test_a_folder_of_the_cache_leads_to_its_snapshot(tmp_path):
    (tmp_path / "models--a--b" / "snapshots" / "0123").mkdir(parents=True)
    for family in ("gpt_oss", "qwen2"):
        with pytest.raises((TokenizerError, ConfigError), match="snapshots/0123"):
            load_chat_format(tmp_path / "models--a--b", family)
