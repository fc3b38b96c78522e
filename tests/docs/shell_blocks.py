"""Finds the commands in README.md, CONTRIBUTING.md and the pages of docs/: in shell blocks with the marks above them, and in running text.

A mark is an HTML comment: `<!-- needs: weights, gpu -->` or `<!-- run by: tests/test_main.py::unbroken -->`. A mark that starts with a
word, such as `<!-- doctor needs: data -->`, applies only to commands whose program begins or ends with that word.
test_commands.py runs every command without a mark.
"""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/problems").glob("*.md")),
]

_FENCE = re.compile(r"^```(.*)$")
_MARK = re.compile(r"^<!-- (?:(\S+) )?(needs|run by): (.+) -->$")
_INLINE = re.compile(r"`((?:python|make) [^`]+)`")
_ENDS = {";", "&&", "|"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, and the marks above it."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]
    marks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command, without `...`.

    Attributes:
      where: page and line, for messages.
      words: the command as a shell splits it.
      needs: requirements that a test cannot meet; empty without such a mark.
      run_by: tests that run an equivalent command, as FILE::NAME, or a script; empty without such a mark.
    """

    where: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    run_by: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        """The module or file that Python runs, `make TARGET`, or the first word."""
        first, *rest = self.words
        if first == "python" and rest[:1] == ["-m"]:
            return rest[1]
        if first in ("python", "make"):
            return rest[0] if first == "python" else f"make {rest[0]}"
        return first

    @property
    def flags(self) -> list[str]:
        return [word for word in self.words if word.startswith("--")]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if (fence := _FENCE.match(line)) is None:
            continue
        if start is None:
            start, language = number, fence[1].strip()
            continue
        above = start
        while above and lines[above - 1].startswith("<!--"):
            above -= 1
        found.append(Block(page.name, start + 1, language, tuple(lines[start + 1 : number]), tuple(lines[above:start])))
        start = None
    assert start is None, f"{page.name}: the block at line {start} is not closed"
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a shell block."""
    marks = []
    for line in block.marks:
        mark = _MARK.match(line)
        assert mark, f"{block.page}:{block.line}: {line} is not a mark; see {__file__}"
        marks.append((mark[1], mark[2], tuple(part.strip() for part in mark[3].split(","))))
    found = []
    for line in "\n".join(block.lines).replace("\\\n", " ").split("\n"):
        for words in _split(line):
            plain = Command(f"{block.page}:{block.line}", words)
            *_, last = first, *_ = re.split(r"[. ]", plain.program)
            said = next((own for name in (last, first, None) if (own := [mark[1:] for mark in marks if mark[0] == name])), [])
            needs, run_by = (tuple(part for kind, what in said if kind == wanted for part in what) for wanted in ("needs", "run by"))
            found.append(dataclasses.replace(plain, needs=needs, run_by=run_by))
    return found


def shell_commands() -> list[Command]:
    """The commands of all shell blocks."""
    return [command for page in PAGES for block in blocks(page) if block.language == "bash" for command in commands(block)]


def inline_commands() -> list[Command]:
    """The commands in running text, where brackets mark optional parts."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for match in _INLINE.finditer(text):
            for words in _split(re.sub(r"\[(-[^\]]*)\]", r"\1", " ".join(match[1].split()))):
                found.append(Command(f"{page.name}: {match[1]}", words))
    return found


def _split(line: str) -> Iterator[tuple[str, ...]]:
    reader = shlex.shlex(line, posix=True, punctuation_chars=";&|>")
    reader.whitespace_split = True
    words: list[str] = []
    for word in [*reader, ";"]:
        if word not in _ENDS:
            words += [word] * (word != "..." and not word.endswith("=..."))
        elif words:
            yield tuple(words[: words.index(">")] if ">" in words else words)
            words = []
