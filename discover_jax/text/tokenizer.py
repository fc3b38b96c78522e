"""Tokenizers with one small interface: SentencePiece for the apprentice; `tokenizer.json` or its ranks for gpt-oss.

All of them separate ordinary text from the chat format's special tokens. `encode` never returns a special id, so a program or a dataset
that contains "<|end|>" cannot end a message. Only `special` returns special ids.
"""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from discover_jax.exceptions import TokenizerError
from discover_jax.extras import install_command
from discover_jax.published import folder_hint
from discover_jax.text.folder_tokenizer import check_files, written_tokens

# Names of OpenAI's harmony chat format (o200k_harmony). A tokenizer must have all of them.
SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)

RANKS_FILE = "o200k_base.tiktoken"
_O200K_SIZE = 201_088  # vocabulary of the model; the package has one more reserved token
_RANKS_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"
# The package takes quadratic time for a run of characters, and fails at a million of them.
_LONGEST_RUN = 1000
_RUN = re.compile(rf"\s{{1,{_LONGEST_RUN}}}|\S{{1,{_LONGEST_RUN}}}")


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as used by prompts, parsing and the apprentice's trainer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, never a special id. `decode(encode(text)) == text` for any text that UTF-8 can encode."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ordinary ids; bytes that are not UTF-8 become U+FFFD. Special ids and ids outside the vocabulary give no text."""
        ...

    def special(self, name: str) -> int:
        """Id of one of SPECIAL_TOKENS. Raises TokenizerError for any other name."""
        ...


# SentencePiece encodes a space as this mark, so it would decode a mark in the text as a space.
_SPACE_MARK = "\u2581"
_ROUND_TRIP_PROBE = "  def run():\n\treturn  1 \r\n\u00e9\U0001f680 <|end|>\n"


class SentencePieceTokenizer:
    """A SentencePiece model whose special tokens are control pieces. Can be pickled.

    The model must keep text as it is: trained with `byte_fallback=True`, `normalization_rule_name="identity"`, `add_dummy_prefix=False`,
    `remove_extra_whitespaces=False`, and SPECIAL_TOKENS as `control_symbols`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads `path`, a `tokenizer.model`.

        Raises:
          TokenizerError: the file is missing or damaged, lacks a special token, or changes text in a round trip.
        """
        import sentencepiece

        self._path = Path(path)
        if not self._path.is_file():
            raise TokenizerError(f"There is no SentencePiece model at {self._path}. Give the folder with `tokenizer.model`.")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(self._path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{self._path} is not a SentencePiece model ({error}). Copy or train it again.") from error
        self._special: dict[str, int] = {}
        for name in SPECIAL_TOKENS:
            index = self._model.piece_to_id(name)
            # A missing piece has the id of the unknown piece. A user-defined piece would match ordinary text.
            if self._model.id_to_piece(index) != name or not self._model.is_control(index):
                raise TokenizerError(
                    f"{self._path} has no control piece {name!r}, which the chat format needs. Train the model with"
                    f" control_symbols={list(SPECIAL_TOKENS)}."
                )
            self._special[name] = index
        self._byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        if self.decode(self.encode(_ROUND_TRIP_PROBE)) != _ROUND_TRIP_PROBE:
            raise TokenizerError(
                f"{self._path} changes text: {_ROUND_TRIP_PROBE!r} comes back as {self.decode(self.encode(_ROUND_TRIP_PROBE))!r}. Train it"
                ' with byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False.'
            )

    def __reduce__(self):
        return SentencePieceTokenizer, (self._path,)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(_SPACE_MARK)
        ids = self._model.encode(first)
        for part in rest:
            ids += self._byte_ids
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        size = self._model.vocab_size()
        return self._model.decode([int(i) for i in ids if 0 <= i < size and not self._model.is_control(int(i))])

    def special(self, name: str) -> int:
        return _lookup(self._special, name)


def _lookup(table: dict[str, int], name: str) -> int:
    if name not in table:
        raise TokenizerError(f"{name!r} is not a special token of the chat format; allowed: {', '.join(SPECIAL_TOKENS)}.")
    return table[name]


class HuggingFaceTokenizer:
    """A `tokenizer.json`, such as gpt-oss's, through transformers. Can be pickled."""

    def __init__(self, path: str | os.PathLike[str]):
        """Reads `path`, a `tokenizer.json`.

        Raises:
          TokenizerError: the file is missing or damaged, lacks a special token, encodes ordinary text as one, or changes text.
        """
        from transformers import PreTrainedTokenizerFast

        self._path = Path(path)
        if not self._path.is_file():
            raise TokenizerError(f"There is no tokenizer at {self._path}. Give the folder with `tokenizer.json`.")
        try:
            self._model = PreTrainedTokenizerFast(tokenizer_file=str(self._path))
        except Exception as error:  # the parser, written in Rust, raises Exception itself
            raise TokenizerError(f"{self._path} is not a tokenizer that transformers can read ({error}). Copy it again.") from error
        added = self._model.get_added_vocab()
        # transformers renumbers added tokens if their ids have gaps; the model would then get wrong tokens.
        written = written_tokens(self._path)
        if moved := {name: index for name, index in written.items() if added.get(name) != index}:
            raise TokenizerError(
                f"{self._path}: transformers gives the added tokens {moved} other ids. List every id after the vocabulary, with"
                " unused ids as reserved tokens, as gpt-oss's tokenizer.json does."
            )
        missing = [name for name in SPECIAL_TOKENS if name not in added]
        if missing:
            raise TokenizerError(
                f"{self._path} lacks the special tokens {', '.join(missing)}, which the chat format needs. Use gpt-oss's tokenizer.json."
            )
        self._special = {name: added[name] for name in SPECIAL_TOKENS}
        self._added_ids = frozenset(added.values())
        self._size = max(self._model.get_vocab().values()) + 1
        for text in [*added, _ROUND_TRIP_PROBE]:
            ids = self.encode(text)
            if self._added_ids & set(ids) or self.decode(ids) != text:
                raise TokenizerError(
                    f"{self._path} cannot keep the ordinary text {text!r}: it becomes {ids} and comes back as {self.decode(ids)!r}. Use a"
                    " byte-level tokenizer whose added tokens are all marked as special."
                )

    def __reduce__(self):
        return HuggingFaceTokenizer, (self._path,)

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        # split_special_tokens: names of special tokens in a text are ordinary text.
        return self._model.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        ordinary = [int(i) for i in ids if 0 <= i < self._size and int(i) not in self._added_ids]
        return str(self._model.decode(ordinary, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def special(self, name: str) -> int:
        return _lookup(self._special, name)


class O200kTokenizer:
    """gpt-oss's tokenizer from its ranks, the published file o200k_base.tiktoken, through openai-harmony. Can be pickled."""

    def __init__(self, path: str | os.PathLike[str]):
        """Reads `path`, an `o200k_base.tiktoken`.

        Raises:
          TokenizerError: openai-harmony is not installed, or the file is missing or altered.
        """
        self._path = Path(path)
        if not self._path.is_file():
            raise TokenizerError(f"There is no ranks file at {self._path}. Give the folder with `{RANKS_FILE}`.")
        try:
            import openai_harmony
        except ImportError as error:
            raise TokenizerError(
                f"Reading {self._path} needs openai-harmony, which is not installed. Run {install_command('harmony')}, or"
                " give the folder with gpt-oss's tokenizer.json."
            ) from error
        # The package finds the file by this variable and would download it otherwise. It verifies the file's checksum.
        before = os.environ.get(_RANKS_VARIABLE)
        os.environ[_RANKS_VARIABLE] = str(self._path.parent)
        try:
            self._model = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
        except openai_harmony.HarmonyError as error:
            raise TokenizerError(f"{self._path} is not the published o200k_base.tiktoken ({error}). Download it again.") from error
        finally:
            del os.environ[_RANKS_VARIABLE]
            if before is not None:
                os.environ[_RANKS_VARIABLE] = before
        self._special = {name: self._model.encode(name, allowed_special="all")[0] for name in SPECIAL_TOKENS}
        self._special_ids = frozenset(self._model.encode(name, allowed_special="all")[0] for name in self._model.special_tokens_set)

    def __reduce__(self):
        return O200kTokenizer, (self._path,)

    @property
    def vocab_size(self) -> int:
        return _O200K_SIZE

    def encode(self, text: str) -> list[int]:
        """A run of characters that is longer than `_LONGEST_RUN` is encoded in parts."""
        return [index for part in _parts(text) for index in self._model.encode(part, disallowed_special=())]

    def decode(self, ids: Sequence[int]) -> str:
        size = self.vocab_size
        return self._model.decode([int(i) for i in ids if 0 <= i < size and int(i) not in self._special_ids])

    def special(self, name: str) -> int:
        return _lookup(self._special, name)


def _parts(text: str) -> list[str]:
    """The text, cut where a run of white space or of other characters is too long."""
    ends = [run.end() for run in _RUN.finditer(text) if run.end() - run.start() == _LONGEST_RUN]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from the first of these files: `tokenizer.model` (the apprentice), `tokenizer.json` (gpt-oss),
    `o200k_base.tiktoken` (gpt-oss's published ranks).

    Raises:
      TokenizerError: there is none, or it is invalid (see the classes).
    """
    folder = Path(folder)
    if folder.is_dir():
        check_files(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(folder / "tokenizer.json")
    if (folder / RANKS_FILE).is_file():
        return O200kTokenizer(folder / RANKS_FILE)
    there = ", ".join(sorted(path.name for path in folder.glob("*"))[:20]) or "nothing"
    raise TokenizerError(
        f"There is no tokenizer in {folder}: looked for tokenizer.model (SentencePiece), tokenizer.json (Hugging Face) and {RANKS_FILE};"
        f" found: {there}.{folder_hint(folder)}"
        " Copy one of them there, or set config.model.tokenizer to the folder that holds it."
    )
