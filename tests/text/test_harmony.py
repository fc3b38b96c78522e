"""Rendering and parsing match the official package (golden/harmony.json), and parsing accepts any input."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError, TokenizerError
from discover_jax.text.chat import Reply
from discover_jax.text.harmony import (
    Harmony,
    Message,
    answer_forced,
    answer_opening,
    developer_message,
    parse,
    render,
    render_text,
    system_message,
)
from discover_jax.text.reply import extracted
from discover_jax.text.tokenizer import SPECIAL_TOKENS
from discover_jax.types import Rollout, StopReason

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("harmony.json").read_text())


def encode(segments, tokenizer):
    """The ids of a golden list of ordinary texts and {"special": name}."""
    ids = []
    for segment in segments:
        ids += tokenizer.encode(segment) if isinstance(segment, str) else [tokenizer.special(segment["special"])]
    return ids


def segment(ids, tokenizer):
    """The inverse of `encode`."""
    names = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
    segments, run = [], []
    for token in [*ids, None]:
        if token is None or token in names:
            if run:
                segments.append(tokenizer.decode(run))
            run = []
            segments += [{"special": names[token]}] if token is not None else []
        else:
            run.append(token)
    return segments


@pytest.mark.parametrize("golden", GOLDEN["conversations"], ids=range(len(GOLDEN["conversations"])))
def test_rendering_agrees_with_the_official_package(golden, tokenizer):
    messages = [
        system_message(golden["reasoning_effort"], golden["date"]),
        developer_message(golden["instructions"]),
        *(Message(m["role"], m["content"], m.get("channel")) for m in golden["messages"]),
    ]
    assert segment(render(messages, tokenizer), tokenizer) == golden["segments"]
    assert render_text(messages) == "".join(s if isinstance(s, str) else s["special"] for s in golden["segments"])


@pytest.mark.parametrize("golden", GOLDEN["completions"], ids=range(len(GOLDEN["completions"])))
def test_parsing_agrees_with_the_official_package(golden, tokenizer):
    said = {channel: [m["content"] for m in golden["messages"] if m["channel"] == channel] for channel in ("analysis", "final")}
    final = said["final"][-1] if said["final"] else None
    reply = parse(encode(golden["segments"], tokenizer), tokenizer)
    assert (reply.thinking, reply.final, reply.truncated) == ("\n\n".join(said["analysis"]), final, False)
    assert list(reply.earlier) == said["final"][-2::-1]


CHANNEL, MESSAGE, START, END, RETURN = ({"special": f"<|{name}|>"} for name in ("channel", "message", "start", "end", "return"))
ANALYSIS = [CHANNEL, "analysis", MESSAGE, "plan", END, START, "assistant"]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([], Reply("", None, True)),
        (["no header at all"], Reply("", None, True, unmarked=("no header at all",))),
        ([CHANNEL, "analysis", MESSAGE, "thinking of"], Reply("thinking of", None, True)),
        ([CHANNEL, "analysis", MESSAGE, "plan", END], Reply("plan", None, False)),
        (ANALYSIS, Reply("plan", None, True)),
        ([*ANALYSIS, CHANNEL, "fin"], Reply("plan", None, True)),
        ([*ANALYSIS, CHANNEL, "final", MESSAGE, "half an ans"], Reply("plan", "half an ans", True)),
        ([*ANALYSIS, CHANNEL, "final", MESSAGE], Reply("plan", "", True)),
        ([*ANALYSIS, CHANNEL, "final", MESSAGE, "a", END], Reply("plan", "a", False)),
        ([*ANALYSIS, CHANNEL, "final", MESSAGE, "a", RETURN, "b", CHANNEL, "final", MESSAGE, "c"], Reply("plan", "a", False)),
        # The last final message counts, also if the budget cuts a later analysis message.
        (
            [CHANNEL, "final", MESSAGE, "a", END, START, "assistant", CHANNEL, "final", MESSAGE, "b", RETURN],
            Reply("", "b", False, earlier=("a",)),
        ),
        ([CHANNEL, "final", MESSAGE, "a", END, START, "assistant", CHANNEL, "analysis", MESSAGE, "b"], Reply("b", "a", False)),
        # Invalid formats: a header while the message before is open, a second <|message|>, a message without a channel.
        ([CHANNEL, "analysis", MESSAGE, "plan", CHANNEL, "final", MESSAGE, "a", RETURN], Reply("plan", "a", False)),
        ([CHANNEL, "analysis", MESSAGE, "plan", START, "assistant", CHANNEL, "final", MESSAGE, "a", RETURN], Reply("plan", "a", False)),
        ([CHANNEL, "final", MESSAGE, "a", MESSAGE, "b", RETURN], Reply("", "ab", False)),
        ([MESSAGE, "a", RETURN], Reply("", None, False, unmarked=("a",))),
        ([CHANNEL, "final ", {"special": "<|constrain|>"}, "json", MESSAGE, "{}", RETURN], Reply("", "{}", False)),
    ],
)
def test_parsing_of_cut_and_broken_replies(segments, expected, tokenizer):
    assert parse(encode(segments, tokenizer), tokenizer) == expected


_tokens = st.one_of(
    st.sampled_from([{"special": name} for name in SPECIAL_TOKENS]), st.sampled_from(["final", "analysis", " ", "x", "```"])
)


@given(segments=st.lists(_tokens, max_size=30), junk=st.lists(st.integers(-3, 1000), max_size=5))
def test_any_ids_parse(tokenizer, segments, junk):
    ids = encode(segments, tokenizer) + junk
    reply = parse(ids, tokenizer)
    assert isinstance(reply.thinking, str)
    assert reply.final is None or isinstance(reply.final, str)
    # Tokens after <|return|> have no effect.
    whole = parse([*ids, tokenizer.special("<|return|>")], tokenizer)
    assert not whole.truncated
    assert parse([*ids, tokenizer.special("<|return|>"), *ids], tokenizer) == whole
    assert (whole.thinking, whole.final) == (reply.thinking, reply.final)


@given(analysis=st.text(), final=st.text())
def test_rendered_replies_parse_back(tokenizer, analysis, final):
    segments = [CHANNEL, "analysis", MESSAGE, analysis, END, START, "assistant", CHANNEL, "final", MESSAGE, final, RETURN]
    assert parse(encode(segments, tokenizer), tokenizer) == Reply(analysis, final, truncated=False)


@pytest.mark.parametrize(("role", "channel"), [("tool", None), ("user", "final"), ("assistant", "thoughts")])
def test_unknown_messages_are_refused(role, channel):
    with pytest.raises(ValueError, match=channel or role):
        Message(role, "x", channel)


def test_forced_answer_after_unfinished_thinking_parses_as_an_answer(tokenizer):
    thinking = [
        tokenizer.special("<|channel|>"),
        *tokenizer.encode("analysis"),
        tokenizer.special("<|message|>"),
        *tokenizer.encode("Let me s"),
    ]
    forced = answer_forced("\n\nEnough.", tokenizer)
    assert forced[-len(answer_opening(tokenizer)) :] == answer_opening(tokenizer)
    answer = [*tokenizer.encode("```python\npass\n```"), tokenizer.special("<|return|>")]
    assert parse([*thinking, *forced, *answer], tokenizer) == Reply("Let me s\n\nEnough.", "```python\npass\n```", truncated=False)


def test_chat_format_is_the_same_harmony(tokenizer):
    chat = Harmony(tokenizer, "high", "2025-08-05")
    messages = [system_message("high", "2025-08-05"), developer_message("Be brief."), Message("user", "Hello?")]
    assert chat.render("Hello?", "Be brief.").ids == tuple(render(messages, tokenizer))
    assert chat.render("Hello?", "Be brief.").text == render_text(messages)
    assert chat.render("Hello?").ids == tuple(render(messages[2:], tokenizer))
    assert chat.stop_ids == (tokenizer.special("<|return|>"),)
    assert (chat.answer_opening(), chat.answer_forced("x")) == (answer_opening(tokenizer), answer_forced("x", tokenizer))
    ids = encode([*ANALYSIS, CHANNEL, "final", MESSAGE, "a", RETURN], tokenizer)
    assert chat.parse(ids) == parse(ids, tokenizer) == Reply("plan", "a", truncated=False)


def test_unknown_reasoning_effort(tokenizer):
    with pytest.raises(ConfigError, match=r"config\.prompt\.reasoning_effort = 'none'"):
        Harmony(tokenizer, "none")


CALL, ENDOFTEXT = ({"special": f"<|{name}|>"} for name in ("call", "endoftext"))
RUN = "def run():\n    return 1"
PROGRAM = f"Here:\n```python\n{RUN}\n```"
USAGE = "```python\nprint(run())\n```"
FINAL = [CHANNEL, "final", MESSAGE]
NEXT = [END, START, "assistant"]


def program_in(segments, tokenizer, stop=StopReason.STOP_TOKEN, **options):
    ids = np.asarray(encode(segments, tokenizer), np.int32)
    rollout = Rollout(0, 0, ids, ids, np.zeros(len(ids), np.float32), np.ones(len(ids), bool), stop)
    return extracted(rollout, Harmony(tokenizer), **options)


@pytest.mark.parametrize(
    "segments",
    [
        [*FINAL, PROGRAM, RETURN],
        [*FINAL, PROGRAM, CALL],
        # A second final message with an example, with nothing, or cut.
        [*FINAL, PROGRAM, *NEXT, *FINAL, "I hope that helps.", RETURN],
        [*FINAL, PROGRAM, *NEXT, *FINAL, USAGE, RETURN],
        [*FINAL, PROGRAM, *NEXT, *FINAL, "", RETURN],
        [*FINAL, PROGRAM, *NEXT, *FINAL, "```json\n{}\n```", *NEXT, CHANNEL, "analysis", MESSAGE, "Done.", RETURN],
        [*FINAL, f"```python\n{RUN}\n    return 2\n```", *NEXT, *FINAL, PROGRAM, RETURN],
        # No <|message|>.
        [CHANNEL, "final", PROGRAM, RETURN],
        [CHANNEL, f"final\n{PROGRAM}", RETURN],
        [*ANALYSIS, CHANNEL, f"final```python\n{RUN}\n```", RETURN],
        [*ANALYSIS, f"\n{PROGRAM}", RETURN],
        [CHANNEL, "analysis", MESSAGE, "plan", END, PROGRAM, RETURN],
        [PROGRAM, RETURN],
        # No channel, or a mistyped one.
        [MESSAGE, PROGRAM, RETURN],
        ["final", MESSAGE, PROGRAM, RETURN],
        [*ANALYSIS, MESSAGE, PROGRAM, RETURN],
        *([*ANALYSIS, CHANNEL, name, MESSAGE, PROGRAM, RETURN] for name in ("Final", "finals", "fianl", "finall", "answer", "output", "")),
        # Commentary.
        [*ANALYSIS, CHANNEL, "commentary", MESSAGE, PROGRAM, END],
        [*ANALYSIS, CHANNEL, "commentary to=functions.run", {"special": "<|constrain|>"}, "python", MESSAGE, PROGRAM, CALL],
        [CHANNEL, "commentary", MESSAGE, PROGRAM, *NEXT, *FINAL, "See above.", RETURN],
        [CHANNEL, "commentary", MESSAGE, PROGRAM, *NEXT, *FINAL, USAGE, RETURN],
    ],
)
def test_programs_of_replies_that_break_the_format(segments, tokenizer):
    assert program_in(segments, tokenizer).code == RUN


@pytest.mark.parametrize(
    "segments",
    [
        [CHANNEL, "analysis", MESSAGE, PROGRAM, RETURN],
        [*ANALYSIS[:-3], PROGRAM, *NEXT, *FINAL, "I cannot do it.", RETURN],
        *([CHANNEL, name, MESSAGE, PROGRAM, RETURN] for name in ("Analysis", "analysi", "anaylsis", "thinking", "thoughts", "reasoning")),
        [CHANNEL, f"analysis {PROGRAM}", RETURN],
        [*ANALYSIS[:-1], "user", MESSAGE, PROGRAM, RETURN],
        [*ANALYSIS[:-1], "user", CHANNEL, "commentary", MESSAGE, PROGRAM, RETURN],
        [*ANALYSIS[:-1], f"user {PROGRAM}", RETURN],
        [*ANALYSIS[:-1], "functions.python to=assistant", CHANNEL, "commentary", MESSAGE, PROGRAM, END],
        [CHANNEL, "commentary", MESSAGE, USAGE, RETURN],
        [CHANNEL, "commentary", MESSAGE, "```python\ndef run(", RETURN],
        [CHANNEL, "commentary", MESSAGE, RUN, RETURN],
        [RETURN, *FINAL, PROGRAM, RETURN],
    ],
)
def test_nothing_else_becomes_a_program(segments, tokenizer):
    assert program_in(segments, tokenizer).code is None


def test_of_several_programs_the_last_final_one_counts(tokenizer):
    other = PROGRAM.replace("1", "2")
    assert program_in([*FINAL, other, *NEXT, *FINAL, PROGRAM, RETURN], tokenizer).code == RUN
    assert program_in([*FINAL, PROGRAM, *NEXT, CHANNEL, "commentary", MESSAGE, other, RETURN], tokenizer).code == RUN
    assert (
        program_in([CHANNEL, "commentary", MESSAGE, other, *NEXT, CHANNEL, "commentary", MESSAGE, PROGRAM, RETURN], tokenizer).code == RUN
    )
    # Without any that defines run, the last final message stays, so that the model learns what is missing.
    assert program_in([*FINAL, "```python\nx = 1\n```", *NEXT, *FINAL, "Done.", RETURN], tokenizer).code == "x = 1"


def test_edits_in_an_earlier_final_message(tokenizer):
    edit = "<<<<<<< SEARCH\nx = 1\n=======\nx = 2\n>>>>>>> REPLACE"
    segments = [*FINAL, edit, *NEXT, *FINAL, "It is faster now.", RETURN]
    assert program_in(segments, tokenizer, edits_of="x = 1\ny = 1").code == "x = 2\ny = 1"
    segments = [*FINAL, edit, *NEXT, *FINAL, PROGRAM, RETURN]
    assert program_in(segments, tokenizer, edits_of="x = 1\ny = 1").code == RUN


def test_a_cut_in_a_later_message_does_not_complete_an_earlier_block(tokenizer):
    segments = [*FINAL, "```python\nx = (1", *NEXT, *FINAL, "And"]
    assert program_in(segments, tokenizer, StopReason.MAX_TOKENS).code is None
    assert program_in(segments[:4], tokenizer, StopReason.MAX_TOKENS).code == "x = (1"


def test_all_stop_ids_end_a_reply(tokenizer):
    stops = [tokenizer.special(f"<|{name}|>") for name in ("return", "call", "endoftext")]
    chat = Harmony(tokenizer, stop_ids=stops)
    assert chat.stop_ids == tuple(sorted(stops))
    assert Harmony(tokenizer, stop_ids=stops[1:]).stop_ids == chat.stop_ids
    assert all(name in chat.describe() for name in ("<|return|>", "<|call|>", "<|endoftext|>"))
    for stop in (RETURN, CALL, ENDOFTEXT):
        ids = encode([*ANALYSIS, *FINAL, "a", stop, *FINAL, "b", RETURN], tokenizer)
        assert chat.parse(ids) == Reply("plan", "a", truncated=False)
        assert chat.parse(ids[: ids.index(chat.tokenizer.special(stop["special"]))]).truncated
        assert chat.parse(encode([CHANNEL, "analysis", MESSAGE, "plan", stop], tokenizer)) == Reply("plan", None, truncated=False)
    with pytest.raises(TokenizerError, match=r"<\|end\|>.*eos_token_id"):
        Harmony(tokenizer, stop_ids=[*stops, tokenizer.special("<|end|>")])
