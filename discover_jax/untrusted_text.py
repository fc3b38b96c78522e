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
# A C1 control is more often text in a wrong encoding than part of an escape sequence. So it begins a sequence only where the
# text after it cannot be ordinary text.
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b(?=[\d;?]))(?P<number>\d{0,4})(?:;(?P<second>\d{1,4}))?[\d;:<=>?]*[ -/]*(?P<command>[@-~])"  # such as a colour
    # A string on one line, such as a window's title or a link. It contains no other opener, so the search for its end takes linear time.
    r"|(?:\x1b[\]P^_X](?=[^\r\n\x07\x1b\x90\x98\x9c-\x9f]*+(?:\x07|\x1b\\|\x9c))"
    r"|[\x9d\x90\x9e\x9f\x98](?=[^\r\n\x07\x1b\x90\x98\x9c-\x9f]*+(?:\x07|\x1b\\)))[^\x07\x1b\x9c]*+(?:\x07|\x1b\\|\x9c)"
    r"|\x1b(?P<cursor>[78])"
    r"|\x1b[ -/]*[0-~]?"
)
_PIECE = re.compile(
    rf"(?P<escape>{_ESCAPE.pattern})|(?P<move>[\r\n\b])|(?P<text>[^\r\n\b\x1b\x90\x98\x9b\x9d-\x9f]+|[\x90\x98\x9b\x9d-\x9f])"
)


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

    Carriage returns, backspaces, moves of the cursor within the text and deletions have their effect; colours and titles have none. Text
    that is deleted as a whole leaves no blanks. The rest is `printable`.
    """
    if not re.search("[\r\b\x1b\x9b]", text):
        return printable(text)
    screen = _Screen()
    for piece in _PIECE.finditer(text):
        if (shown := piece["text"]) is not None:
            screen.write(shown)
        elif piece["move"]:
            screen.move(piece["move"])
        elif piece["cursor"]:
            screen.control("s" if piece["cursor"] == "7" else "u", "", "")
        elif piece["command"]:
            screen.control(piece["command"], piece["number"] or "", piece["second"] or "")
    return printable("\n".join("".join(line) for line in screen.lines))


class _Screen:
    """Lines of text and a cursor, which stays within them."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = [[]]
        self._row = self._column = 0
        self._saved = (0, 0)

    def write(self, text: str) -> None:
        self.lines[self._row][self._column : self._column + len(text)] = text
        self._column += len(text)

    def move(self, character: str) -> None:
        """Obeys a line feed, a carriage return or a backspace."""
        if character == "\n":
            self._place(self._row + 1, 0)
        else:
            self._column = 0 if character == "\r" else max(0, self._column - 1)

    def control(self, command: str, number: str, second: str) -> None:
        """Obeys a control sequence with up to two numbers. Others than those for moves and deletions have no effect."""
        count, row, column = max(1, int(number or 0)), self._row, self._column
        if command == "K":
            self._delete_in_line(int(number or 0))
        elif command == "J":
            self._delete_lines(int(number or 0))
        elif command in "Hf":  # a position below the text begins a line there
            self._place(count - 1, max(1, int(second or 0)) - 1)
        elif command in "AF":
            self._place(max(0, row - count), 0 if command == "F" else column)
        elif command in "BE":
            self._place(min(len(self.lines) - 1, row + count), 0 if command == "E" else column)
        elif command in "CDG":
            self._place(row, {"C": column + count, "D": max(0, column - count), "G": count - 1}[command])
        elif command == "s":
            self._saved = row, column
        elif command == "u":
            self._place(*self._saved)

    def _place(self, row: int, column: int) -> None:
        if row >= len(self.lines):
            self.lines.append([])
        self._row = min(row, len(self.lines) - 1)
        self._column = min(column, len(self.lines[self._row]))

    def _delete_in_line(self, part: int) -> None:
        """Deletes the rest of the line (0), its beginning (1) or all of it (2)."""
        line = self.lines[self._row]
        if part == 0:
            del line[self._column :]
        elif part == 1:
            line[: self._column + 1] = [" "] * min(len(line), self._column + 1)
        elif part == 2:
            line[:] = [" "] * self._column

    def _delete_lines(self, part: int) -> None:
        """Deletes what follows the cursor (0), what precedes it (1) or all (2 and 3). Lines that are gone take no room."""
        if part == 0:
            self._delete_in_line(0)
            del self.lines[self._row + 1 :]
        elif part == 1:
            self._delete_in_line(1)
            del self.lines[: self._row]
            self._row = 0
        elif part in (2, 3):
            self.lines, self._row, self._column = [[]], 0, 0


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
