"""Text of programs, data and weights folders before it enters a prompt, a log, a terminal or a page."""

import codecs
import re
from collections.abc import Collection

_REPLACED = "\N{REPLACEMENT CHARACTER}"
# Control characters except tab and line feed, lone surrogates, and characters that are invisible or change the order of others (Unicode's
# categories Cf, Zl and Zp, and its default ignorable code points): bidirectional overrides, zero-width characters, tags, fillers.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_VARIATION = re.compile("[\ufe00-\ufe0f]+")
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)(?P<number>\d{0,4})[\d;:<=>?]*[ -/]*(?P<command>[@-~])"  # a control sequence, such as a colour
    r"|(?:\x1b[\]P^_X]|[\x9d\x90\x9e\x9f\x98])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # a string, such as a window's title or a link
    r"|\x1b[ -/]*[0-~]?"
)
_PIECE = re.compile(rf"(?P<escape>{_ESCAPE.pattern})|(?P<move>[\r\n\b])|(?P<text>[^\r\n\b\x1b\x90\x98\x9b\x9d-\x9f]+)")


def printable(text: str) -> str:
    """The text without characters that a reader does not see, or that control the terminal. A replacement character shows where they were.

    Tabs and line breaks remain. Escape sequences and the variants of emoji leave no mark, since usual output has them. Lone surrogates,
    which tokenizers reject, are replaced, too.
    """
    text = _ESCAPE.sub("", re.sub(r"\r\n?", "\n", text))
    return _HIDDEN.sub(_REPLACED, _VARIATION.sub("", text))


def one_line(text: str) -> str:
    """`printable` text in which line breaks and tabs are blanks, for names within a line."""
    return " ".join(printable(text).split())


def without_names(text: str, names: Collection[str]) -> str:
    """The text with the names of a chat format's tokens replaced, such as <|end|>. They are ordinary text to the tokenizer, but a model may
    take them for the end of a message."""
    if not any(name in text for name in names):
        return text
    return re.sub("|".join(map(re.escape, sorted(names, key=len, reverse=True))), _REPLACED, text)


def as_on_terminal(text: str) -> str:
    """What a terminal shows after it has printed the text: progress bars overwrite themselves.

    Carriage returns, backspaces, moves of the cursor within the text and deletions of the rest of a line have their effect; colours and
    titles have none. The rest is `printable`.
    """
    if not re.search("[\r\b\x1b\x9b]", text):
        return printable(text)
    lines: list[list[str]] = [[]]
    row = column = 0
    for piece in _PIECE.finditer(text):
        if (shown := piece["text"]) is not None:
            lines[row][column : column + len(shown)] = shown
            column += len(shown)
        elif piece["move"] == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append([])
        elif piece["move"]:
            column = 0 if piece["move"] == "\r" else max(0, column - 1)
        else:
            row, column = _moved(lines, row, column, piece["command"] or "", int(piece["number"] or 0))
    return printable("\n".join("".join(line) for line in lines))


def _moved(lines: list[list[str]], row: int, column: int, command: str, number: int) -> tuple[int, int]:
    """The cursor after a control sequence, which may delete a part of its line. It stays within the text."""
    count = max(1, number)
    if command == "K":
        if number == 2:
            lines[row][:] = [" "] * column
        elif number == 0:
            del lines[row][column:]
    elif command in "AF":
        row = max(0, row - count)
    elif command in "BE":
        row = min(len(lines) - 1, row + count)
    column = {"C": column + count, "D": max(0, column - count), "G": count - 1, "E": 0, "F": 0}.get(command, column)
    return row, min(column, len(lines[row]))


def collapsed(line: bytes) -> bytes:
    """An unfinished line of output without what carriage returns have overwritten. Further output has the same effect on it."""
    shown: list[str] = []
    column = 0
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for part in decoder.decode(line).split("\r"):
        shown[: len(part)] = part
        column = len(part)
    text = "".join(shown)
    return (text if column == len(text) else f"{text}\r{text[:column]}").encode("utf-8", "surrogateescape") + decoder.getstate()[0]
