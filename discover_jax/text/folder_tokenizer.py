"""The tokenizer of a Hugging Face folder as `transformers` loads it, with the folder's chat template. Nothing is downloaded."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import TokenizerError
from discover_jax.published import check_regular, folder_hint, is_there, read_object, show

_PROBE = "  def run():\n\treturn  1 \r\n\u00e9\U0001f680 <|end|>\n"
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_READ = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Endings of the files that belong to a tokenizer."""
"""Unicode's characters for private use: more of them than a prompt has room for."""


class FolderTokenizer:
    """A `Tokenizer` that can also encode a rendered chat template. Can be pickled.

    Added tokens are the entries of tokenizer.json's `added_tokens` except white space, such as <|im_end|> and <think>. `encode` never
    returns one. Text survives a round trip up to the tokenizer's own normalisation; Qwen's is Unicode NFC.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Reads tokenizer.json and, if there, tokenizer_config.json and chat_template.jinja.

        Raises:
          TokenizerError: a file is missing or damaged, needs a download or code of its own, or encodes ordinary text as an added token.
        """
        self.folder = Path(folder)
        self._model = _load(self.folder)
        self._added = _added_tokens(self.folder / "tokenizer.json", self._model)
        self._added_ids = frozenset(self._added.values())
        self._size = max(self._model.get_vocab().values()) + 1
        flagged = {index for index, token in self._model.added_tokens_decoder.items() if token.special}
        self._special_ids = flagged | set(self._model.all_special_ids)
        # The first character of each name of an added token.
        self._name = re.compile(f"(?=({'|'.join(map(re.escape, self._added)) or '(?!)'}))(.)", re.DOTALL)
        self._markup = self._model.backend_tokenizer
        self._markup.no_truncation()
        self._markup.no_padding()
        self._markup.encode_special_tokens = False
        self._ordinary = _without(self._added, self._markup)
        for text in [*self._added, _PROBE]:
            ids = self.encode(text)
            if self._added_ids & set(ids) or self.decode(ids) != text:
                raise TokenizerError(
                    f"{self.folder / 'tokenizer.json'} cannot keep the ordinary text {text!r}: it becomes {ids} and comes back as"
                    f" {self.decode(ids)!r}. Use a byte-level tokenizer, as Qwen and Llama 3 have."
                )

    def __reduce__(self):
        return FolderTokenizer, (self.folder,)

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token that tokenizer_config.json names."""
        return self._model.eos_token_id

    @property
    def added(self) -> Mapping[str, int]:
        """Ids of the added tokens by name."""
        return self._added

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The folder's chat templates by name; a single one is called "default"."""
        templates = self._model.chat_template
        named = {"default": templates} if isinstance(templates, str) else templates or {}
        if not isinstance(named, dict) or not all(isinstance(text, str) for item in named.items() for text in item):
            raise TokenizerError(
                f"The chat_template of {self.folder} is {show(templates)}; it must be a text, or texts by name. Copy tokenizer_config.json"
                " again from where the weights were published."
            )
        return named

    def encode(self, text: str) -> list[int]:
        return self._ordinary.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Added tokens that are not flagged as special give their names, as in transformers; special tokens give no text."""
        kept = [int(i) for i in ids if 0 <= i < self._size and int(i) not in self._special_ids]
        return self._markup.decode(kept, skip_special_tokens=False)

    def special(self, name: str) -> int:
        if name not in self._added:
            raise TokenizerError(f"{name!r} is not an added token of {self.folder / 'tokenizer.json'}.")
        return self._added[name]

    def apply_template(self, template: str, messages: Sequence[Mapping[str, str]], *, reply_follows: bool) -> str:
        """The text of a chat template for these messages. Exceptions are those of the template."""
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": reply_follows}
        return self._model.apply_chat_template(list(messages), **options)

    def template_ids(self, text: str) -> list[int]:
        """Ids of `apply_template`'s text, where every name of an added token is one, as in transformers."""
        return self._markup.encode(text, add_special_tokens=False).ids

    def protect(self, text: str, mark: str) -> str:
        """Ordinary text for `apply_template`: `mark` breaks every name of an added token, so that `encode_markup` does not see it."""
        return self._name.sub(lambda found: found.group(2) + mark, text)

    def encode_markup(self, text: str, mark: str = "") -> list[int]:
        """Ids of a text in which names of added tokens stand for these tokens. The rest is ordinary text; `mark` is removed."""
        encoding = self._markup.encode(text, add_special_tokens=False)
        ids: list[int] = []
        begin = 0
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index in self._added_ids:
                ids += [*self.encode(_strip(text[begin:start], mark)), index]
                begin = end
        return ids + self.encode(_strip(text[begin:], mark))


def unused_mark(text: str) -> str:
    """A character for private use that the text does not contain."""
    used = set(text)
    return next(mark for mark in map(chr, _PRIVATE_USE) if mark not in used)


def _strip(text: str, mark: str) -> str:
    return text.replace(mark, "") if mark else text


def _added_tokens(path: Path, model: Any) -> dict[str, int]:
    """Ids of the added tokens except white space, which templates use as ordinary text.

    Raises:
      TokenizerError: transformers gives them other ids than the file.
    """
    added = model.get_added_vocab()
    written = written_tokens(path)
    if moved := {name: index for name, index in written.items() if added.get(name) != index}:
        raise TokenizerError(
            f"{path}: transformers gives the added tokens {', '.join(moved)} other ids. List every id after the vocabulary, with unused ids"
            " as reserved tokens."
        )
    return {name: index for name, index in added.items() if not name.isspace()}


def _without(added: Mapping[str, int], backend: Any) -> Any:
    """The same tokenizer, but it encodes the names of these added tokens as ordinary text."""
    import tokenizers

    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in added  # the next option affects only special tokens
    ordinary = tokenizers.Tokenizer.from_str(json.dumps(state))
    ordinary.encode_special_tokens = True
    return ordinary


def _load(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not is_there(path):
        there = ", ".join(sorted(path.name for path in folder.glob("*"))[:20]) or "nothing"
        raise TokenizerError(
            f"There is no tokenizer at {path}; found: {there}.{folder_hint(folder)} Copy tokenizer.json and tokenizer_config.json there"
            " from where the weights were published, or set config.model.tokenizer to a folder that contains them."
        )
    check_files(folder)
    read_json(path)
    if (folder / "tokenizer_config.json").is_file() and "auto_map" in read_json(folder / "tokenizer_config.json"):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'} names code of its own (auto_map), which would be downloaded and run. Use a folder whose"
            " tokenizer is part of transformers, as those of Qwen and Llama are."
        )
    import transformers

    try:
        model = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer's parser raises its own; some raise Exception itself
        raise TokenizerError(
            f"transformers cannot load the tokenizer of {folder} from its files ({_first_line(error)}). Copy tokenizer.json,"
            " tokenizer_config.json and config.json again from where the weights were published."
        ) from error
    if not model.is_fast:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'} asks for {type(model).__name__}, which does not read tokenizer.json. Set its"
            " tokenizer_class to 'PreTrainedTokenizerFast'."
        )
    return model


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
      TokenizerError: it is not a JSON object.
    """
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"Cannot read {path}: {error}. Copy it again from where the weights were published.") from error


def check_files(folder: Path) -> None:
    """Checks that all files of a folder that a tokenizer's loader may open are regular: a FIFO would let it wait forever.

    Raises:
      TokenizerError: one is not.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ and not file.name.startswith(".") and not file.is_dir():
            try:
                check_regular(file)
            except OSError as error:
                raise TokenizerError(f"Cannot read {file}: {error}. Copy it again from where the weights were published.") from error


def written_tokens(path: Path) -> dict[str, int]:
    """The ids of the added tokens in a tokenizer.json, by name; none if it has no list of them.

    Raises:
      TokenizerError: the file is damaged, or the list has another shape.
    """
    tokens = read_json(path).get("added_tokens")
    if tokens is not None and not isinstance(tokens, list):
        raise TokenizerError(f"{path} has added_tokens = {show(tokens)}; it must be a list. Copy the published file.")
    written: dict[str, int] = {}
    for token in tokens or ():
        name, index = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(index, int) or isinstance(index, bool):
            raise TokenizerError(
                f"{path} has an added token without a text `content` and an integer `id`: {show(token)}. Copy the published file."
            )
        written[name] = index
    return written


def read_stop_ids(folder: Path) -> list[int]:
    """The end-of-text ids of generation_config.json; none without the file.

    Raises:
      TokenizerError: the file is damaged.
    """
    path = folder / "generation_config.json"
    if not is_there(path):
        return []
    found = read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 2**31 for index in ids):
        raise TokenizerError(f"{path} has eos_token_id = {show(found)}; it must be an id or a list of ids. Copy the published file.")
    return ids


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
