"""Extracts the program from an answer: its last fenced Python block."""

import re

# Three or more backticks or tildes at the start of a line, with an optional info string, which contains no backticks. The quantifiers are
# possessive: answers are untrusted, and backtracking would take quadratic time.
_FENCE = re.compile(r"^(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<info>[^`]*)$")
_DEFINES_RUN = re.compile(r"^[^\S\n]*def run\b", re.MULTILINE)
_PYTHON = {"python", "python3", "py", "py3"}


def extract_program(final: str, truncated: bool) -> str | None:
    """The program in an answer; None if there is none.

    It is the last block labelled as Python (```python, ```py, any case, or with ~~~). If no block has that label, it is the last block
    without a language that defines `run`. Fences follow CommonMark: a block ends at a fence of the same character that is at least as long
    and has no info string, so a longer fence may contain shorter ones. Two extensions cover what models write: a fence may have any
    indentation, which is removed from the block, and a ```python line inside an open Python block restarts it.

    Args:
      final: the answer's text.
      truncated: whether the token budget cut the answer. Only then is an unclosed block accepted.
    """
    labelled = unlabelled = None
    for language, code in _blocks(final.replace("\r\n", "\n"), truncated):
        if not code.strip():
            continue
        if language in _PYTHON:
            labelled = code
        elif not language and _DEFINES_RUN.search(code):
            unlabelled = code
    return labelled if labelled is not None else unlabelled


def _blocks(text: str, truncated: bool) -> list[tuple[str, str]]:
    """(language in lower case, content) of each fenced block, in order."""
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if opening is None:
            if fence:
                opening, lines = fence, []
        elif fence and _closes(fence, opening):
            blocks.append((_language(opening), _dedent(lines, opening)))
            opening = None
        elif fence and _language(fence) in _PYTHON and _language(opening) in _PYTHON and fence["fence"] == opening["fence"]:
            opening, lines = fence, []
        else:
            lines.append(line)
    if opening is not None and truncated:
        # The cut may have fallen within the closing fence.
        if lines and lines[-1].strip() and not lines[-1].strip().strip("`") and len(lines[-1].strip()) < len(opening["fence"]):
            lines.pop()
        blocks.append((_language(opening), _dedent(lines, opening)))
    return blocks


def _closes(fence: re.Match[str], opening: re.Match[str]) -> bool:
    return not fence["info"].strip() and fence["fence"][0] == opening["fence"][0] and len(fence["fence"]) >= len(opening["fence"])


def _language(opening: re.Match[str]) -> str:
    """First word of the info string: "Python" of ```Python title="x", "python" of ```{python}."""
    words = re.split(r"[\s,;:]+", opening["info"].strip().strip("{}."))
    return words[0].lower()


def _dedent(lines: list[str], opening: re.Match[str]) -> str:
    """The block's text without the indentation of its opening fence and without surrounding blank lines."""
    indent = len(opening["indent"])
    return "\n".join(line[min(indent, len(line) - len(line.lstrip(" \t"))) :] for line in lines).strip("\n")
