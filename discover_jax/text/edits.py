"""Edits: search/replace blocks in an answer, and the program that results from them.

A block replaces one place of the program:

    <<<<<<< SEARCH
    lines of the program
    =======
    the lines that take their place
    >>>>>>> REPLACE

Text outside of blocks is ignored, also code fences. Blocks apply in order, each to the result of the one before. The SEARCH text must occur
exactly once. It is compared in four ways, and the first way with an occurrence counts:

1. as whole lines;
2. as a part of the text, which may begin and end within a line;
3. as whole lines, without the white space at their ends;
4. as whole lines, without their indentation, if the indentation of all lines differs by the same white space.

If the lines that were found differ in their indentation, the new lines are indented or dedented by the same white space. This includes a
single line that was found without its indentation as a part of the text.

A block without new lines deletes lines, with their line breaks. Texts cannot contain a line <<<<<<< SEARCH or >>>>>>> REPLACE. If a block
has several lines =======, the last one counts before which the text is found in the program.

Answers are untrusted. At most `MOST_EDITS` blocks are read, and each takes time in proportion to the lengths of program and answer.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

from discover_jax.exceptions import DiscoverError

MOST_EDITS = 100
"""Blocks of an answer. More are an error: an answer with so many should be a whole program."""
_MOST_DIVIDERS = 8
"""Lines ======= of a block."""
_MOST_LINES, _OTHER = 10**6, chr(0x10FFFF)
"""Lines of a SEARCH text that are compared without white space, and the character that stands for lines that do not occur in it."""
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
_begins, _divides, _ends = (re.compile(rf"\s*{marker}\s*").fullmatch for marker in ("<{5,9} ?SEARCH", "={5,9}", ">{5,9} ?REPLACE"))


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
            result = _applied(result, block)
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


def _applied(program: str, block: Block) -> str:
    """The program after one edit.

    Raises:
      EditError: it does not apply.
    """
    first, *others = block.dividers
    for divider in reversed(others):
        with contextlib.suppress(_NotFoundError):
            return _replaced(program, block.lines[:divider], block.lines[divider + 1 :])
    return _replaced(program, block.lines[:first], block.lines[first + 1 :])


def _replaced(program: str, search: Sequence[str], new: Sequence[str]) -> str:
    """The program with the only occurrence of `search` replaced by the lines `new`.

    Raises:
      EditError: there is none, or there are several.
    """
    text = "\n".join(search)
    if not text.strip():
        raise EditError("its SEARCH text is empty; it must be text of the program that occurs exactly once")
    padded, lines = f"\n{program}\n", f"\n{text}\n"
    if (place := _only(padded, lines, search)) is not None:
        start, end = place, place + len(text) + 1  # a line break and the lines, in `padded`
        return (padded[:start] + "".join(f"\n{line}" for line in new) + padded[end:])[1:-1]
    if (place := _only(program, text, search)) is not None:
        if len(search) == 1 and _fills_line(program, place, place + len(text)):
            return _replaced_lines(program.split("\n"), program.count("\n", 0, place), search, new)
        return program[:place] + "\n".join(new) + program[place + len(text) :]
    program_lines = program.split("\n")
    for key in (str.rstrip, str.strip):
        if (place := _only_lines(program_lines, search, key)) is not None:
            return _replaced_lines(program_lines, place, search, new)
    raise _NotFoundError(f"its SEARCH text occurs 0 times in the program; {_first_line(search)}")


def _only(text: str, part: str, search: Sequence[str]) -> int | None:
    """Where `part` occurs in a text; None if it does not.

    Raises:
      EditError: it occurs several times.
    """
    place = text.find(part)
    if place >= 0 and text.find(part, place + 1) >= 0:
        raise EditError(f"its SEARCH text occurs several times in the program; {_first_line(search)}")
    return place if place >= 0 else None


def _fills_line(program: str, start: int, end: int) -> bool:
    """Whether this part of a line is all of it except its indentation."""
    return not program[program.rfind("\n", 0, start) + 1 : start].strip() and program[end : end + 1] in ("", "\n")


def _replaced_lines(lines: Sequence[str], place: int, search: Sequence[str], new: Sequence[str]) -> str:
    """The program whose lines from `place` on, which equal `search` up to white space, are replaced.

    Raises:
      EditError: see `_shift` and `_shifted`.
    """
    end = place + len(search)
    return "\n".join([*lines[:place], *_shifted(new, *_shift(lines[place:end], search)), *lines[end:]])


def _only_lines(lines: Sequence[str], search: Sequence[str], key: Callable[[str], str]) -> int | None:
    """The index in `lines` at which `search` begins, where lines count as equal if their keys are; None if there is none.

    Raises:
      EditError: it occurs several times.
    """
    if len(search) > min(len(lines), _MOST_LINES):
        return None
    # Each distinct line becomes one character, so that `str.find`, which takes linear time, can look for a sequence of lines.
    letters: dict[str, str] = {}
    sought = "".join(letters.setdefault(key(line), chr(len(letters))) for line in search)
    text = "".join(letters.get(key(line), _OTHER) for line in lines)
    return _only(text, sought, search)


def _shift(found: Sequence[str], search: Sequence[str]) -> tuple[str, str]:
    """(white space to remove, white space to add) that turns the indentation of `search` into that of the lines `found`.

    Raises:
      EditError: it differs from line to line.
    """
    pairs = [(_indentation(there), _indentation(here)) for there, here in zip(found, search, strict=True) if here.strip()]
    there, here = pairs[0]
    if there.endswith(here):
        removed, added = "", there[: len(there) - len(here)]
    elif here.endswith(there):
        removed, added = here[: len(here) - len(there)], ""
    else:
        raise _indentation_error(search)
    if any(removed + there != added + here for there, here in pairs):
        raise _indentation_error(search)
    return removed, added


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


def _indentation_error(search: Sequence[str]) -> EditError:
    return _NotFoundError(f"its SEARCH text occurs in the program only with another indentation of its lines; {_first_line(search)}")


def _first_line(search: Sequence[str]) -> str:
    """The first line that is not blank, with escapes for characters that are not printable."""
    line = next(line.strip() for line in search if line.strip())
    return f"its first line is {line[:_SHOWN]!r}{'...' if len(line) > _SHOWN else ''}"
