"""The harmony chat format of gpt-oss: messages to token ids, and generated ids to replies.

Source: OpenAI's published harmony format. Rendering matches the official `openai-harmony` package (tests/text/golden).
A message is <|start|>{role}[<|channel|>{channel}]<|message|>{content}<|end|>; the model continues after <|start|>assistant, thinks in the
channel `analysis`, answers in `final`, and ends with <|return|>.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from discover_jax.exceptions import ConfigError
from discover_jax.text.chat import DATE, Rendered, Reply
from discover_jax.text.tokenizer import Tokenizer

REASONING_EFFORTS = ("low", "medium", "high")
DEFAULT_EFFORT = "medium"
STOP_TOKEN = "<|return|>"

ROLES = ("system", "developer", "user", "assistant")
CHANNELS = ("analysis", "commentary", "final")
_ENDS = ("<|end|>", "<|call|>", "<|return|>")


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


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> Reply:
    """Parses the ids after <|start|>assistant. Any sequence of ids gives a Reply; ids that violate the format are skipped.

    A message opens at <|message|>, in the channel that its header names. It closes at <|end|>, <|call|> or <|return|>, or at the next
    header (<|start|> or <|channel|>). <|return|> ends the reply. Other special tokens are ignored.
    """
    name_of = {tokenizer.special(name): name for name in ("<|start|>", "<|channel|>", "<|message|>", *_ENDS)}
    closed: list[tuple[str, str]] = []  # (channel, content)
    channel_ids: list[int] | None = None  # of the header's channel; None before <|channel|>
    content_ids: list[int] | None = None  # of the open message; None outside of one
    channel, ended = "", False

    def close() -> None:
        nonlocal content_ids
        if content_ids is not None:
            closed.append((channel, tokenizer.decode(content_ids)))
        content_ids = None

    for token in map(int, ids):
        name = name_of.get(token)
        ended = name in _ENDS
        if name is None:
            if content_ids is not None:
                content_ids.append(token)
            elif channel_ids is not None:
                channel_ids.append(token)
        elif name != "<|message|>":
            close()
            channel_ids = [] if name == "<|channel|>" else None
        elif content_ids is None:
            # A header may continue after the channel: "commentary to=tool", "final <|constrain|>json".
            words = tokenizer.decode(channel_ids or []).split()
            channel, channel_ids, content_ids = words[0] if words else "", None, []
        if name == "<|return|>":
            break

    open_final = content_ids is not None and channel == "final"
    close()
    finals = [content for name, content in closed if name == "final"]
    thinking = "\n\n".join(content for name, content in closed if name == "analysis")
    if not finals:
        return Reply(thinking, None, truncated=not ended)
    return Reply(thinking, finals[-1], truncated=open_final)


class Harmony:
    """Harmony as a `ChatFormat`."""

    def __init__(self, tokenizer: Tokenizer, reasoning_effort: str = DEFAULT_EFFORT, date: str = DATE):
        """See `system_message` for the last two arguments.

        Raises:
          ConfigError: the reasoning effort is unknown.
        """
        if reasoning_effort not in REASONING_EFFORTS:
            allowed = ", ".join(REASONING_EFFORTS)
            raise ConfigError(f"config.prompt.reasoning_effort = {reasoning_effort!r} is not known; allowed: {allowed}.")
        self.tokenizer = tokenizer
        self.stop_ids = (tokenizer.special(STOP_TOKEN),)
        self._system = system_message(reasoning_effort, date)

    def describe(self) -> str:
        return "harmony"

    def render(self, request: str, instructions: str = "") -> Rendered:
        """The system message is present only with instructions: the apprentice was trained without either."""
        before = [self._system, developer_message(instructions)] if instructions else []
        messages = [*before, Message("user", request)]
        return Rendered(tuple(render(messages, self.tokenizer)), render_text(messages))

    def parse(self, ids: Sequence[int]) -> Reply:
        return parse(ids, self.tokenizer)

    def answer_opening(self) -> tuple[int, ...]:
        return answer_opening(self.tokenizer)

    def answer_forced(self, closing: str) -> tuple[int, ...]:
        return answer_forced(closing, self.tokenizer)
