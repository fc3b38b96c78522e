"""Extracts the program from an answer: its last fenced Python block that defines what the program must define."""

import re
from collections.abc import Sequence

from discover_jax.text.fences import OTHER, PYTHON, UNLABELLED, Block, defines, find_blocks
from discover_jax.text.structure import implemented_names, parses

ENTRY = ("run",)
"""The function that a program must define if its task does not say otherwise."""


def entry_names(interface: str) -> tuple[str, ...]:
    """The functions that a program must define by the interface of its task, such as "`count(values)` gets an array ...".

    `ENTRY` if it names none.
    """
    return tuple(dict.fromkeys(re.findall(r"`(\w+)\(", interface))) or ENTRY


def extract_program(final: str, truncated: bool, names: Sequence[str] = ENTRY) -> str | None:
    """The program in an answer; None if there is none.

    It is the last of the blocks in the first of these rows that has any; see `fences` for what a block is:

    1. blocks labelled as Python (```python, ```py, ```python3.11, ```pycon, ```solution.py, any case) that define one of `names`;
    2. blocks without a label that do;
    3. blocks with another label that do and are valid Python;
    4. blocks labelled as Python.

    Among the first three rows, blocks with a whole program go first: valid Python that implements one of `names`, see
    `implemented_names`, and is not an interactive session. So an example of its use, an outline or a sketch after the program does not
    replace it.

    Args:
      final: the answer's text.
      truncated: whether the token budget cut the answer. Then an unclosed block is accepted as it is. Otherwise an unclosed block counts
        only if it is a valid program that defines one of `names`.
      names: functions that the program must define.
    """
    wanted = frozenset(names)
    kinds = (PYTHON, UNLABELLED, OTHER)
    rows: list[list[str]] = [[] for _ in range(7)]
    for block in find_blocks(final, truncated, names):
        if defines(block.text, wanted, valid=block.valid) and (block.valid or block.label != OTHER):
            rows[kinds.index(block.label) + (0 if _is_whole(block, wanted) else 3)].append(block.text)
        elif block.label == PYTHON:
            rows[6].append(block.text)
    return next((row[-1] for row in rows if row), None)


def _is_whole(block: Block, names: frozenset[str]) -> bool:
    return block.valid and not block.typed and not names.isdisjoint(implemented_names(block.text))


def defines_entry(code: str, names: Sequence[str] = ENTRY) -> bool:
    """Whether a program, which may have a wrong syntax, defines one of these functions."""
    return defines(code, frozenset(names), valid=parses(code))
