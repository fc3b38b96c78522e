"""Packs thousands of programs into a few hundred kilobytes: children are stored as differences, equal lines and texts once."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from discover_jax.types import Attempt, Outcome
from discover_jax.untrusted_text import printable

STDOUT_CHARS = 600
"""The page shows this many characters of the end of a program's output; the journal holds more."""
DETAIL_CHARS = 1200
NONE = -1


@dataclasses.dataclass(frozen=True)
class Packed:
    """Programs and outputs of many attempts.

    Attributes:
      lines: distinct program lines that are not copied from a parent.
      programs: for each distinct program [base, op, op, ...]: `base` is the program that lines are copied from, or -1. An op is a row of
        `lines`, or two numbers, -(first + 1) and count: lines first, first + 1, ... of the base.
      texts: distinct details, feedbacks and outputs.
      rows: for each attempt [program, detail or feedback, stdout]: rows of `programs` and `texts`, or -1 for none.
      left_out: number of attempts with a program that did not fit.
    """

    lines: list[str]
    programs: list[list[int]]
    texts: list[str]
    rows: list[list[int]]
    left_out: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def pack(attempts: Sequence[Attempt], room: int) -> Packed:
    """Packs as many attempts as fit: the best first, each with its ancestors, then failures, the latest first.

    Args:
      attempts: rows of the journal.
      room: approximate limit of the compressed size in bytes.
    """
    packing = _Packing(attempts)
    rows = {attempt.id: [NONE, NONE, NONE] for attempt in attempts}
    done: set[str] = set()
    left_out = 0
    for attempt in _by_rank(attempts):
        if attempt.id in done:
            continue
        if packing.size >= room:
            left_out += attempt.code is not None
            continue
        for each in packing.with_ancestors(attempt, done):
            done.add(each.id)
            rows[each.id] = packing.add(each)
    return Packed(packing.lines, packing.programs, packing.texts, [rows[attempt.id] for attempt in attempts], left_out)


def _by_rank(attempts: Sequence[Attempt]) -> Iterator[Attempt]:
    yield from sorted((a for a in attempts if a.outcome is Outcome.OK), key=lambda attempt: -attempt.reward)
    yield from reversed([a for a in attempts if a.outcome is not Outcome.OK])


class _Packing:
    """The growing tables and their compressed size."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self.lines: list[str] = []
        self.programs: list[list[int]] = []
        self.texts: list[str] = []
        self.size = 0
        self._attempts: Mapping[str, Attempt] = {attempt.id: attempt for attempt in attempts}
        self._line_of: dict[str, int] = {}
        self._program_of: dict[str, int] = {}
        self._text_of: dict[str, int] = {}
        # Estimate each table separately: the page stores them one after another.
        self._new: dict[str, list[str]] = {"lines": [], "programs": [], "texts": []}
        self._compressors = {name: zlib.compressobj() for name in self._new}

    def with_ancestors(self, attempt: Attempt, done: set[str]) -> list[Attempt]:
        """An attempt and its ancestors that are not in `done`, oldest first."""
        chain: list[Attempt] = []
        seen: set[str] = set()  # a cycle of ids ends the chain, too
        current: Attempt | None = attempt
        while current is not None and current.id not in done and current.id not in seen:
            chain.append(current)
            seen.add(current.id)
            current = self._attempts.get(current.parent_id)
        return chain[::-1]

    def add(self, attempt: Attempt) -> list[int]:
        """Adds an attempt and returns its row."""
        said = attempt.detail or attempt.feedback
        row = [self._program(attempt), self._text(printable(said)[-DETAIL_CHARS:]), self._text(printable(attempt.stdout)[-STDOUT_CHARS:])]
        for name, new in self._new.items():
            self.size += len(self._compressors[name].compress(json.dumps(new).encode()))
            new.clear()
        return row

    def _program(self, attempt: Attempt) -> int:
        if attempt.code is None:
            return NONE
        if (known := self._program_of.get(attempt.code)) is not None:
            return known
        parent = self._attempts.get(attempt.parent_id)
        parent_code = parent.code if parent is not None and parent.code in self._program_of else None
        base = NONE if parent_code is None else self._program_of[parent_code]
        ops = self._ops(attempt.code.split("\n"), [] if parent_code is None else parent_code.split("\n"))
        self._new["programs"].append(str(ops))
        self.programs.append([base, *ops])
        self._program_of[attempt.code] = len(self.programs) - 1
        return len(self.programs) - 1

    def _ops(self, lines: Sequence[str], base: Sequence[str]) -> list[int]:
        """Copies runs of consecutive lines from the base. A new run starts at the line's first occurrence in the base."""
        first_place: dict[str, int] = {}
        for place, line in enumerate(base):
            first_place.setdefault(line, place)
        ops: list[int] = []
        following = None  # the base line after the run at the end of `ops`
        for line in lines:
            if following is not None and following < len(base) and base[following] == line:
                ops[-1] += 1
                following += 1
            elif (place := first_place.get(line)) is not None:
                ops += [-(place + 1), 1]
                following = place + 1
            else:
                ops.append(self._line(line))
                following = None
        return ops

    def _line(self, line: str) -> int:
        return self._once(line, "lines", self.lines, self._line_of)

    def _text(self, text: str) -> int:
        return self._once(text, "texts", self.texts, self._text_of) if text else NONE

    def _once(self, text: str, name: str, table: list[str], places: dict[str, int]) -> int:
        if (place := places.get(text)) is None:
            place = places[text] = len(table)
            table.append(text)
            self._new[name].append(text)
        return place
