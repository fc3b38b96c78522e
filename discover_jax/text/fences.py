"""Fenced code blocks of an answer, as a careful reader sees them: also where fences are within the code, glued to it, or missing.

Fences follow CommonMark: a block ends at a fence of the same character that is at least as long and has no info string, so a longer fence
may contain shorter ones. Extensions cover what models write:

- A fence may have any indentation, which is removed from the block. It may follow the marks of lists and quotes. A ```python fence may
  follow text.
- If the text of a block is not a valid program, the block is the longest valid program from there on that ends at another fence, wherever
  in a line that is, or at the end of the answer. So a fence in a docstring, glued to the last line, followed by a word, or missing does no
  harm.
- If there is none, a ```python fence within an open block restarts it.

Answers are untrusted. The time is linear in the length of the answer, except for parsing, which `_MOST_PARSED` limits.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
import keyword
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from discover_jax.text.structure import parses, top_level_names

PYTHON, UNLABELLED, OTHER = "python", "", "other"

_MOST_PARSED = 400_000
"""Characters of an answer's blocks that are parsed, counted as often as they are. Parsing takes up to 5 us per character."""
_MOST_FENCES = 300
"""Fences of an answer that count, the last ones."""

# The quantifiers are possessive, since backtracking would take quadratic time.
_FENCE = re.compile(r"^(?P<prefix>[^`~]*+)(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<info>[^`]*)$")
_MARKS = re.compile(r"(?:[ \t]*+(?:>|[-*+](?=[ \t])|\d{1,9}[.)](?=[ \t])))*+[ \t]*+")
_QUOTE, _TIGHT_QUOTE = re.compile(r"[ \t]*+> ?"), re.compile(r"[ \t]*+>")
_PYTHON_LABEL = re.compile(r"(?:i?python|py)[-_]?(?:\d+(?:\.\d+)*)?|pycon|python-?repl|python-?console|\S*\.py")
_NAMING = ("file", "filename", "name", "path", "title")
"""Words that precede the name of a file in an info string."""
_STRINGS_AND_COMMENTS = re.compile(
    r"(?P<comment>#[^\n]*+)"
    r"|(?P<triple>\"\"\"(?:[^\"\\]++|\\.|\"(?!\"\"))*+|'''(?:[^'\\]++|\\.|'(?!''))*+)(?P<closed>\"\"\"|''')?"
    r'|"(?:[^"\\\n]++|\\.)*+"?'
    r"|'(?:[^'\\\n]++|\\.)*+'?",
    re.DOTALL,
)
_ENDLESS = sys.maxsize
_MOST_COMMENTS = 4
"""Fences in comments at which a program may end."""
_MOST_PROSE = 40
"""Lines of prose after an open block that are looked at."""
_PROSE = re.compile(
    r"[ \t]*+(?:$|~{3,}+[ \t]*+$|(?:[-*+>]|#{1,6}|\d{1,9}[.)])[ \t]"  # blank, a fence, a list, a quote, a heading
    rf"|(?<![ \t])(?!(?:{'|'.join(word for word in keyword.kwlist if word.islower())})\b)"
    r"[^\W\d][\w'\u2019]*+[,.:;!?]?(?:[ \t]++[\w`*(\"'\u201c\u2013\u2014]|$)"
    r"|(?<![ \t])[`*_\u201c(][\w`*])"
)
_PROMPTS = (">>> ", "... ", ">>>", "...")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block: PYTHON, UNLABELLED or OTHER, its text, whether that has valid syntax, and whether it was typed in an interactive session."""

    label: str
    text: str
    valid: bool
    typed: bool = False


@dataclasses.dataclass(frozen=True)
class _Fence:
    """A line with a fence.

    Attributes:
      line: its index.
      marks: what precedes the fence if that is white space and marks of lists and quotes; None if it is text.
      fence: its characters.
      bare: whether nothing follows.
      opens: whether it can open a block.
      indent: characters before it, without the marks of quotes.
    """

    line: int
    marks: str | None
    fence: str
    bare: bool
    opens: bool
    label: str
    indent: int

    @property
    def depth(self) -> int:
        """Number of quotes around it."""
        return self.marks.count(">") if self.marks else 0

    def closes(self, opening: "_Fence") -> bool:
        in_place = self.marks is not None and not self.marks.replace(">", "").strip() and self.depth <= opening.depth
        return in_place and self.bare and self.fence[0] == opening.fence[0] and len(self.fence) >= len(opening.fence)

    def restarts(self, opening: "_Fence") -> bool:
        return self.marks is not None and self.label == PYTHON and self.fence == opening.fence and self.depth == opening.depth


def find_blocks(answer: str, truncated: bool, names: Sequence[str]) -> list[Block]:
    """The blocks of an answer that are not blank, in order.

    Args:
      truncated: whether the token budget cut the answer. Then an unclosed block counts even if it is not a valid program.
      names: functions that the program must define, of which a block extended beyond its first fence, or left open, has at least one.
    """
    return _Reader(re.sub("\r\n?", "\n", answer), truncated, frozenset(names)).blocks()


def defines(code: str, names: frozenset[str], *, valid: bool) -> bool:
    """Whether a program defines one of these functions. `valid`: whether its syntax is."""
    if valid:
        return not names.isdisjoint(top_level_names(code))
    return _definition(names).search(code) is not None


def _definition(names: frozenset[str]) -> re.Pattern[str]:
    return re.compile(rf"^[^\S\n]*+(?:async[ \t]++)?def[ \t]++(?:{'|'.join(map(re.escape, sorted(names)))})\b", re.MULTILINE)


class _Reader:
    """Reads the blocks of one answer.

    `_parsed` counts the characters that were parsed. Those that were only copied or searched, which is faster, count a quarter.
    """

    def __init__(self, answer: str, truncated: bool, names: frozenset[str]):
        self._lines = answer.split("\n")
        self._truncated, self._names, self._parsed = truncated, names, 0
        found = (_fence(number, line) for number, line in enumerate(self._lines) if "```" in line or "~~~" in line)
        self._fences = [fence for fence in found if fence is not None][-_MOST_FENCES:]
        self._used: set[int] = set()  # lines whose fences close a block that was opened to look inside

    def blocks(self) -> list[Block]:
        found: list[Block] = []
        line = 0
        for position, fence in enumerate(self._fences):
            if fence.line >= line and fence.opens and fence.line not in self._used:
                block, line = self._block(fence, self._fences[position + 1 :])
                if block is not None and block.text.strip():
                    found.append(block)
        return found

    def _block(self, opening: _Fence, later: Sequence[_Fence]) -> tuple[Block | None, int]:
        """The block of a fence, if it opens one, and the line at which to read on."""
        end = self._end(opening)
        later = [fence for fence in later if fence.line < end]
        if self._may_parse:
            closing = next((fence for fence in later if fence.closes(opening)), None)
            closed = None if closing is None else self._text(opening, closing.line)
            if closing is not None and closed is not None:
                if not closed.strip():
                    return None, closing.line + 1
                if (program := self._program(closed, opening.label)) is not None:
                    typed = program != closed and program == _without_prompts(closed)
                    return Block(opening.label, program, valid=True, typed=typed), closing.line + 1
            # Whatever follows another block than one of Python belongs to it only if its beginning looks like a program.
            may_extend = opening.label == PYTHON or closed is None or self._mentions(closed) or _ends_in_string(closed)
            if may_extend and (extended := self._extended(opening, end)) is not None:
                return extended
        return self._as_marked(opening, later, end)

    def _mentions(self, text: str) -> bool:
        return _definition(self._names).search(text) is not None

    @property
    def _may_parse(self) -> bool:
        return self._parsed <= _MOST_PARSED

    def _parses(self, text: str) -> bool:
        self._parsed += len(text)
        return self._may_parse and parses(text)

    def _is_program(self, text: str) -> bool:
        return self._parses(text) and defines(text, self._names, valid=True)

    def _program(self, text: str, label: str) -> str | None:
        """The text as a valid program; None if it is not one. Prompts of an interactive session and a common indentation are removed."""
        if self._parses(text):
            return text
        others = [] if label == OTHER else [textwrap.dedent(text), _without_prompts(text)]
        return next((other for other in others if other != text and self._is_program(other)), None)

    def _extended(self, opening: _Fence, end: int) -> tuple[Block, int] | None:
        """The longest valid program from the fence on that ends at another fence, or at the end of the answer."""
        lines = _without_cut_fence(self._stripped(opening, end), opening.fence)
        body = "\n".join(lines)
        if not self._mentions(body):
            return None
        for stop in _stops(body, opening.fence):
            text = body[:stop].rstrip().lstrip("\n")
            if self._is_program(text):
                last = opening.line + 1 + body.count("\n", 0, stop)
                follows = any(fence.line == last and fence.opens and fence.label == PYTHON for fence in self._fences)
                return Block(opening.label, text, valid=True), last if follows else last + 1
        return self._without_prose(opening, body)

    def _without_prose(self, opening: _Fence, body: str) -> tuple[Block, int] | None:
        """The longest valid program that only prose separates from the end of an open block: no code is lost. None if there is none."""
        stop = _stops(body, opening.fence)[0]
        last = opening.line + 1 + body.count("\n", 0, stop)
        if any(fence.line == last and fence.closes(opening) for fence in self._fences):
            return None
        lines = body[:stop].rstrip().split("\n")
        for count in range(len(lines) - 1, max(0, len(lines) - 1 - _MOST_PROSE), -1):
            if not _PROSE.match(lines[count]):
                return None
            text = _trimmed(lines[:count]).rstrip()
            if lines[count].strip() and self._is_program(text):
                return Block(opening.label, text, valid=True), last
        return None

    def _as_marked(self, opening: _Fence, later: Sequence[_Fence], end: int) -> tuple[Block | None, int]:
        """The block as its fences mark it, though it is not a valid program."""
        marks = [fence for fence in later if fence.closes(opening) or fence.restarts(opening)]
        # Whatever the text of this block is: reading on at the first mark misses no block that follows.
        resume = marks[0].line + marks[0].closes(opening) if marks else end
        outside = self._outside_strings(opening, marks, end)
        if not outside:
            if end == len(self._lines) and not self._truncated:
                return None, resume
            text = _trimmed(_without_cut_fence(self._stripped(opening, end), opening.fence))
            return Block(opening.label, text, valid=False), resume
        if not outside[0].closes(opening):
            return None, resume
        text = self._text(opening, outside[0].line)
        inner = opening.label != PYTHON and any(fence.line < outside[0].line and fence.label == PYTHON for fence in later)
        if inner and self._mentions(text):  # such as an answer that is quoted as Markdown as a whole
            self._used.add(outside[0].line)
            return None, opening.line + 1
        return Block(opening.label, text, valid=False), resume

    def _outside_strings(self, opening: _Fence, marks: list[_Fence], end: int) -> list[_Fence]:
        """Those of the fences that are not within a string of a Python block. If all are, those within a string that never ends."""
        if opening.label != PYTHON or not marks or not self._may_parse:
            return marks
        lines = self._stripped(opening, end)
        strings = _parts("\n".join(lines)).long_strings
        starts = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
        ends = {fence: strings.end_of(starts[fence.line - opening.line - 1]) for fence in marks}
        outside = [fence for fence in marks if ends[fence] is None]
        return outside or [fence for fence in marks if ends[fence] == _ENDLESS and fence.closes(opening)]

    def _end(self, opening: _Fence) -> int:
        """The line after the last one that can belong to the block. A quoted block ends with its quote."""
        if not opening.depth:
            return len(self._lines)
        return self._unquoted[bisect.bisect_right(self._unquoted, opening.line)]

    @functools.cached_property
    def _unquoted(self) -> list[int]:
        """The lines outside of quotes, and the end of the answer."""
        return [*(number for number, line in enumerate(self._lines) if not _QUOTE.match(line)), len(self._lines)]

    def _text(self, opening: _Fence, end: int) -> str:
        return _trimmed(self._stripped(opening, end))

    def _stripped(self, opening: _Fence, end: int) -> list[str]:
        """The lines after the fence without its marks of quotes and its indentation."""
        lines = self._lines[opening.line + 1 : end]
        self._parsed += (sum(map(len, lines)) + len(lines)) // 4
        mark = _TIGHT_QUOTE if opening.marks and opening.marks.endswith(">") else _QUOTE
        for _ in range(opening.depth):
            lines = [line[quote.end() :] if (quote := mark.match(line)) else line for line in lines]
        if opening.indent:
            lines = [line[min(opening.indent, len(line) - len(line.lstrip(" \t"))) :] for line in lines]
        return lines


def _fence(number: int, line: str) -> _Fence | None:
    if not (match := _FENCE.match(line)):
        return None
    prefix, info = match["prefix"], match["info"].strip()
    marks = prefix if _MARKS.fullmatch(prefix) else None
    inner = prefix if marks is not None else prefix[: len(prefix) - len(prefix.lstrip(" \t"))]
    if marks and ">" in marks:
        inner = marks.rpartition(">")[2].removeprefix(" ")
    label = _label(info)
    opens = marks is not None or (label == PYTHON and len(info.split()) == 1)
    return _Fence(number, marks, match["fence"], not info, opens, label, len(inner))


def _label(info: str) -> str:
    """The kind of a block. Python is also "Python title=x", "{.python}", "python3.11", "pycon", "solution.py" and "python:solution.py"."""
    words = [word.strip(".") for word in re.findall(r"[^\s,;:={}()\[\]<>\"']++", info.lower()[:200])]
    if len(words) > 1 and words[0] in _NAMING:
        words = words[1:]
    if not words:
        return UNLABELLED
    return PYTHON if _PYTHON_LABEL.fullmatch(words[0]) else OTHER


def _without_prompts(text: str) -> str:
    """The input of an interactive session; the text itself if it is none."""
    lines = text.split("\n")
    if not any(line.startswith(">>>") for line in lines):
        return text
    typed = []
    for line in lines:
        if prompt := next((prompt for prompt in _PROMPTS if line.startswith(prompt)), ""):
            typed.append(line[len(prompt) :])
    return "\n".join(typed)


def _without_cut_fence(lines: list[str], fence: str) -> list[str]:
    """The lines without a last one that is the beginning of the closing fence."""
    last = lines[-1].strip() if lines else ""
    return lines[:-1] if last and not last.strip(fence[0]) and len(last) < len(fence) else lines


def _trimmed(lines: list[str]) -> str:
    return "\n".join(lines).strip("\n")


class _Spans:
    """Parts of a text, in order."""

    def __init__(self, spans: Sequence[tuple[int, int]]):
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]

    def end_of(self, position: int) -> int | None:
        """The end of the part that has this position; None if none has."""
        index = bisect.bisect_right(self._starts, position) - 1
        return self._ends[index] if index >= 0 and position < self._ends[index] else None


class _Parts(NamedTuple):
    """Parts of a program. Strings in triple quotes are also among the long ones; one that is never closed ends at `_ENDLESS`."""

    strings: _Spans
    long_strings: _Spans
    comments: _Spans


def _parts(code: str) -> _Parts:
    strings, long_strings, comments = [], [], []
    for match in _STRINGS_AND_COMMENTS.finditer(code):
        span = match.start(), _ENDLESS if match["triple"] and not match["closed"] else match.end()
        (comments if match["comment"] else strings).append(span)
        if match["triple"]:
            long_strings.append(span)
    return _Parts(_Spans(strings), _Spans(long_strings), _Spans(comments))


def _ends_in_string(code: str) -> bool:
    return _parts(code).long_strings.end_of(len(code)) == _ENDLESS


def _stops(code: str, fence: str) -> list[int]:
    """Where a program may end: at the first fence that is neither in a string nor in a comment, which no valid program has, or at the end
    of the text; else at a fence in a comment before that, the last one first."""
    parts = _parts(code)
    in_comments: collections.deque[int] = collections.deque(maxlen=_MOST_COMMENTS)
    end = len(code)
    for match in re.finditer(rf"{fence[0]}{{{len(fence)},}}+", code):
        if parts.comments.end_of(match.start()) is not None:
            in_comments.append(match.start())
        elif parts.strings.end_of(match.start()) is None:
            end = match.start()
            break
    return [end, *reversed(in_comments)]
