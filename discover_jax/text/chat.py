"""The interface of chat formats: how a prompt becomes token ids, and how the reply's ids are read.

Implementations: `harmony.Harmony` for gpt-oss, `template.Template` for folders with a chat template. `formats` chooses one.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol

from discover_jax.text.tokenizer import Tokenizer

DATE = "2025-08-05"
""""Current date" in prompts of formats that state one. It is fixed, so that equal runs have equal prompts."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A prompt: `ids`, after which the model's reply follows, and `text`, the same with the names of special tokens."""

    ids: tuple[int, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """The reply of the policy.

    Attributes:
      thinking: its thinking; several parts are joined by blank lines.
      final: its answer; None if there is none.
      truncated: whether the token budget cut the answer or, without an answer, the reply.
      earlier: answers before it, the last one first.
      unmarked: texts that are neither marked as thinking nor as an answer, the last one first, such as a message in no known channel.
    """

    thinking: str
    final: str | None
    truncated: bool
    earlier: tuple[str, ...] = ()
    unmarked: tuple[str, ...] = ()


class ChatFormat(Protocol):
    """A chat format with its tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        ...

    @property
    def names(self) -> Collection[str]:
        """Names of the tokens that structure messages. They are replaced in output that prompts show."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply, in ascending order; at least one."""
        ...

    def describe(self) -> str:
        """The format in a few words."""
        ...

    def render(self, request: str, instructions: str = "") -> Rendered:
        """The prompt of a conversation with one message of the user. Both arguments are ordinary text: names of special tokens in them
        do not become special tokens.

        Args:
          request: the user's message.
          instructions: the system prompt; empty for none.
        """
        ...

    def parse(self, ids: Sequence[int]) -> Reply:
        """Parses the ids after a prompt. Any sequence of ids gives a Reply. Ids after a stop id have no effect."""
        ...

    def answer_opening(self) -> tuple[int, ...]:
        """The ids with which an answer begins after the thinking.

        Raises:
          ConfigError: the format has no thinking that could be ended.
        """
        ...

    def answer_forced(self, closing: str) -> tuple[int, ...]:
        """The ids that end unfinished thinking with the text `closing` and begin the answer; the last ones are `answer_opening`.

        Raises:
          ConfigError: the format has no thinking that could be ended.
        """
        ...
