"""The page: one HTML file with all data that makes no network requests.

Text from programs and models reaches the page only as data: compressed, in base64, and shown by scripts as text, never as markup. The
page's Content-Security-Policy allows only its own script, by hash, and no requests.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from discover_jax import config as settings
from discover_jax.archive.journal import JournalReader
from discover_jax.files import write_atomic
from discover_jax.report.panels import panels_of
from discover_jax.report.program_table import pack
from discover_jax.report.progress import progress_of, tree_of
from discover_jax.report.record import RunRecord, read_record
from discover_jax.types import Attempt, Outcome
from discover_jax.untrusted_text import printable

NAME, COMPARISON = "report.html", "comparison.html"
LIMIT_BYTES = 5_000_000
"""Maximum size of a page. Programs that do not fit are left out; the page says how many."""
_RESERVE_BYTES = 60_000
_SCRIPTS = ("dom.js", "numbers.js", "axes.js", "charts.js", "programs.js", "diff.js", "tree.js", "details.js", "sections.js", "page.js")
_OUTCOMES = {
    Outcome.OK: "scored",
    Outcome.FORMAT_ERROR: "no program in the reply",
    Outcome.EXCEPTION: "exception",
    Outcome.INVALID_SUBMISSION: "invalid submission",
    Outcome.TIMEOUT: "timeout",
    Outcome.OUT_OF_MEMORY: "out of memory",
    Outcome.OUTPUT_FLOOD: "too much output",
    Outcome.RESULT_TOO_BIG: "result too big",
    Outcome.KILLED: "killed",
    Outcome.SANDBOX_ERROR: "sandbox error",
}


def write_report(folder: Path, compare: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Writes the page about a run, or a comparison of several runs.

    Args:
      folder: run directory. In a comparison, the page shows the tree and programs of this run.
      compare: directories of the other runs.
      out: file to write; by default report.html in `folder`, or comparison.html for a comparison.

    Returns:
      The file's path.

    Raises:
      RunError: a directory is not a run directory, one of its files is damaged, or the page cannot be written.
    """
    path = out or Path(folder) / (COMPARISON if compare else NAME)
    write_atomic(path, render([read_record(each) for each in (folder, *compare)]).encode())
    return path


class ReportWriter:
    """Writes the report of a running run repeatedly. Each time, it parses only the new rows of the journal.

    Args:
      folder: run directory.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._journal = JournalReader(self._folder / "journal.jsonl")
        self.path = self._folder / NAME
        """The page, report.html."""

    def write(self) -> Path:
        """Writes report.html: the same bytes as `write_report`.

        Returns:
          The file's path.

        Raises:
          RunError: see `write_report`.
        """
        write_atomic(self.path, render([read_record(self._folder, self._journal)]).encode())
        return self.path


def render(records: Sequence[RunRecord]) -> str:
    """The page about one or more runs; it shows the first in full. The same records give the same page.

    Raises:
      RunError: the files of a run contradict each other.
    """
    data = _packed(page_data(records))
    assets = resources.files("discover_jax.report") / "assets"
    style = (assets / "page.css").read_text("utf-8")
    script = '(() => {\n"use strict";\n' + "\n".join((assets / name).read_text("utf-8") for name in _SCRIPTS) + "\n})();"
    programs = _packed_programs(
        _shown_in_tree(records[0]), LIMIT_BYTES - _RESERVE_BYTES - len(data) - len(style.encode()) - len(script.encode())
    )
    policy = f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}'; base-uri 'none'; form-action 'none'"
    parts = {
        "policy": html.escape(policy, quote=True),
        "title": html.escape(printable(" against ".join(dict.fromkeys(record.name for record in records))), quote=True),
        "style": style,
        "data": data,
        "programs": programs,
        "script": script,
    }
    page = (assets / "page.html").read_text("utf-8")
    # One pass over the template, so that text in a part is never taken for a placeholder.
    pieces = page.split("@@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def page_data(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Everything that the page shows, except programs and their output, as JSON values.

    Raises:
      RunError: see `progress_of` and `panels_of`.
    """
    first = records[0]
    return {
        "outcomes": [_OUTCOMES[outcome] for outcome in Outcome],
        "outcome_names": [outcome.value for outcome in Outcome],
        "runs": [_run(record, label) for record, label in zip(records, _labels(records), strict=True)],
        "trees": {competition: tree_of(first, competition) for competition in first.competitions},
    }


def _shown_in_tree(record: RunRecord) -> list[Attempt]:
    """The attempts in the order of `tree_of`, one competition after another."""
    return [attempt for competition in record.competitions for attempt in record.attempts if attempt.task == competition]


def _run(record: RunRecord, label: str) -> dict[str, Any]:
    return {
        "label": label,
        "name": record.name,
        "kind": record.kind,
        "config": _config(record),
        "planned": record.config.get("train.steps"),
        "metric_steps": [row["step"] for row in record.metrics],
        "reward_mean": [row.get("reward/mean") for row in record.metrics],
        "panels": panels_of(record.metrics, record.kind, record.path / "metrics.jsonl"),
        "competitions": [progress_of(record, competition) for competition in record.competitions],
        "isolation": list(record.isolation),
        "isolated": record.isolated,
        "goes_on_from": record.goes_on_from,
        "missing": list(record.missing),
    }


def _config(record: RunRecord) -> list[list[Any]]:
    """[name, value as JSON, meaning, whether it differs from the default] of each setting. The meaning of unknown settings is empty."""
    known = settings.settings()
    return [
        [name, json.dumps(value), known[name].meaning if name in known else "", name not in known or value != known[name].default]
        for name, value in record.config.items()
    ]


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Labels that distinguish the runs: their kinds, otherwise the names or paths of their directories."""
    kinds = [{"train": "training", "search": "search"}[record.kind] for record in records]
    if len(set(kinds)) == len(records):
        return kinds
    names = [record.path.name for record in records]
    return names if len(set(names)) == len(records) else [str(record.path) for record in records]


def _packed_programs(attempts: Sequence[Attempt], room: int) -> str:
    """Packed programs of at most about `room` characters. Programs that do not fit are left out."""
    estimate = room * 3 // 4  # base64 encodes 3 bytes as 4 characters
    while len(text := _packed(pack(attempts, estimate).to_json())) > room and estimate > 0:
        estimate = estimate * 95 // 100
    return text


def _packed(value: Any) -> str:
    """Compressed JSON in base64: only letters, digits, +, / and =. The header has no timestamp."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False, separators=(",", ":")).encode(), 6, mtime=0)).decode()


def _sha256(text: str) -> str:
    """A source's hash in the form of a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
