"""The harmony chat format of gpt-oss: messages to token ids, and generated ids to replies.

Source: OpenAI's published harmony format. Rendering matches the official `openai-harmony` package (tests/text/golden).
A message is <|start|>{role}[<|channel|>{channel}]<|message|>{content}<|end|>; the model continues after <|start|>assistant, thinks in the
channel `analysis`, answers in `final`, and ends with <|return|>.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Sequence

from discover_jax.exceptions import ConfigError, TokenizerError
from discover_jax.text.chat import DATE, Rendered, Reply
from discover_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

REASONING_EFFORTS = ("low", "medium", "high")
DEFAULT_EFFORT = "medium"
STOP_TOKEN = "<|return|>"

ROLES = ("system", "developer", "user", "assistant")
CHANNELS = ("analysis", "commentary", "final")
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_WITHIN = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>")
"""Special tokens that cannot end a reply: every reply has them before its answer."""
_THINKING = ("analysis", "thinking", "thoughts", "reasoning", "scratchpad")
"""Names of channels that hold thinking. Only the first one belongs to the format."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. Only assistant messages have a channel. The content is always ordinary text."""

    role: str
    content: str
    channel: str | None = None

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"The role {self.role!r} is not known; allowed: {', '.join(ROLES)}.")
        if self.channel is not None and (self.role != "assistant" or self.channel not in CHANNELS):
            raise ValueError(
                f"A message of role {self.role!r} in channel {self.channel!r}: only `assistant` speaks in {', '.join(CHANNELS)}."
            )


def system_message(reasoning_effort: str, date: str, channels: Sequence[str] = CHANNELS) -> Message:
    """gpt-oss's system message, with the exact text of its training.

    Args:
      reasoning_effort: "low", "medium" or "high".
      date: its "current date", such as "2025-08-05"; fixed, so that equal runs have equal prompts.
      channels: channels that the model may use.
    """
    return Message(
        "system",
        "You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n"
        f"Current date: {date}\n\n"
        f"Reasoning: {reasoning_effort}\n\n"
        f"# Valid channels: {', '.join(channels)}. Channel must be included for every message.",
    )


def developer_message(instructions: str) -> Message:
    """The message with the instructions; other formats call it the system prompt."""
    return Message("developer", f"# Instructions\n\n{instructions}")


def _pieces(messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """The format as (text, whether it is a special token)."""
    for message in messages:
        yield "<|start|>", True
        yield message.role, False
        if message.channel is not None:
            yield "<|channel|>", True
            yield message.channel, False
        yield "<|message|>", True
        yield message.content, False
        yield "<|end|>", True
    yield "<|start|>", True
    yield "assistant", False


def render(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation. They end in <|start|>assistant, so the assistant's next message follows.

    All messages are kept. The official renderer drops the thinking before earlier answers, but these prompts have none.
    """
    ids: list[int] = []
    for text, special in _pieces(messages):
        ids += [tokenizer.special(text)] if special else tokenizer.encode(text)
    return ids


def render_text(messages: Sequence[Message]) -> str:
    """The conversation as text, with the names of special tokens."""
    return "".join(text for text, _ in _pieces(messages))


def answer_opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids with which an answer begins: <|channel|>final<|message|>."""
    return tokenizer.special("<|channel|>"), *tokenizer.encode("final"), tokenizer.special("<|message|>")


def answer_forced(closing: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end unfinished thinking and begin the answer: `closing`, <|end|><|start|>assistant and the answer's opening."""
    start = tokenizer.special("<|end|>"), tokenizer.special("<|start|>")
    return *tokenizer.encode(closing), *start, *tokenizer.encode("assistant"), *answer_opening(tokenizer)


def parse(ids: Sequence[int], tokenizer: Tokenizer, stop_ids: Collection[int] = ()) -> Reply:
    """Parses the ids after <|start|>assistant. Any sequence of ids gives a Reply; ids that violate the format are skipped.

    A message opens at <|message|>, in the channel that its header names. It closes at <|end|>, <|call|> or <|return|>, or at the next
    header (<|start|> or <|channel|>). <|return|> and `stop_ids` end the reply. Other special tokens are ignored.

    The assistant's texts in no channel or in another one than `analysis` and `final` are unmarked. So are those that follow a header
    without <|message|>.
    """
    parser = _Parser(tokenizer)
    ended = False
    for token in map(int, ids):
        name = parser.name_of.get(token)
        ended = name in _ENDS or token in stop_ids
        if ended and name is None:
            parser.close()
        else:
            parser.feed(token, name)
        if name == "<|return|>" or token in stop_ids:
            break
    return parser.reply(ended=ended)


class _Parser:
    """The state of parsing a reply: the open header or message, and the texts of closed ones."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.name_of = {tokenizer.special(name): name for name in ("<|start|>", "<|channel|>", "<|message|>", *_ENDS)}
        self._role = "assistant"
        self._channel: str | None = None  # of the open message; None outside of one
        self._header = ""  # special token that begins the open header; empty at the beginning and after a message
        self._ids: list[int] = []  # of the open header or message
        self._thinking: list[str] = []
        self._finals: list[str] = []
        self._unmarked: list[str] = []

    def feed(self, token: int, name: str | None) -> None:
        """Takes an ordinary token, or a special one with its name."""
        if name is None:
            self._ids.append(token)
        elif name != "<|message|>":
            if name == "<|channel|>" and self._header == "<|start|>":
                self._take_role()
            self.close()
            self._header = name if name in ("<|start|>", "<|channel|>") else ""
        elif self._channel is None:
            # A header may continue after the channel: "commentary to=tool", "final <|constrain|>json".
            if self._header != "<|channel|>":
                self._take_role()
            words = self._text().split() if self._header == "<|channel|>" else []
            self._channel, self._ids = words[0] if words else "", []

    def close(self) -> None:
        """Ends the open message, or the header if no message followed it."""
        text, self._ids = self._text(), []
        if self._channel is not None:
            self._keep(self._channel, text)
        elif self._header == "<|channel|>":
            channel = re.split(r"[\s`~]", text.lstrip(), maxsplit=1)[0]
            if _is_answer(channel):
                self._keep_unmarked(text.lstrip().removeprefix(channel))
        elif self._header != "<|start|>" or text.lstrip().startswith(("assistant", "```", "~~~")):
            self._keep_unmarked(text.lstrip().removeprefix("assistant") if self._header else text)
        if self._header != "<|start|>":
            self._role = "assistant"
        self._channel = None

    def reply(self, *, ended: bool) -> Reply:
        """The reply, after its last token. `ended`: whether that ended a message or the reply."""
        open_final = self._channel == "final"
        self.close()
        *earlier, final = self._finals or [None]
        return Reply(
            "\n\n".join(self._thinking),
            final,
            truncated=open_final if self._finals else not ended,
            earlier=tuple(text for text in reversed(earlier) if text is not None),
            unmarked=tuple(reversed(self._unmarked)),
        )

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _take_role(self) -> None:
        words = self._text().split() if self._header == "<|start|>" else []
        self._role, self._ids = words[0] if words else "assistant", []

    def _keep(self, channel: str, text: str) -> None:
        if channel == "final":
            self._finals.append(text)
        elif channel == "analysis":
            self._thinking.append(text)
        elif _is_answer(channel):
            self._keep_unmarked(text)

    def _keep_unmarked(self, text: str) -> None:
        if self._role == "assistant" and text.strip():
            self._unmarked.append(text)


def _is_answer(channel: str) -> bool:
    """Whether a text in such a channel may be an answer: its name is neither that of thinking nor a misspelling of it."""
    return difflib.get_close_matches(channel.lower(), (*_THINKING, "commentary", "final"), 1) not in [[word] for word in _THINKING]


class Harmony:
    """Harmony as a `ChatFormat`."""

    def __init__(self, tokenizer: Tokenizer, reasoning_effort: str = DEFAULT_EFFORT, date: str = DATE, *, stop_ids: Collection[int] = ()):
        """See `system_message` for the effort and the date.

        Args:
          stop_ids: ids that end a reply besides <|return|>, such as those of generation_config.json.

        Raises:
          ConfigError: the reasoning effort is unknown.
          TokenizerError: a stop id would end replies before their answer.
        """
        if reasoning_effort not in REASONING_EFFORTS:
            allowed = ", ".join(REASONING_EFFORTS)
            raise ConfigError(f"config.prompt.reasoning_effort = {reasoning_effort!r} is not known; allowed: {allowed}.")
        self.tokenizer = tokenizer
        if wrong := [name for name in _WITHIN if tokenizer.special(name) in stop_ids]:
            raise TokenizerError(
                f"generation_config.json has the ids of {', '.join(wrong)} as eos_token_id, which would end replies before their answer."
                " Use the published file."
            )
        self.stop_ids = tuple(sorted({tokenizer.special(STOP_TOKEN), *stop_ids}))
        self._system = system_message(reasoning_effort, date)

    @property
    def names(self) -> Collection[str]:
        return SPECIAL_TOKENS

    def describe(self) -> str:
        names = {self.tokenizer.special(name): name for name in SPECIAL_TOKENS}
        return f"harmony, stop tokens {', '.join(names.get(index, str(index)) for index in self.stop_ids)}"

    def render(self, request: str, instructions: str = "") -> Rendered:
        """The system message is present only with instructions: the apprentice was trained without either."""
        before = [self._system, developer_message(instructions)] if instructions else []
        messages = [*before, Message("user", request)]
        return Rendered(tuple(render(messages, self.tokenizer)), render_text(messages))

    def parse(self, ids: Sequence[int]) -> Reply:
        return parse(ids, self.tokenizer, self.stop_ids)

    def answer_opening(self) -> tuple[int, ...]:
        return answer_opening(self.tokenizer)

    def answer_forced(self, closing: str) -> tuple[int, ...]:
        return answer_forced(closing, self.tokenizer)
