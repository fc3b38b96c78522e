"""What the checks of all hosts found: one table, the details, and the exit code."""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

from discover_jax.hosts.exit_codes import LOST, USER_ERROR


class Level(enum.Enum):
    """How serious a finding is. The value is its mark in the details."""

    OK = "ok"
    SKIPPED = "--"
    WARNING = "warn"
    TEMPORARY = "WAIT"
    """The same command may succeed later."""
    FIX = "FIX"
    """The run would fail: the user must change something."""


_ORDER = list(Level)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
      check: its name; a column of the table.
      level: how serious it is.
      text: what was found, and what to do.
      cell: what the table shows; empty: the mark of the level.
    """

    check: str
    level: Level
    text: str
    cell: str = ""

    def row(self) -> list[str]:
        """JSON values, for other hosts."""
        return [self.check, self.level.name, self.text, self.cell]


def from_row(row: Sequence[str]) -> Finding:
    """The finding of `Finding.row`."""
    return Finding(row[0], Level[row[1]], row[2], row[3])


def lines_of(names: Sequence[str], by_host: Sequence[Iterable[Finding]], of_all: Sequence[Finding]) -> list[str]:
    """The table of all hosts, and a line for each finding. Equal findings of several hosts share a line.

    Args:
      names: of the processes.
      by_host: findings of each process.
      of_all: findings about all of them together.
    """
    found = [list(each) for each in by_host]
    checks = list(dict.fromkeys(finding.check for each in found for finding in each))
    rows = [["host", *checks]]
    for name, each in zip(names, found, strict=True):
        worst = {check: max((f for f in each if f.check == check), key=_rank, default=None) for check in checks}
        rows.append([name, *(_cell(finding) for finding in worst.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    hosts: dict[Finding, list[str]] = {}
    for name, each in zip(names, found, strict=True):
        for finding in each:
            hosts.setdefault(finding, []).append(name)
    shown = [(f, "" if len(those) == len(names) else f"{', '.join(those)}: ") for f, those in hosts.items()]
    shown += [(finding, "") for finding in of_all]
    shown.sort(key=lambda item: -_rank(item[0]) if item[0].level in (Level.FIX, Level.TEMPORARY) else 0)
    width = max((len(finding.check) for finding, _ in shown), default=0)
    return [*lines, "", *(f"{f.level.value:<5} {f.check:<{width}}  {whose}{f.text}" for f, whose in shown)]


def _rank(finding: Finding) -> int:
    return _ORDER.index(finding.level)


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    if finding.level is Level.OK:
        return finding.cell or "ok"
    return f"{finding.level.value} {finding.cell}".rstrip()


def exit_code(findings: Iterable[Finding]) -> int:
    """0 if a run may start, `USER_ERROR` if something must be changed, `LOST` if only something temporary stands in the way."""
    levels = {finding.level for finding in findings}
    if Level.FIX in levels:
        return USER_ERROR
    return LOST if Level.TEMPORARY in levels else 0


def conclusion(findings: Sequence[Finding]) -> str:
    """The last line."""
    match exit_code(findings):
        case 0 if any(finding.level is Level.WARNING for finding in findings):
            return "Ready, with warnings."
        case 0:
            return "Everything is ready."
        case code if code == LOST:
            return "Something temporary is in the way (WAIT). Run the same command again."
    return "Fix the items marked FIX and run the doctor again."
