"""gpt-oss's own tokenizer and chat format, compared with the official package, if the published ranks are available.

Set DISCOVER_JAX_O200K to the folder with o200k_base.tiktoken.
"""

import os
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import TokenizerError
from discover_jax.text import tokenizer as tokenizer_module
from discover_jax.text.harmony import Message, developer_message, parse, render, system_message
from discover_jax.text.tokenizer import SPECIAL_TOKENS, O200kTokenizer, load_tokenizer

harmony = pytest.importorskip("openai_harmony")
_FOLDER = os.environ.get("DISCOVER_JAX_O200K")
needs_ranks = pytest.mark.skipif(not _FOLDER, reason="needs gpt-oss's ranks: set DISCOVER_JAX_O200K to the folder of o200k_base.tiktoken")

# Difficult text: names of special tokens, unusual spaces, control characters, characters beyond 16 bits, code.
_awkward = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [
                *SPECIAL_TOKENS,
                "<|reserved_200013|>",
                "```python\n",
                "\r\n",
                "\t\t",
                "   ",
                "\u2581",
                "\ufeff",
                "\u0000",
                "e\u0301",
                "\U0001f680",
            ]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(str(_FOLDER)))


@needs_ranks
@pytest.mark.parametrize("character", [" ", "\n", "~", "`", "a", "\u0301", "\u00e9", "\U0001f468\u200d"])
def test_long_runs_take_linear_time(tokenizer, character):
    """In one part, they take minutes, and a million spaces end the process."""
    text = "x = 1\n" + character * (1_000_000 if character == " " else 200_000) + "\nx"
    before = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - before < 10.0
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["", "a b", "a" * 999, " " * 1000 + "a", "a" * 1000, "a" * 2001 + " " * 3000 + "b", "ab " * 2000])
def test_only_long_runs_are_cut(text):
    parts = tokenizer_module._parts(text)
    assert "".join(parts) == text
    assert len(parts) == 1 + text.count("a" * 1000) + text.count(" " * 1000)


@needs_ranks
def test_special_tokens_have_the_published_ids(tokenizer):
    published = {"<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003, "<|channel|>": 200005}
    published |= {"<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008, "<|call|>": 200012}
    assert {name: tokenizer.special(name) for name in SPECIAL_TOKENS} == published
    assert tokenizer.vocab_size == 201_088
    assert tokenizer.encode("hello world") == [24912, 2375]
    with pytest.raises(TokenizerError, match="reserved_200013"):
        tokenizer.special("<|reserved_200013|>")


@needs_ranks
@given(_awkward)
def test_text_round_trips_and_never_yields_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(index < 199_998 for index in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([200_006, *ids, 200_013, 201_088, -1]) == text


@needs_ranks
def test_half_a_character_is_a_replacement_and_pickling_keeps_the_tokenizer(tokenizer):
    half = tokenizer.encode("\U0001f9ff")[:-1]
    assert half
    assert "\ufffd" in tokenizer.decode(half)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")


@needs_ranks
@given(_awkward, _awkward, st.sampled_from(["low", "medium", "high"]))
def test_rendering_matches_the_official_package(tokenizer, instructions, question, effort):
    theirs = harmony.Conversation.from_messages(
        [
            harmony.Message.from_role_and_content(
                harmony.Role.SYSTEM,
                harmony.SystemContent.new()
                .with_reasoning_effort(harmony.ReasoningEffort(effort.capitalize()))
                .with_conversation_start_date("2025-08-05"),
            ),
            harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, harmony.DeveloperContent.new().with_instructions(instructions)),
            harmony.Message.from_role_and_content(harmony.Role.USER, question),
        ]
    )
    ours = [system_message(effort, "2025-08-05"), developer_message(instructions), Message("user", question)]
    expected = tokenizer._model.render_conversation_for_completion(theirs, harmony.Role.ASSISTANT)
    assert render(ours, tokenizer) == expected


@needs_ranks
@given(_awkward, _awkward)
def test_parsing_matches_the_official_package(tokenizer, thinking, answer):
    def message(channel, content, end):
        ids = [tokenizer.special("<|channel|>"), *tokenizer.encode(channel), tokenizer.special("<|message|>"), *tokenizer.encode(content)]
        return [*ids, tokenizer.special(end)]

    start = [tokenizer.special("<|start|>"), *tokenizer.encode("assistant")]
    ids = [*message("analysis", thinking, "<|end|>"), *start, *message("final", answer, "<|return|>")]
    theirs = tokenizer._model.parse_messages_from_completion_tokens(ids, harmony.Role.ASSISTANT)
    reply = parse(ids, tokenizer)
    assert [(m.channel, m.content[0].text) for m in theirs] == [("analysis", reply.thinking), ("final", reply.final)]


def test_unreadable_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", "kept")
    with pytest.raises(TokenizerError, match=r"o200k_base\.tiktoken"):
        O200kTokenizer(tmp_path / "o200k_base.tiktoken")
    (tmp_path / "o200k_base.tiktoken").write_text("aGk= 0\n")
    with pytest.raises(TokenizerError, match=r"o200k_base"):
        load_tokenizer(tmp_path)
    assert os.environ["TIKTOKEN_ENCODINGS_BASE"] == "kept"
    monkeypatch.setitem(sys.modules, "openai_harmony", None)
    with pytest.raises(TokenizerError, match=r"'\.\[harmony\]'"):
        load_tokenizer(tmp_path)


@needs_ranks
def test_damaged_copy_of_the_ranks_is_detected(tmp_path):
    shutil.copy(Path(str(_FOLDER)) / "o200k_base.tiktoken", tmp_path)
    path = tmp_path / "o200k_base.tiktoken"
    path.chmod(0o600)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TokenizerError, match=r"o200k_base\.tiktoken"):
        load_tokenizer(tmp_path)
