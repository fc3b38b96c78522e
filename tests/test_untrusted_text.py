"""Text of others shows what it is: nothing hidden, no control of terminals, progress bars as a terminal shows them."""

import re
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax import cli
from discover_jax.untrusted_text import as_on_terminal, collapsed, one_line, printable, without_names

MARK = "\ufffd"


CONTROL = ["\x00", "\x07", "\x7f", "\x85", "\ud800"]
BIDIRECTIONAL = ["\u202e", "\u2066", "\u061c"]
INVISIBLE = ["\u200b", "\u200d", "\u2060", "\ufeff", "\xad", "\u180e", "\u3164", "\u115f", "\u034f", "\ufff9", "\U0001d173"]
TAGS_AND_LINES = ["\U000e0041", "\U000e01ef", "\u2028", "\u2029"]


@pytest.mark.parametrize("hidden", [*CONTROL, *BIDIRECTIONAL, *INVISIBLE, *TAGS_AND_LINES])
def test_hidden_characters_leave_a_mark(hidden):
    assert printable(f"yes{hidden}no") == as_on_terminal(f"yes{hidden}no") == f"yes{MARK}no"


def test_no_format_character_of_unicode_remains():
    everything = "".join(map(chr, range(0x110000)))
    kept = set(printable(everything)) | set(as_on_terminal(everything))
    assert {c for c in kept if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\t", "\n"}


def test_ordinary_text_stays():
    for text in ("", "a\tb\n\nc", "Größe é e\u0301 中文 עברית العربية ▁ \U0001f680", "x = 'a'  # b\n"):
        assert printable(text) == as_on_terminal(text) == text
    assert printable("ok \u2714\ufe0f") == "ok \u2714"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x9b31mred", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPdata\x1b\\x", "x"),
        ("\x1b[2J\x1b[Hx", "x"),
        ("\x1b(Bx", "x"),
        ("a\x1b", "a"),
        ("a\x1b]unfinished\nb", "aunfinished\nb"),
        ("\x1bPa\r\nb\x07", f"a\nb{MARK}"),
        ("caf\x9d score .8\nnext\n", f"caf{MARK} score .8\nnext\n"),
        ("\x90a\x98b\x9ec\x9fd\nnext", f"{MARK}a{MARK}b{MARK}c{MARK}d\nnext"),
        ("\x9d a \x9c b", f"{MARK} a {MARK} b"),
        ("\x9d0;title\x07x", "x"),
        ("a\x9b", f"a{MARK}"),
        ("m\xc4\x9bto", f"m\xc4{MARK}to"),
    ],
)
def test_escape_sequences_disappear(text, shown):
    assert printable(text) == as_on_terminal(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nb\r\n", "a\nb\n"),
        ("10%\r50%\r100%\nscore 0.8\n", "100%\nscore 0.8\n"),
        ("long line\rshort", "shortline"),
        ("50%\r", "50%"),
        ("a\r\rb", "b"),
        ("12/60 [==>]\b\b\b\b\b\b\b\b\b\b\b13/60 [===]", "13/60 [===]"),
        ("loading...\r\x1b[Kdone", "done"),
        ("loading...\x1b[2K\rdone", "done      "),
        ("one\ntwo\x1b[A\rONE\n", "ONE\ntwo"),
        ("bar 1: 0%\nbar 2: 0%\x1b[1A\rbar 1: 9%\n\rbar 2: 9%", "bar 1: 9%\nbar 2: 9%"),
        ("abc\x1b[9999Cd\x1b[9999A\x1b[9999Be", "abcde"),
        ("\b\b\ba", "a"),
        ("abc\x1b[1Gx", "xbc"),
        ("abc\ndef\x1b[2J\x1b[Hx", "x"),
        ("abc\ndef\x1b[3Jx", "x"),
        ("abc\ndef\nghi\x1b[H\x1b[Jx", "x"),
        ("abc\ndef\nghi\x1b[A\x1b[Jx", "abc\ndefx"),
        ("abc\ndef\x1b[1J\x1b[1Gx", "x  "),
        ("abc\ndef\x1b[1;2Hx", "axc\ndef"),
        ("abc\ndef\x1b[2fx", "abc\nxef"),
        ("\x1b[1;1Habc\x1b[2;1Hdef\x1b[9;9Hghi", "abc\ndef\nghi"),
        ("abcdef\x1b[3D\x1b[1K", "    ef"),
        ("step \x1b71\x1b82\x1b83", "step 3"),
        ("step \x1b[s1\x1b[u2", "step 2"),
        ("abc\x1b7\x1b[2J\x1b8x", "x"),
    ],
)
def test_text_as_on_a_terminal(text, shown):
    assert as_on_terminal(text) == shown


@pytest.mark.parametrize("part", ["\x9d", "\x9da", "\x1b]a", "\x1b]a\x9d", "\x9b1", "\x1b[1;", "\x1b ", "\n\x1b[2J"])
def test_controls_without_an_end_take_linear_time(part):
    before = time.process_time()
    as_on_terminal(part * 20_000)
    assert time.process_time() - before < 2.0


@given(st.text("ab\r\n\b\x1b\x9b\x9d\x07[K2AHJ78su;m", max_size=60))
def test_any_text_is_accepted(text):
    assert not re.search("[\r\b\x1b\x9b\x9d]", as_on_terminal(text))


@given(st.lists(st.text("abcé█\r", max_size=20), max_size=8))
def test_a_line_may_be_collapsed_at_any_time(parts):
    line = b""
    for part in parts:
        line = collapsed(line + part.encode())
    assert as_on_terminal(line.decode()) == as_on_terminal("".join(parts))


@pytest.mark.parametrize("cut", range(36))
def test_a_character_may_be_cut_between_reads(cut):
    text = "é" * 10 + "\r" + "█" * 5
    assert as_on_terminal(collapsed(collapsed(text.encode()[:cut]) + text.encode()[cut:]).decode()) == "█" * 5 + "é" * 5


def test_names_of_a_chat_formats_tokens():
    names = ("<|end|>", "<|im_end|>", "<|end|>x")
    assert without_names("a<|end|>b <|im_end|><|end|>x <|end |>", names) == f"a{MARK}b {MARK}{MARK} <|end |>"
    assert without_names("plain < | text", names) == "plain < | text"


def test_one_line():
    assert one_line("a\nb\t c\u202e") == f"a b c{MARK}"


def test_errors_are_printed_clean(capsys):
    cli._report(cli.ConfigError("tensor 'a\x1b[31m\u202eb\r' is missing"))
    assert capsys.readouterr().err == f"error: tensor 'a{MARK}b\n' is missing\n"
    cli._report(TypeError("a\x1b[31m\u202eb"))
    shown = capsys.readouterr().err
    assert f"TypeError: a{MARK}b" in shown
    assert "\x1b" not in shown


def test_logs_are_clean(caplog):
    import logging

    handler = caplog.handler
    logging.getLogger().addHandler(handler)
    try:
        cli._clean_logs()
        logging.getLogger("x").warning("column %s", "a\x1b[31m\u202eb")
    finally:
        logging.getLogger().removeHandler(handler)
        for each in logging.getLogger().handlers:
            each.filters.clear()
    assert caplog.records[0].getMessage() == f"column a{MARK}b"
