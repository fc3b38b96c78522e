"""Edits: blocks are found, applied in order, and refused with the reason and the number of the block."""

import re
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
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


MARKER = re.compile(r"^\s*(<{5,9} ?SEARCH|={5,9}|>{5,9} ?REPLACE)\s*$", re.MULTILINE)


@settings(deadline=None)
@given(data=st.data(), program=st.text(alphabet="ab =\n", min_size=1, max_size=60), new=st.text(alphabet="abc \n", max_size=20))
def test_a_unique_text_is_replaced_as_by_str_replace(data, program, new):
    start = data.draw(st.integers(0, len(program) - 1))
    search = program[start : data.draw(st.integers(start + 1, len(program)))]
    expected = program.replace(search, new)
    assume(search.strip() and len(re.findall(f"(?={re.escape(search)})", program)) == 1)
    line = next((line for line in program.split("\n") if line.strip() == search.strip()), search)
    assume("\n" not in new or line == search)  # otherwise the new lines get the line's indentation
    assume(expected.strip() and expected.strip("\n") != program.strip("\n") and not MARKER.search(search))
    assert edited(program, block(search, new)) == expected


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
    # Lines of other lengths divide only if there is no line of seven signs.
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
    # Without a program to edit, only whole programs count.
    assert extracted(rollout(qwen, block("x = 1", "x = 3")), qwen).reason == "The reply holds no fenced Python block in its final channel."
    assert extracted(rollout(qwen, WHOLE), qwen) == Extracted("x = 2")
