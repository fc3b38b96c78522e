"""The chat format follows from the weights, and settings without an effect on it are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from discover_jax import config as settings
from discover_jax.exceptions import ConfigError, TokenizerError
from discover_jax.models.config import ModelConfig
from discover_jax.policy import APPRENTICE, check_chat_format
from discover_jax.text.formats import family_of, load_chat_format
from discover_jax.text.harmony import Harmony
from discover_jax.text.template import Template


def test_family_determines_the_format(chat_folder, hugging_face_folder):
    assert isinstance(load_chat_format(hugging_face_folder, "gpt_oss", "high"), Harmony)
    assert isinstance(load_chat_format(chat_folder("qwen2.5"), "qwen2"), Template)
    with pytest.raises(ConfigError, match=r"config\.prompt\.reasoning_effort = 'high'.*'qwen2'"):
        load_chat_format(chat_folder("qwen2.5"), "qwen2", "high")


def test_family_is_the_model_type(tmp_path):
    assert family_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert family_of(tmp_path) == "qwen3"
    (tmp_path / "config.json").write_text('{"num_experts": 32}')
    assert family_of(tmp_path) == "gpt_oss"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config\.json"):
        family_of(tmp_path)


def test_stop_ids_of_harmony_are_those_of_both_folders(hugging_face_folder, tmp_path):
    tokenizer = Path(shutil.copytree(hugging_face_folder, tmp_path / "tokenizer"))
    weights = tmp_path / "weights"
    weights.mkdir()
    chat = load_chat_format(tokenizer, "gpt_oss", weights=weights)
    (stop,) = chat.stop_ids
    assert load_chat_format(tokenizer, "gpt_oss").stop_ids == (stop,)
    call, end_of_text = (chat.tokenizer.special(name) for name in ("<|call|>", "<|endoftext|>"))
    (weights / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, end_of_text, call]}))
    assert load_chat_format(tokenizer, "gpt_oss", weights=weights).stop_ids == tuple(sorted((stop, end_of_text, call)))
    (weights / "generation_config.json").write_text(json.dumps({"eos_token_id": call}))
    (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, end_of_text]}))
    assert load_chat_format(tokenizer, "gpt_oss", weights=weights).stop_ids == tuple(sorted((stop, end_of_text, call)))
    for wrong in (True, "1", [None], [1.0], {}, -1, [2**40], [[1]], ["<|call|>"]):
        (weights / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(TokenizerError, match=r"generation_config\.json.*eos_token_id"):
            load_chat_format(tokenizer, "gpt_oss", weights=weights)
    (weights / "generation_config.json").unlink()
    os.mkfifo(weights / "generation_config.json")
    with pytest.raises(TokenizerError, match="FIFO"):
        load_chat_format(tokenizer, "gpt_oss", weights=weights)


@pytest.mark.parametrize("value", [None, 3, [], ["gpt_oss"], {}])
def test_a_model_type_that_is_not_a_text(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": value}))
    with pytest.raises(TokenizerError, match="model_type"):
        family_of(tmp_path)


@pytest.fixture
def folder(write_chat_folder, tmp_path):
    """The folder of a Qwen2.5, as far as its chat format needs it."""
    folder = write_chat_folder(tmp_path / "model", "qwen2.5")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def checked(weights, vocab_size=4096, **changes):
    config = settings.default_config()
    config.model.weights = str(weights)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    family = "gpt_oss" if weights in (APPRENTICE, "random") else "qwen2"
    return check_chat_format(config, ModelConfig(2, 32, 2, 1, 16, 4, 2, 32, vocab_size, family=family))


def test_chat_format_of_a_policy(folder):
    assert isinstance(checked(APPRENTICE), Harmony)
    assert isinstance(checked(folder), Template)
    # Weights with a tokenizer elsewhere keep their format; random weights have that of the tokenizer.
    assert isinstance(checked("random", model__tokenizer=str(folder)), Template)
    assert isinstance(checked("random", model__tokenizer=str(APPRENTICE)), Harmony)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        checked(folder, model__tokenizer=str(APPRENTICE))


def test_settings_without_an_effect_are_refused(folder):
    with pytest.raises(ConfigError, match="reasoning_effort"):
        checked(folder, prompt__reasoning_effort="low")
    with pytest.raises(ConfigError, match="thinking_tokens"):
        checked(folder, sampling__thinking_tokens=100)
    assert checked(APPRENTICE, prompt__reasoning_effort="low", sampling__thinking_tokens=100).stop_ids


def test_ids_that_the_model_does_not_have(folder):
    with pytest.raises(TokenizerError, match=r"model\.tokenizer"):
        checked(folder, vocab_size=300)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5000}))
    with pytest.raises(TokenizerError, match=r"\b5000\b.*4,096"):
        checked(folder)
