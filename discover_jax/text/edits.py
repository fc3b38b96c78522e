"""Edits: search/replace blocks in an answer, and the program that results from them.

A block replaces one place of the program:

    <<<<<<< SEARCH
    lines of the program
    =======
    the lines that take their place
    >>>>>>> REPLACE

Text outside of blocks is ignored, also code fences. Blocks apply in order, each to the result of the one before. The SEARCH text must occur
exactly once. It is compared in these ways, and the first way with an occurrence counts:

1. as whole lines;
2. as whole lines, without the white space at their ends;
3. as whole lines, without their indentation, if the indentation of all lines differs by the same white space;
4. as in 1 to 3, without the blank lines at the beginning and end of the SEARCH text. As many are removed from the new text;
5. as a part of the text that may begin and end within a line, but not within a name or number, and not with a blank line.

If whole lines differ in their indentation, the new lines are indented or dedented by the same white space. This includes a single line that
was found as a part of the text, if only white space is before it. Lines of strings are shifted, too. The new lines are taken as they are
if the program can be parsed only so.

Texts cannot contain a line <<<<<<< SEARCH or >>>>>>> REPLACE. If a block has several lines =======, the last one counts before which the
text is found in the program. If that is the first one, the new text must not end with another.

Answers are untrusted. At most `MOST_EDITS` blocks are read, and each takes time in proportion to the lengths of program and answer.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Sequence

from discover_jax.exceptions import DiscoverError
from discover_jax.text.structure import parses

MOST_EDITS = 100
"""Most blocks in an answer. An answer with more should be a whole program, so it is an error."""
_MOST_DIVIDERS = 8
"""Lines ======= of a block."""
_MOST_ITEMS, _OTHER = 10**6, chr(0x10FFFF)
"""Lines or words of a SEARCH text that are compared, and the character that stands for those that do not occur in it."""
_MOST_PARSED = 200_000
"""Characters of a program that is parsed to choose the indentation, times the number of blocks. Parsing takes up to 5 us per character."""
_SHOWN = 80
"""Characters of a line that an error shows."""

SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"
INSTRUCTIONS = f"""\
Each edit replaces one place of your last program. An answer with two edits:

{SEARCH}
import numpy as np
{DIVIDER}
import math

import numpy as np
{REPLACE}

{SEARCH}
    total = sum(values)
{DIVIDER}
    total = math.fsum(values)
{REPLACE}

- Between {SEARCH} and {DIVIDER}: whole lines, copied from the program with their indentation. They must occur in it exactly once, so copy
  enough of them.
- Between {DIVIDER} and {REPLACE}: the lines that take their place, with their own indentation. Without any, the lines are deleted.
- Edits are applied in order, each to the result of the one before. If one of them does not apply, the answer scores nothing.
- To rewrite most of the program, answer with exactly one Python code block instead, which holds the whole new program."""
"""What prompts say about the format."""

# Models miscount the signs. Only a divider can be mistaken for text of a program, so seven signs take precedence there.
_begins, _divides, _ends = (
    re.compile(rf"\s*{marker}\s*", re.IGNORECASE).fullmatch for marker in ("<{5,9} ?SEARCH:?", "={5,9}", ">{5,9} ?REPLACE:?")
)
_MARKER_LINE = re.compile(r"^[^\S\n]*(<{7}|>{7})", re.MULTILINE)
# Not within a word, and not between a digit and a dot: "x = 1" is not a part of "max_x = 1", "x = 10" or "x = 1.5".
_WORD_END = re.compile(r"(?!(?<=\w)\w|(?<=\d)\.|(?<=\.)\d)")


class EditError(DiscoverError, ValueError):
    """The edits of an answer cannot be read, or do not apply. The text names the block."""


class _NotFoundError(EditError):
    """The SEARCH text does not occur in the program."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A block as it was read: the lines between its first and last marker, and the indices of those that may divide them."""

    lines: tuple[str, ...]
    dividers: tuple[int, ...]


def has_edits(answer: str) -> bool:
    """Whether the answer has a line that begins or ends a block."""
    return any(_begins(line) or _ends(line) for line in answer.split("\n"))


def has_marker_lines(program: str) -> bool:
    """Whether a line begins with seven < or >, as the markers of blocks do. Python has no such lines but within strings."""
    return _MARKER_LINE.search(program) is not None


def edited(program: str, answer: str) -> str:
    """The program after the edits of an answer.

    Args:
      program: with "\\n" at the ends of lines; a last line break is optional.
      answer: its line breaks may be "\\r\\n".

    Raises:
      EditError: a block is incomplete or does not apply, there are none or too many, or they leave the program unchanged or empty.
    """
    blocks = read_blocks(answer.replace("\r\n", "\n"))
    result = program
    for number, block in enumerate(blocks, start=1):
        try:
            result = _applied(result, block, _MOST_PARSED // len(blocks))
        except EditError as error:
            raise EditError(f"Edit {number} of {len(blocks)}: {error}.") from None
    if result.strip("\n") == program.strip("\n"):
        raise EditError("The edits change nothing.")
    if not result.strip():
        raise EditError("The edits leave nothing of the program.")
    return result


def read_blocks(answer: str) -> list[Block]:
    """The blocks of an answer, at least one.

    Raises:
      EditError: a block is incomplete, or there are none or too many.
    """
    lines = answer.split("\n")
    # Lazily: an answer may have millions.
    count = sum(1 for _ in itertools.islice((line for line in lines if _begins(line)), MOST_EDITS + 1))
    if count > MOST_EDITS:
        raise EditError(f"The answer has more than {MOST_EDITS} edits. Write the whole program instead.")
    if not count:
        raise EditError(f"The answer has no line {SEARCH}.")
    blocks: list[Block] = []
    start: int | None = None
    for number, line in enumerate(lines):
        if _begins(line):
            if start is not None:
                raise EditError(f"Edit {len(blocks) + 1} of {count}: it has no line {REPLACE} before the next {SEARCH}.")
            start = number + 1
        elif _ends(line):
            if start is None:
                raise EditError(f"A line {REPLACE} after {len(blocks)} of {count} edits has no line {SEARCH} before it.")
            blocks.append(_block(lines[start:number], f"Edit {len(blocks) + 1} of {count}"))
            start = None
    if start is not None:
        raise EditError(f"Edit {count} of {count}: it has no line {REPLACE} at its end.")
    return blocks


def _block(lines: Sequence[str], edit: str) -> Block:
    dividers = [index for index, line in enumerate(lines) if _divides(line)]
    dividers = [index for index in dividers if lines[index].strip() == DIVIDER] or dividers
    if not dividers:
        raise EditError(f"{edit}: it has no line {DIVIDER} between {SEARCH} and {REPLACE}.")
    if len(dividers) > _MOST_DIVIDERS:
        raise EditError(f"{edit}: it has {len(dividers):,} lines {DIVIDER}; at most {_MOST_DIVIDERS} are allowed.")
    return Block(tuple(lines), tuple(dividers))


def _applied(program: str, block: Block, most_parsed: int) -> str:
    """The program after one edit.

    Raises:
      EditError: it does not apply.
    """
    first, *others = block.dividers
    for divider in reversed(others):
        with contextlib.suppress(_NotFoundError):
            return _replaced(program, block.lines[:divider], block.lines[divider + 1 :], most_parsed)
    result = _replaced(program, block.lines[:first], block.lines[first + 1 :], most_parsed)
    if others and not any(line.strip() for line in block.lines[others[-1] + 1 :]):
        raise EditError(f"it has another line {DIVIDER} at the end of its new text")
    return result


def _replaced(program: str, search: Sequence[str], new: Sequence[str], most_parsed: int) -> str:
    """The program with the only occurrence of `search` replaced by the lines `new`.

    Args:
      most_parsed: characters of a program that may be parsed.

    Raises:
      EditError: there is none, or there are several.
    """
    if not any(line.strip() for line in search):
        raise EditError("its SEARCH text is empty; it must be text of the program that occurs exactly once")
    lines, place = program.split("\n"), None
    for sought, its_new in dict.fromkeys([(tuple(search), tuple(new)), _without_blank_edges(search, new)]):
        place = _place_of_lines(program, lines, sought)
        if place is not None and (shift := _shift(lines[place : place + len(sought)], sought)) is not None:
            return _replaced_lines(lines, place, len(sought), its_new, shift, most_parsed)
    start = _place_of_part(program, search)
    if start is None:
        how = "0 times in the program" if place is None else "in the program only with another indentation of its lines"
        raise _NotFoundError(f"its SEARCH text occurs {how}; {_first_line(search)}")
    end = start + sum(map(len, search)) + len(search) - 1
    line_start = program.rfind("\n", 0, start) + 1
    if len(search) == 1 and not program[line_start:start].strip():
        place = program.count("\n", 0, start)
        *its_new, last = new or ("",)
        its_new.append(last + lines[place][end - line_start :])
        return _replaced_lines(lines, place, 1, its_new, ("", program[line_start:start]), most_parsed)
    return program[:start] + "\n".join(new) + program[end:]


def _without_blank_edges(search: Sequence[str], new: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`search` without the blank lines at its beginning and end, and `new` without at most as many."""
    filled = [index for index, line in enumerate(search) if line.strip()]
    before, after = filled[0], len(search) - 1 - filled[-1]
    start, end = 0, len(new)
    while start < min(before, end) and not new[start].strip():
        start += 1
    while end > max(len(new) - after, start) and not new[end - 1].strip():
        end -= 1
    return tuple(search[before : filled[-1] + 1]), tuple(new[start:end])


def _place_of_lines(program: str, lines: Sequence[str], search: Sequence[str]) -> int | None:
    """The index of the only whole lines of the program that equal `search`, if need be up to white space; None if there are none.

    Raises:
      EditError: they occur several times.
    """
    text = "\n".join(search)
    if (start := _only(f"\n{program}\n", f"\n{text}\n", search)) is not None:
        return program.count("\n", 0, start)
    for key in (str.rstrip, str.strip):
        if (place := _only_items([key(line) for line in lines], [key(line) for line in search], search)) is not None:
            return place
    return None


def _place_of_part(program: str, search: Sequence[str]) -> int | None:
    """The index of the only character at which `search` begins, as a part of the program; None if there is none.

    Raises:
      EditError: it occurs several times, or only within names and numbers.
    """
    text = "\n".join(search)
    if not search[0].strip() or not search[-1].strip() or text not in program:
        return None  # with a blank line at its end, the new text would be joined with the next line
    start = program.find(text)
    if program.find(text, start + 1) < 0:  # the usual case, which takes less time
        whole = _WORD_END.match(program, start) and _WORD_END.match(program, start + len(text))
        place = start if whole else None
    else:
        words = _words(program)
        index = _only_items(words, _words(text), search)
        place = None if index is None else sum(map(len, words[:index]))
    if place is None:
        raise _NotFoundError(f"its SEARCH text occurs in the program only within names or numbers; {_first_line(search)}")
    return place


def _words(text: str) -> list[str]:
    """The names and numbers of a text, and the characters between them."""
    return [word for word in _WORD_END.split(text) if word]


def _only_items(items: Sequence[str], sought: Sequence[str], search: Sequence[str]) -> int | None:
    """The index in `items` at which the sequence `sought` begins; None if it does not occur.

    Raises:
      EditError: it occurs several times.
    """
    if len(sought) > min(len(items), _MOST_ITEMS):
        return None
    # Each distinct item becomes one character, so that `str.find`, which takes linear time, can look for a sequence of them.
    letters: dict[str, str] = {}
    part = "".join(letters.setdefault(item, chr(len(letters))) for item in sought)
    return _only("".join(letters.get(item, _OTHER) for item in items), part, search)


def _only(text: str, part: str, search: Sequence[str]) -> int | None:
    """Where `part` occurs in a text; None if it does not.

    Raises:
      EditError: it occurs several times.
    """
    place = text.find(part)
    if place >= 0 and text.find(part, place + 1) >= 0:
        raise EditError(f"its SEARCH text occurs several times in the program; {_first_line(search)}")
    return place if place >= 0 else None


def _replaced_lines(
    lines: Sequence[str], place: int, count: int, new: Sequence[str], shift: tuple[str, str], most_parsed: int
) -> str:  # fmt: skip
    """The program with `count` lines from `place` on replaced by the lines `new`, shifted unless only the plain ones can be parsed.

    Raises:
      EditError: see `_shifted`.
    """
    shifted = _shifted(new, *shift)
    # Models also write the new lines as they must be in the program, often but for the first one.
    versions = (shifted, list(new), [*shifted[:1], *new[1:]])
    programs = ["\n".join([*lines[:place], *version, *lines[place + count :]]) for version in versions]
    if shifted == list(new) or max(map(len, programs)) > most_parsed:
        return programs[0]
    return next(filter(parses, programs), programs[0])


def _shift(found: Sequence[str], search: Sequence[str]) -> tuple[str, str] | None:
    """(white space to remove, white space to add) that turns the indentation of `search` into that of the lines `found`.

    None if it differs from line to line.
    """
    pairs = [(_indentation(there), _indentation(here)) for there, here in zip(found, search, strict=True) if here.strip()]
    there, here = pairs[0]
    if there.endswith(here):
        removed, added = "", there[: len(there) - len(here)]
    elif here.endswith(there):
        removed, added = here[: len(here) - len(there)], ""
    else:
        return None
    return None if any(removed + there != added + here for there, here in pairs) else (removed, added)


def _shifted(lines: Sequence[str], removed: str, added: str) -> list[str]:
    """The lines with another indentation. Blank lines are kept.

    Raises:
      EditError: a line does not begin with the white space that is to be removed.
    """
    if any(line.strip() and not line.startswith(removed) for line in lines):
        raise EditError(f"its SEARCH text is indented by {len(removed)} characters more than the program, but its new text is not")
    return [added + line[len(removed) :] if line.strip() else line for line in lines]


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _first_line(search: Sequence[str]) -> str:
    """The first line that is not blank, with escapes for characters that are not printable."""
    line = next(line.strip() for line in search if line.strip())
    return f"its first line is {line[:_SHOWN]!r}{'...' if len(line) > _SHOWN else ''}"
