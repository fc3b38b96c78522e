"""docs/troubleshooting.md quotes messages that the package really has, and knows every kind of error."""

import ast
import re
from pathlib import Path

import pytest

from discover_jax import exceptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
_HOLE = "\0"
"""In place of what an f-string puts in."""


def _text(node: ast.expr) -> str | None:
    """What an expression says, or None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or _HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or _HOLE) + (right or _HOLE)
    return None


def _texts() -> list[str]:
    """All texts of the package; `%s` of a message of logging is a hole, too."""
    trees = [ast.parse(file.read_text()) for file in sorted((ROOT / "discover_jax").rglob("*.py"))]
    texts = [_text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return [re.sub(r"%[sd]", _HOLE, text) for text in texts if text]


def _quoted() -> list[str]:
    """First cells of the tables under `| message |`."""
    found = []
    for table in re.findall(r"^\| message .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        found += [re.match(r"\| `(.+?)` \|", row)[1] for row in table.splitlines()]
    return found


TEXTS = "\n\n".join(f"\1{text}" for text in _texts())


def _is_said(message: str) -> bool:
    """Whether a text of the package begins like that; `...` is something that is put in, or left out of the quotation."""
    return re.search("\1" + re.escape(message).replace(re.escape("..."), "[^\1]*?"), TEXTS) is not None


def test_the_page_is_read():
    assert len(_quoted()) >= 30


@pytest.mark.parametrize("message", _quoted())
def test_quoted_messages_are_the_packages_own(message):
    assert _is_said(message)


def test_messages_that_nobody_says_are_found():
    assert not _is_said("No weights at ...: the moon is full.")
    assert not _is_said("weights at")  # not a beginning


def test_every_kind_of_error_is_there():
    kinds = {name for name, kind in vars(exceptions).items() if isinstance(kind, type) and name not in ("DiscoverError",)}
    assert {name for name in kinds if f"`{name}`" not in PAGE} == set()
