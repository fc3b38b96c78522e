"""The harmony chat format of gpt-oss: messages to token ids, and generated ids back to what they say.

Source: OpenAI's published harmony format. Rendering agrees with the official `openai-harmony` package (tests/text/golden).
A message is <|start|>{role}[<|channel|>{channel}]<|message|>{content}<|end|>; the model continues after <|start|>assistant, thinks in the
channel `analysis`, answers in `final`, and ends with <|return|>.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from discover_jax.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant")
CHANNELS = ("analysis", "commentary", "final")
_ENDS = ("<|end|>", "<|call|>", "<|return|>")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message; only an assistant's has a channel. Its content is ordinary text, whatever it says."""

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


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the policy wrote.

    Attributes:
      analysis: its thinking; several messages are joined by blank lines.
      final: its answer: the last message in the channel `final`; None if there is none.
      truncated: whether the answer (or, if there is none, the reply) was still being written when the ids ended: the token budget cut it.
    """

    analysis: str
    final: str | None
    truncated: bool


def system_message(reasoning_effort: str, date: str, channels: Sequence[str] = CHANNELS) -> Message:
    """gpt-oss's system message, word for word as it was trained on.

    Args:
      reasoning_effort: "low", "medium" or "high".
      date: the "current date" that it states, such as "2025-08-05"; pinned, so that equal runs have equal prompts.
      channels: those that it may speak in.
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
    """The message that holds what elsewhere is called the system prompt."""
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
    """Token ids of a conversation, open for the assistant's next message: they end in <|start|>assistant.

    All messages are kept; the official renderer drops the thinking before earlier answers, which prompts here do not have.
    """
    ids: list[int] = []
    for text, special in _pieces(messages):
        ids += [tokenizer.special(text)] if special else tokenizer.encode(text)
    return ids


def render_text(messages: Sequence[Message]) -> str:
    """The same conversation for people to read, special tokens by their names."""
    return "".join(text for text, _ in _pieces(messages))


def answer_opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids with which an answer begins: <|channel|>final<|message|>."""
    return tokenizer.special("<|channel|>"), *tokenizer.encode("final"), tokenizer.special("<|message|>")


def answer_forced(closing: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a thinking that is still going on, and begins the answer: `closing`, <|end|><|start|>assistant and the answer's opening."""
    start = tokenizer.special("<|end|>"), tokenizer.special("<|start|>")
    return *tokenizer.encode(closing), *start, *tokenizer.encode("assistant"), *answer_opening(tokenizer)


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> Reply:
    """What the ids that follow <|start|>assistant say. Any sequence of ids has a Reply; what breaks the format is skipped.

    A message opens at <|message|>, in the channel that its header names, and closes at <|end|>, <|call|> or <|return|>, or where a new
    header begins at <|start|> or <|channel|>. <|return|> ends the reply. Other special tokens say nothing.
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
            # A header may go on after the channel: "commentary to=tool", "final <|constrain|>json".
            words = tokenizer.decode(channel_ids or []).split()
            channel, channel_ids, content_ids = words[0] if words else "", None, []
        if name == "<|return|>":
            break

    open_final = content_ids is not None and channel == "final"
    close()
    finals = [content for name, content in closed if name == "final"]
    analysis = "\n\n".join(content for name, content in closed if name == "analysis")
    if not finals:
        return Reply(analysis, None, truncated=not ended)
    return Reply(analysis, finals[-1], truncated=open_final)
