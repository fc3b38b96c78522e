"""Edits: blocks are found, applied in order, and refused with the reason and the number of the block."""

import itertools
import re
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from discover_jax.text.edits import INSTRUCTIONS, MOST_EDITS, EditError, edited, has_edits
from discover_jax.text.reply import Extracted, extracted
from discover_jax.text.template import Template
from discover_jax.types import Rollout, StopReason

PROGRAM = """\
import numpy as np


class Solver:
    def total(self, values):
        result = 0
        for value in values:
            result += value
        return result


def run():
    return Solver().total(np.arange(3))
"""


def block(search, new):
    return f"<<<<<<< SEARCH\n{search}\n=======\n{new}\n>>>>>>> REPLACE\n"


def within_word(text, index):
    """Whether a word or number goes on at this place."""
    before, after = text[index - 1 : index], text[index : index + 1]
    word = all(character.isalnum() or character == "_" for character in (before, after))
    return word or (before.isdigit() and after == ".") or (before == "." and after.isdigit())


def is_unique_part(program, start, end):
    """Whether this part occurs once, and its place has no meaning as whole lines, which other tests cover."""
    search = program[start:end]
    lines, stripped = search.split("\n"), "\n".join(line.strip() for line in ["", *program.split("\n"), ""])
    if not (lines[0].strip() and lines[-1].strip()) or len(re.findall(f"(?={re.escape(search)})", program)) != 1:
        return False
    if "\n" + "\n".join(line.strip() for line in lines) + "\n" in stripped:
        return False
    return bool(program[:start].rpartition("\n")[2].strip() or program[:start].endswith("\n") or not start)


@given(data=st.data(), pieces=st.lists(st.sampled_from(["a", "_b", "1", ".", " ", "=", "\n", "\n  "]), min_size=2, max_size=25))
def test_a_unique_part_is_replaced_as_by_str_replace(data, pieces):
    """Unless it ends within a word."""
    program, new = "".join(pieces), data.draw(st.sampled_from(["", "c", "c\n d", " "]))
    places = itertools.combinations(range(len(program) + 1), 2)
    parts = [place for place in places if is_unique_part(program, *place)]
    assume(parts)
    start, end = data.draw(st.sampled_from(parts))
    search = program[start:end]
    result, reason = edited_or_reason(program, block(search, new))
    if within_word(program, start) or within_word(program, end):
        assert "within names or numbers" in reason
    elif reason:
        assert reason in ("The edits change nothing.", "The edits leave nothing of the program.")
    else:
        assert result == program[:start] + new + program[end:]


@given(
    place=st.tuples(st.integers(0, 4), st.integers(1, 5)),
    blank=st.tuples(*[st.lists(st.sampled_from(["", "  "]), max_size=2)] * 4),
    new=st.lists(st.sampled_from(["x = 1", "", "y = 1"]), max_size=3),
)
def test_blank_lines_at_the_edges_of_a_text_join_no_lines(place, blank, new):
    program = [f"line{number} = 0" for number in range(5)]
    found, left = slice(place[0], sum(place)), slice(sum(place), None)
    search, new = [*blank[0], *program[found], *blank[1]], [*blank[2], *new, *blank[3]]
    expected = [*program[: place[0]], *new, *program[left]]
    assume(any(line.strip() for line in expected))
    result = edited("\n".join(program) + "\n", block("\n".join(search), "\n".join(new)))
    assert [line for line in result.split("\n") if line.strip()] == [line for line in expected if line.strip()]


@pytest.mark.parametrize(
    ("program", "search", "new", "expected"),
    [
        ("a = 0\nx = 1\ny = 2\n", "x = 1\n", "x = 5", "a = 0\nx = 5\ny = 2\n"),
        ("a = 0\nx = 1\ny = 2\n", "\nx = 1\n", "\nx = 5\n", "a = 0\nx = 5\ny = 2\n"),
        ("a = 0\nx = 1\ny = 2\n", "x = 1\n  ", "x = 5\n\n\nz = 1\n\n", "a = 0\nx = 5\n\n\nz = 1\n\ny = 2\n"),
        ("a = 0\nx = 1\ny = 2\n", "x = 1\n\n", "\n", "a = 0\ny = 2\n"),
        ("a = 0\nx = 1\n\ny = 2\n", "x = 1\n", "x = 5", "a = 0\nx = 5\ny = 2\n"),  # the blank line is there
        ("def f():\n    x = 1\n    y = 2\n", "\nx = 1\ny = 2\n", "\nx = 5\n", "def f():\n    x = 5\n"),
        # A whole line comes before a part.
        ("    subtotal = 0\n    total = 0\n", "total = 0", "total = 1", "    subtotal = 0\n    total = 1\n"),
        ("max_x = 1\nx = 1  \nx = 10", "x = 1", "x = 2", "max_x = 1\nx = 2\nx = 10"),
        # Parts end at the ends of words and numbers.
        ("max_x = 1; x = 1; x = 1.5; x = 1_0", "x = 1", "x = 2", "max_x = 1; x = 2; x = 1.5; x = 1_0"),
        ("max_x = 1; x = 1", "x = 1", "x = 2\ny = 2", "max_x = 1; x = 2\ny = 2"),
        ("f(lr=0.01, n=26)", "n=26", "n=3", "f(lr=0.01, n=3)"),
        # What follows on the line does not matter for the indentation.
        ("if a:\n    x = 1  # one\n", "x = 1", "x = 2\ny = 2", "if a:\n    x = 2\n    y = 2  # one\n"),
        ("if a:\n    x = 1   \n", "x = 1", "x = 2\ny = 2", "if a:\n    x = 2\n    y = 2\n"),
        ("if a:\n    x = 1  # one\n", "x = 1", "", "if a:\n      # one\n"),
        # New lines that already have the indentation of the program.
        ("if a:\n    b()\n    x = 1\n", "x = 1", "    x = 2\n    y = 2", "if a:\n    b()\n    x = 2\n    y = 2\n"),
        ("if a:\n    b()\n    x = 1  # one\n", "x = 1", "    x = 2", "if a:\n    b()\n    x = 2  # one\n"),
        ("if a:\n    x = 1\n", "x = 1", "x = 2\n    y = 2", "if a:\n    x = 2\n    y = 2\n"),
        ("if a:\n    x = 1  # one\n", "x = 1", "x = 2\n    y = 2", "if a:\n    x = 2\n    y = 2  # one\n"),
        ("if a:\n    b()\n    x = 1\n    y = 2\n", "x = 1\ny = 2", "    x = 2", "if a:\n    b()\n    x = 2\n"),
        ("if a:\n    x = 1\n    y = 2\n", "x = 1\n    y = 2", "x = 2\n    y = 3", "if a:\n    x = 2\n    y = 3\n"),
        # Neither version can be parsed, and both can: the new lines are shifted. Strings are shifted, too.
        ("if a\n    x = 1\n", "x = 1", "x = 2\ny = 2", "if a\n    x = 2\n    y = 2\n"),
        ("if a:\n    x = 1\n", "x = 1", 'x = """\n1"""', 'if a:\n    x = """\n    1"""\n'),
    ],
)
def test_the_place_and_the_indentation(program, search, new, expected):
    assert edited(program, block(search, new)) == expected


@pytest.mark.parametrize(
    ("program", "search"),
    [
        ("max_x = 1", "x = 1"),
        ("n = 26", "n = 2"),
        ("lr = 0.01", "lr = 0"),
        ("lr = 0.01", "lr = 0."),
        ("lr = 0.01", "lr = 0.0"),
        ("x = 0.5", ".5"),
        ("n = 2e5", "n = 2"),
        ("n = 2e5; n = 26", "n = 2"),
    ],
)
def test_a_part_of_a_name_or_number_does_not_count(program, search):
    with pytest.raises(EditError, match="occurs in the program only within names or numbers"):
        edited(program, block(search, "y = 3"))


def test_new_lines_are_shifted_in_programs_that_are_too_long_or_too_deep_to_parse():
    for rest in ("y = 1\n" * 40_000, "y = " + "-" * 20_000 + "1\n", "y = " + "1+" * 20_000 + "1\n", "y = '\0'\n"):
        assert edited("if a:\n    x = 1\n" + rest, block("x = 1", "x = 2\n    z = 2")) == "if a:\n    x = 2\n        z = 2\n" + rest


@given(st.lists(st.tuples(st.integers(0, 5), st.text(alphabet="xyz", min_size=1, max_size=5)), min_size=1, max_size=8))
def test_blocks_apply_in_order(edits):
    """Each one finds what the ones before it have left. Lines have unique names, which the edits keep."""
    lines = [f"line{number} = 0" for number in range(6)]
    blocks, program = [], "\n".join(lines)
    for number, value in edits:
        blocks.append(block(lines[number], f"line{number} = {value!r}"))
        lines[number] = f"line{number} = {value!r}"
    assert edited(program, "First:\n" + "then\n".join(blocks)) == "\n".join(lines)


@pytest.mark.parametrize(
    ("answer", "old", "new"),
    [
        (f"Here:\n```python\n{block('        result = 0', '        result = 0.0')}```\nDone.", "result = 0", "result = 0.0"),
        (f"```diff\n{block('result = 0', 'result = 0.0')}```", "result = 0", "result = 0.0"),  # a part of a line
        (block("        result = 0\n        for value", "        for value"), "        result = 0\n", ""),
        (
            block("        result = 0   \n        for value in values:\t", "        if values:"),
            "result = 0\n        for value in values:",
            "if values:",
        ),
        (
            block("    result = 0\n    for value in values:", "    if values:\n\n        pass"),
            "result = 0\n        for value in values:",
            "if values:\n\n            pass",
        ),
        (
            block("          result = 0\n          for value in values:", "          if values:"),
            "result = 0\n        for value in values:",
            "if values:",
        ),
        (block("result += value", "if value:\n    result += value"), "result += value", "if value:\n                result += value"),
        ("<<<<<<< SEARCH\nresult += value\n=======\n>>>>>>> REPLACE", "            result += value\n", ""),
        (block("def run():", "def run():  # now").replace("\n", "\r\n"), "def run():", "def run():  # now"),
        ("<<<<<< SEARCH\ndef run():\n=====\ndef go():\n>>>>>>> REPLACE", "def run():", "def go():"),
        ("<<<<<<< search:\ndef run():\n=======\ndef go():\n>>>>>>> Replace:", "def run():", "def go():"),
        ("   <<<<<<< SEARCH \ndef run():\n   ======= \ndef go():\n >>>>>>>REPLACE", "def run():", "def go():"),
        ("<<<<<<< SEARCH\n        result = 0\n=======\n>>>>>>> REPLACE", "        result = 0\n", ""),
        (block("    return Solver().total(np.arange(3))", "    return 3"), "    return Solver().total(np.arange(3))", "    return 3"),
    ],
    ids=[
        "fence",
        "part",
        "lines",
        "ends",
        "dedented",
        "indented",
        "one dedented",
        "delete dedented",
        "crlf",
        "signs",
        "case",
        "spaces",
        "delete",
        "last line",
    ],
)
def test_what_blocks_may_look_like(answer, old, new):
    assert PROGRAM.count(old) == 1
    for program in (PROGRAM, PROGRAM.rstrip("\n")):
        assert edited(program, answer) == program.replace(old, new)


def test_whole_lines_come_before_parts_of_lines():
    program = "x = 1\nx = 10\n  x = 1"
    assert edited(program, block("x = 1", "y = 1")) == "y = 1\nx = 10\n  x = 1"


def test_the_program_may_contain_dividers():
    program = 'title = """\nResults\n=======\n"""\nx = 1\n'
    assert edited(program, block('Results\n=======\n"""', 'Scores\n=======\n"""')) == program.replace("Results", "Scores")
    assert edited(program, block("x = 1", 'x = """\n=======\n"""')) == program.replace("x = 1", 'x = """\n=======\n"""')
    # A line of equals signs with another length divides a block only if the block has no line of seven.
    # A text with a divider, and new text that ends with one.
    assert edited("Results\n=======\nx = 1", block("Results\n=======", "Scores\n=======")) == "Scores\n=======\nx = 1"
    assert edited("=====\nx = 1", block("=====\nx = 1", "=====\nx = 2")) == "=====\nx = 2"


FIRST = block("def run():", "def run():  # now")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (block("def walk():", ""), "Edit 1 of 1: its SEARCH text occurs 0 times in the program; its first line is 'def walk"),
        (FIRST + block("\n  def walk():\nx", "") + FIRST, "Edit 2 of 3: its SEARCH text occurs 0 times .* 'def walk"),
        (FIRST + block("result", "total"), "Edit 2 of 2: its SEARCH text occurs several times"),
        (FIRST + block("def run():\n    return", "x"), "Edit 2 of 2: its SEARCH text occurs 0 times"),  # the first edit changed it
        (FIRST + block("", "x = 1"), "Edit 2 of 2: its SEARCH text is empty"),
        (block(" \n", "x = 1"), "Edit 1 of 1: its SEARCH text is empty"),
        (block("    result = 0\nfor value in values:", "x"), "Edit 1 of 1: .* with another indentation of its lines"),
        (block("            result = 0\n            for value in values:", "  x"), "Edit 1 of 1: .* its new text is not"),
        (FIRST + "<<<<<<< SEARCH\ndef run():\n>>>>>>> REPLACE", "Edit 2 of 2: it has no line ======="),
        (FIRST + "<<<<<<< SEARCH\ndef run():\n=======\n", "Edit 2 of 2: it has no line >>>>>>> REPLACE at its end"),
        ("<<<<<<< SEARCH\ndef run():\n=======\n" + FIRST, "Edit 1 of 2: it has no line >>>>>>> REPLACE before the next"),
        (FIRST + ">>>>>>> REPLACE", "after 1 of 1 edits has no line <<<<<<< SEARCH"),
        ("def run():\n=======\nx\n>>>>>>> REPLACE", "no line <<<<<<< SEARCH"),
        (block("x" + "\n=======" * 20, ""), "Edit 1 of 1: it has 21 lines ======="),
        (block("def run():", "def go():\n======="), "Edit 1 of 1: it has another line ======= at the end of its new text"),
        (FIRST + block("return result", "return 1\n=======\n=======\n\n"), "Edit 2 of 2: it has another line ======= at the end"),
        (block("esult = 0", "x = 1"), "Edit 1 of 1: its SEARCH text occurs in the program only within names or numbers"),
        (block("def run():", "def run():"), "The edits change nothing"),
        (FIRST + block("def run():  # now", "def run():"), "The edits change nothing"),
        (block(PROGRAM.rstrip("\n"), ""), "The edits leave nothing"),
        (FIRST * (MOST_EDITS + 1), f"more than {MOST_EDITS} edits"),
        (block("\x1b[2Jx\u202e" + "y" * 5000, ""), r"its first line is '\\x1b\[2Jx\\u202ey{72,80}'\.\.\."),
    ],
)  # fmt: skip
def test_edits_that_do_not_apply_name_the_block(answer, reason):
    assert has_edits(answer)
    with pytest.raises(EditError, match=reason) as error:
        edited(PROGRAM, answer)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()
    assert str(error.value).endswith(".")


def edited_or_reason(program, answer):
    try:
        return edited(program, answer), ""
    except EditError as error:
        return "", str(error)


LINES = ["<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE", "a", "  a", "b", "", "a ", "\x0c", "```"]


@given(st.lists(st.sampled_from(LINES), max_size=30), st.lists(st.sampled_from(LINES[3:]), max_size=12))
def test_any_answer_gives_a_program_or_a_reason(answer, program):
    result, reason = edited_or_reason("\n".join(program), "\n".join(answer))
    assert bool(result) != bool(reason)
    assert set(result.split()) <= {word for line in (*answer, *program) for word in line.split()}


_MANY = 10**6
HOSTILE = {
    "blocks": ("x = 1", block("x = 1", "x = 2") * _MANY),
    "dividers": ("x = 1", block("=======\n" * (_MANY // 4), "")),
    "ends": ("x = 1", "<<<<<<< SEARCH\nx = 1\n=======\nx = 2\n" + ">>>>>>> REPLACE\n" * _MANY),
    "repeated lines": ("pass \n" * 10**5, block("pass\n" * (10**5 // 2) + "x", "")),
    "distinct lines": ("x = 1", block("\n".join(map(str, range(_MANY + 1))), "")),
    "almost everywhere": ("a" * 10**6, block("a" * 10**4 + "b", "")),
    "long line": ("x = 1", block(" " * 10**7, "") + "<" * 10**7),
    "parts within words": ("ab " * 10**5, block("b a", "") * 5),
    "many programs to parse": ("".join(f"if a:\n x{number} = 1\n" for number in range(5_000)), block("x7 = 1", "x7 = 1\n y") * 100),
    "many edits of a long program": (
        "".join(f"line {number} \n" for number in range(20_000)),
        "".join(block(f"line {number}\nline {number + 1}", f"line {number}\nline {number + 1}x") for number in range(0, 60, 3)),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_take_bounded_time(name):
    program, answer = HOSTILE[name]
    began = time.process_time()
    assert len(edited_or_reason(program, answer)[1]) < 300
    assert time.process_time() - began < 3


def test_the_example_of_the_prompt_applies():
    program = "import numpy as np\n\n\ndef f(values):\n    total = sum(values)\n    return total"
    expected = program.replace("import numpy", "import math\n\nimport numpy").replace("sum(", "math.fsum(")
    assert edited(program, INSTRUCTIONS.partition("\n- ")[0]) == expected


def rollout(chat, *parts, stop=StopReason.STOP_TOKEN):
    """The rollout of these parts: texts, or names of tokens."""
    ids = [
        index
        for part in parts
        for index in ([chat.tokenizer.special(part)] if part in chat.tokenizer.added else chat.tokenizer.encode(part))
    ]
    tokens = np.asarray([*ids, *(chat.stop_ids[:1] if stop is StopReason.STOP_TOKEN else ())], np.int32)
    return Rollout(0, 0, tokens[:1], tokens, np.zeros(len(tokens), np.float32), np.ones(len(tokens), bool), stop)


@pytest.fixture(scope="module")
def qwen(chat_folder):
    return Template(chat_folder("qwen3"))


WHOLE = "```python\nx = 2\n```\n"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([block("x = 1", "x = 3")], Extracted("x = 3\ny = 1")),
        ([WHOLE], Extracted("x = 2")),
        ([WHOLE + block("x = 1", "x = 3")], Extracted("x = 3\ny = 1")),  # blocks take precedence
        (["<think>", block("x = 1", "x = 3"), "</think>", WHOLE], Extracted("x = 2")),
        (["<think>", WHOLE, "</think>", block("x = 1", "x = 3")], Extracted("x = 3\ny = 1")),
    ],
)
def test_program_of_an_answer(qwen, parts, expected):
    for stop in StopReason:
        assert extracted(rollout(qwen, *parts, stop=stop), qwen, "x = 1\ny = 1\n") == expected


def test_an_answer_without_a_program_has_a_reason(qwen):
    for answer in ("nothing", "```python\n```"):
        assert extracted(rollout(qwen, answer), qwen, "x = 1") == Extracted(None, extracted(rollout(qwen, ""), qwen, "x = 1").reason)
    assert "neither an edit" in extracted(rollout(qwen, "nothing"), qwen, "x = 1").reason
    cut = block("x = 1", "x = 3")[:-9]
    for stop in StopReason:
        assert "Edit 1 of 1" in extracted(rollout(qwen, cut, stop=stop), qwen, "x = 1").reason
    for markers in ("<<<<<<< ORIGINAL\nx = 1\n=======\nx = 3\n>>>>>>> UPDATED", "x = 1\n  >>>>>>> UPDATED"):
        answer = rollout(qwen, f"```python\n{markers}\n```")
        assert "Edits begin with a line <<<<<<< SEARCH" in extracted(answer, qwen, "x = 1").reason
        assert extracted(answer, qwen) == Extracted(markers)  # edits are not asked for
    assert extracted(rollout(qwen, "```python\nx = '<<<<<<<'\n```"), qwen, "x = 1") == Extracted("x = '<<<<<<<'")
    # Without a program to edit, only whole programs count.
    assert extracted(rollout(qwen, block("x = 1", "x = 3")), qwen).reason == "The reply holds no fenced Python block in its final channel."
    assert extracted(rollout(qwen, WHOLE), qwen) == Extracted("x = 2")
