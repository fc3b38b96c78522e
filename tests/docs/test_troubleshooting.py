"""Each row of docs/troubleshooting.md matches a message of the package, and every error class is on the page.

Messages may be reworded without a change here. A quoted message counts as current if one string of the package has half of its words and
all of its settings, and if the module of that string uses an error class that the row or its section names.
"""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest

from discover_jax import exceptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
CLASSES = {name for name, kind in vars(exceptions).items() if isinstance(kind, type)} - {"DiscoverError"}
SHARE = 0.5
"""Share of a quoted message's words that one string of the package must have."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A quoted message and the error classes that its row and its section name."""

    message: str
    classes: frozenset[str]


def _strings(node: ast.AST) -> list[str]:
    """Strings of a module except docstrings, with f-strings and sums of strings joined and inserted values dropped."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
        return ["".join(text for child in ast.iter_child_nodes(node) for text in _strings(child))]
    return [text for child in ast.iter_child_nodes(node) for text in _strings(child)]


def _words(text: str) -> frozenset[str]:
    """Words of four letters or more, in lower case; names of settings, files and options are one word."""
    return frozenset(word.strip(".-_") for word in re.findall(r"[a-z_.-]{4,}", text.lower()) if len(word.strip(".-_")) >= 4)


@functools.cache  # not at import: each test process collects this file, and one runs it
def _messages() -> list[tuple[frozenset[str], frozenset[str], str]]:
    """Words of each string of the package, the error classes that its module names, and the string."""
    found = []
    for file in sorted((ROOT / "discover_jax").rglob("*.py")):
        source = file.read_text()
        classes = frozenset(name for name in CLASSES if re.search(rf"\b{name}\b", source))
        found += [(_words(text), classes, text) for text in _strings(ast.parse(source))]
    return found


def _rows() -> list[Row]:
    """Rows of the tables whose first column is `message`."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        above = section.partition("\n|")[0]
        for table in re.findall(r"^\| *message.*\n\|[-| :]+\n((?:\|.*\n?)+)", section, re.MULTILINE | re.IGNORECASE):
            for line in table.splitlines():
                quoted = re.match(r"\| *`(.+?)` *\|", line)
                assert quoted, f"no quoted message: {line}"
                found.append(Row(quoted[1], frozenset(name for name in CLASSES if f"`{name}`" in above + line)))
    return found


def _closest(row: Row) -> tuple[float, str]:
    """The string that has the largest share of the row's words, and that share. Its module must use one of the row's error classes."""
    words = _words(row.message.replace("...", " "))
    settings = {word for word in words if word.startswith("config.") and "_" in word}
    shares = [
        (len(words & had) / max(1, len(words)), text)
        for had, classes, text in _messages()
        if settings <= had and (classes & row.classes or not row.classes)
    ]
    return max(shares, default=(0.0, ""))


def test_page_has_rows():
    assert len(_rows()) >= 20
    assert all(row.classes for row in _rows())


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row.message)
def test_quoted_message_is_in_the_package(row):
    share, text = _closest(row)
    assert share >= SHARE, f"docs/troubleshooting.md: update `{row.message}`; the closest message is {text!r}"


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("No weights at ...: the moon is full.", "WeightsError"),
        ("config.model.no_such_setting cannot be read: .... The file is damaged or truncated", "WeightsError"),
        ("config.task.raw is empty, so there is no ...", "WeightsError"),
    ],
    ids=["words", "setting", "class"],
)
def test_obsolete_message_is_detected(message, name):
    assert _closest(Row(message, frozenset({name})))[0] < SHARE


def test_every_error_class_is_on_the_page():
    assert {name for name in CLASSES if f"`{name}`" not in PAGE} == set()
