"""tokenizer.json, tokenizer_config.json and generation_config.json of a GGUF file's model.

A GGUF file stores the vocabulary, the merges, and the name of the rule that splits text before the merges apply. The rules are those of the
published tokenizer.json files of each family.
"""

import dataclasses
import json
from collections import Counter
from typing import Any

from tokenizers import Tokenizer

from discover_jax.exceptions import TokenizerError, WeightsError
from discover_jax.models.gguf_file import GgufFile

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Token types: always one token in a text and hidden in replies; always one token; padding of the vocabulary."""

_STOP_TOKENS = frozenset({"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"})
"""Texts of control tokens that end a reply. The metadata names only one to three ids, so llama.cpp (llama-vocab.cpp) also goes by texts."""

_SPECIALS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
"""Names in tokenizer_config.json, and in the metadata."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class _Splitting:
    """How a tokenizer prepares text for its merges.

    Attributes:
      normalizer, steps: as in tokenizer.json. `steps` is followed by, or ends with, the step to bytes.
      whole_words: a word that is in the vocabulary is one token, whatever the merges say.
      add_bos: whether texts start with the first token if the metadata does not say so.
    """

    normalizer: dict[str, Any] | None
    steps: tuple[dict[str, Any], ...]
    whole_words: bool = False
    add_bos: bool = False


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split_words(digits: str) -> tuple[dict[str, Any], ...]:
    regex = {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False}
    return regex, _byte_level(use_regex=False)


_LLAMA3 = _Splitting(None, _split_words(r"\p{N}{1,3}"), whole_words=True, add_bos=True)
SPLITTINGS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Splitting({"type": "NFC"}, _split_words(r"\p{N}")),
    "smollm": _Splitting(None, ({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))),
}
"""Supported values of tokenizer.ggml.pre."""


def read_vocabulary(file: GgufFile) -> tuple[list[str], list[int]]:
    """The texts and types of all tokens, by id.

    Raises:
      WeightsError: the metadata lacks one of them, they have items of a wrong type, or they differ in length.
    """
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", list)
    _check_items(file, "tokenizer.ggml.tokens", tokens, str, "texts")
    _check_items(file, "tokenizer.ggml.token_type", types, int, "integers")
    if len(tokens) != len(types):
        raise WeightsError(f"{file.path} has {len(tokens)} tokens and {len(types)} token types; download the file again.")
    return tokens, types


def read_generation_config(file: GgufFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Content of generation_config.json: ids of the first, the padding and all end-of-text tokens.

    Raises:
      TokenizerError: the metadata names no end-of-text token, or an id outside the vocabulary.
    """
    ids = {name: _special_id(file, name, tokens) for name in ("bos", "eos", "eot", "eom", "padding")}
    if ids["eos"] is None:
        raise TokenizerError(
            f"{file.path} lacks the metadata key 'tokenizer.ggml.eos_token_id', so a reply has no end. Convert the model again."
        )
    stops = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    stops += [index for index, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL and text in _STOP_TOKENS]
    named = {"bos_token_id": ids["bos"], "eos_token_id": list(dict.fromkeys(stops)), "pad_token_id": ids["padding"]}
    return {name: value for name, value in named.items() if value is not None}


def build_tokenizer(file: GgufFile, tokens: list[str], types: list[int]) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json, by file name.

    Raises:
      TokenizerError: the tokenizer's kind or splitting is not supported, or the vocabulary and the merges contradict each other.
      WeightsError: the metadata lacks a key.
    """
    splitting = _read_splitting(file)
    ends = {name: _special_id(file, key, tokens) for name, key in _SPECIALS.items()}
    add_bos = file.get("tokenizer.ggml.add_bos_token", bool, splitting.add_bos)
    add_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)
    around = [ends["bos_token"] if add_bos else None, ends["eos_token"] if add_eos else None]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, text, special=kind == _CONTROL)
            for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": splitting.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(splitting.steps)},
        "post_processor": _post_processor(around, tokens),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitting.whole_words,
            "vocab": _vocabulary(file, tokens, types),
            "merges": _merges(file),
        },
    }
    text = json.dumps(content, ensure_ascii=False)
    try:
        built = Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"{file.path}: its vocabulary and merges give no tokenizer: {error}. Download the file again.") from error
    changed = [added["id"] for added in content["added_tokens"] if built.token_to_id(added["content"]) != added["id"]]
    assert not changed, f"added tokens changed their ids: {changed[:5]}"
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": json.dumps(_tokenizer_config(file, tokens, ends), indent=2, ensure_ascii=False),
    }


def _read_splitting(file: GgufFile) -> _Splitting:
    if (kind := file.get("tokenizer.ggml.model", str)) != "gpt2":
        raise TokenizerError(f"{file.path} has a tokenizer of kind {kind!r}. Supported: 'gpt2' (byte-level BPE).")
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in SPLITTINGS:
        raise TokenizerError(
            f"{file.path}: tokenizer.ggml.pre, the rule that splits text, is {name!r}. Supported: {', '.join(SPLITTINGS)}. Use the"
            " tokenizer of the model's Hugging Face folder, or convert the model again with a current llama.cpp."
        )
    return SPLITTINGS[name]


def _special_id(file: GgufFile, name: str, tokens: list[str]) -> int | None:
    """The id that the metadata gives for a special token such as "eos"; None if there is none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if not file.has(key):
        return None
    if not 0 <= (index := file.get(key, int)) < len(tokens):
        raise TokenizerError(f"{file.path}: {key} is {index}, but the vocabulary has {len(tokens)} tokens. Download the file again.")
    return index


def _vocabulary(file: GgufFile, tokens: list[str], types: list[int]) -> dict[str, int]:
    """Ids by text, without padding such as [PAD151665]."""
    used = [(text, index) for index, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED]
    vocabulary = dict(used)
    if len(vocabulary) < len(used):
        twice = [text for text, count in Counter(text for text, _ in used).items() if count > 1]
        raise TokenizerError(f"{file.path} has {len(twice)} tokens more than once, such as {twice[0]!r}. Download the file again.")
    return vocabulary


def _check_items(file: GgufFile, key: str, items: list[Any], kind: type, allowed: str) -> None:
    if wrong := [item for item in items if type(item) is not kind]:
        raise WeightsError(f"{file.path}: {key} must be a list of {allowed}; got {str(wrong[0])[:60]!r} in it. Download the file again.")


def _merges(file: GgufFile) -> list[list[str]]:
    stored = file.get("tokenizer.ggml.merges", list)
    _check_items(file, "tokenizer.ggml.merges", stored, str, "texts")
    merges = [merge.split(" ") for merge in stored]
    if wrong := [merge for merge in merges if len(merge) != 2]:
        raise TokenizerError(f"{file.path} has {len(wrong)} merges that are not two texts, such as {' '.join(wrong[0])!r}.")
    return merges


def _added_token(index: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **flags, "special": special}


def _post_processor(around: list[int | None], tokens: list[str]) -> dict[str, Any]:
    """Adds the first and the last token to a text, if there are such ids."""
    if around == [None, None]:
        return _byte_level(use_regex=True)
    first, last = ([] if index is None else [{"SpecialToken": {"id": tokens[index], "type_id": 0}}] for index in around)
    used = sorted({index for index in around if index is not None})
    template = {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last],
        "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last, *first, {"Sequence": {"id": "B", "type_id": 1}}, *last],
        "special_tokens": {tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]} for index in used},
    }
    return {"type": "Sequence", "processors": [_byte_level(use_regex=True), template]}


def _tokenizer_config(file: GgufFile, tokens: list[str], ends: dict[str, int | None]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": file.get(f"{file.get('general.architecture', str)}.context_length", int),
    }
    config |= {name: tokens[index] for name, index in ends.items() if index is not None}
    if file.has("tokenizer.chat_template"):
        config["chat_template"] = file.get("tokenizer.chat_template", str)
    return config
