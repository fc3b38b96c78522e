"""Reads a run directory: config, metrics, journal, disclosure and grades. It uses the run's own readers and checks everything.

`RunRecord.missing` lists missing files for the page.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from discover_jax.archive.journal import JournalReader
from discover_jax.exceptions import RunError
from discover_jax.records import from_row, parse_json
from discover_jax.runs.attempts import stored_seed_states
from discover_jax.runs.best import bundle_dir
from discover_jax.runs.disclosure import NAME as DISCLOSURE
from discover_jax.runs.disclosure import read_disclosure
from discover_jax.runs.metrics import read_metrics
from discover_jax.types import Attempt, State


@dataclasses.dataclass(frozen=True)
class Disclosed:
    """What disclosure.json says of one competition.

    Attributes:
      id, metric: names.
      higher_is_better: direction of the metric.
      share_of_rows: whether a score is a share of correct rows, so that its interval is binomial; None: unknown.
      rows, private_rows: number of rows of a score that the search saw, and of the private answers.
      reward, text: which rows the reward comes from: a word, and a sentence or two.
      grader: which grader was used.
      thresholds: published scores by name; empty if there are none.
      source, note: where the thresholds come from, and how far scores are comparable with them.
    """

    id: str
    metric: str
    higher_is_better: bool
    share_of_rows: bool | None
    rows: int
    private_rows: int
    reward: str
    text: str
    grader: str
    thresholds: list[Any]
    source: str | None
    note: str


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as described by its directory.

    Attributes:
      path: run directory.
      kind: "train" or "search".
      config: every setting by its dotted name.
      metrics: rows of metrics.jsonl, oldest first.
      attempts: rows of the journal, oldest first.
      disclosed: by competition id, in the run's order.
      isolation: how programs were isolated, one line for each way; empty if unknown.
      isolated: whether no program could reach the answers; None if unknown.
      goes_on_from: the run that this one continues and whose journal it took over; None if there is none.
      grades: grade.json of the best programs, by competition id.
      seeds: the seed programs, by competition id; none in runs of earlier versions.
      missing: what is missing, one sentence each.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    attempts: Sequence[Attempt]
    disclosed: Mapping[str, Disclosed]
    isolation: tuple[str, ...]
    isolated: bool | None
    goes_on_from: Mapping[str, Any] | None
    grades: Mapping[str, Mapping[str, Any]]
    seeds: Mapping[str, State]
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.name)

    @property
    def competitions(self) -> list[str]:
        """The run's own competitions, then those of the run that it continues."""
        return list(dict.fromkeys([*self.disclosed, *(attempt.task for attempt in self.attempts)]))


def read_record(folder: Path, journal: JournalReader | None = None) -> RunRecord:
    """Reads the directory of a run that finished, was interrupted or is running. Incomplete rows are skipped.

    Args:
      folder: run directory.
      journal: a reader of its journal from earlier calls, so that only new rows are parsed; None parses all rows.

    Raises:
      RunError: there is no run, or one of its files is damaged. The message names the file and says what to do.
    """
    folder = Path(folder).absolute()
    kind, config = _read_config(folder)
    metrics = read_metrics(folder / "metrics.jsonl")
    attempts = (journal or JournalReader(folder / "journal.jsonl")).read()
    content = read_disclosure(folder)
    disclosed = _disclosed(folder, content)
    missing = []
    if content is None:
        missing.append(
            f"{DISCLOSURE}: the metric's direction, the number of rows behind scores, the thresholds and the isolation are unknown; best"
            " means the highest reward."
        )
    if not attempts:
        missing.append("journal.jsonl, or it has no complete row yet: there are no programs to show.")
    if not metrics:
        missing.append("metrics.jsonl, or it has no complete row yet: metrics of updates, tokens and times are unknown.")
    grades = {id: grade for id in disclosed if (grade := _read_grade(folder, id, alone=len(disclosed) == 1)) is not None}
    missing += [
        f"best/: it has no readable grade.json of {id}, so the interval of the best program is unknown."
        for id in disclosed
        if id not in grades and any(attempt.task == id and attempt.score is not None for attempt in attempts)
    ]
    isolation = (content or {}).get("isolation", {})
    goes_on_from = (content or {}).get("goes_on_from")
    return RunRecord(
        path=folder,
        kind=kind,
        config=config,
        metrics=metrics,
        attempts=attempts,
        disclosed=disclosed,
        isolation=tuple(isolation.get("lines", ())),
        isolated=isolation.get("isolated"),
        goes_on_from=goes_on_from if isinstance(goes_on_from, dict) else None,
        grades=grades,
        seeds=stored_seed_states(folder),
        missing=tuple(missing),
    )


def _read_config(folder: Path) -> tuple[str, Mapping[str, Any]]:
    path = folder / "config.json"
    try:
        content = parse_json(path.read_bytes())
        kind, config = content["kind"], content["config"]
        if kind not in ("train", "search") or not isinstance(config, dict):
            raise TypeError("kind or config")
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} is not a run directory: it has no config.json. Give a run directory by --workdir or --compare."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a valid run config ({error!r}). Restore the original file.") from error
    return kind, config


def _disclosed(folder: Path, content: Mapping[str, Any] | None) -> dict[str, Disclosed]:
    try:
        rows = [_row(competition) for competition in (content or {}).get("competitions", [])]
        found = [from_row(Disclosed, row) for row in rows]
        for row in found:
            least = 0 if row.reward == "evaluate" else 1
            if row.rows < least or not all(isinstance(name, str) and _is_number(score) for name, score in row.thresholds):
                raise ValueError(f"rows or thresholds of {row.id!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder / DISCLOSURE} has missing or invalid fields of the competitions ({error!r}). Restore the original file."
        ) from error
    return {row.id: row for row in found}


def _row(competition: Mapping[str, Any]) -> dict[str, Any]:
    metric, reward, leaderboard = competition["metric"], competition["reward"], competition["leaderboard"]
    thresholds = leaderboard["thresholds"]
    return {
        "id": competition["id"],
        "metric": metric["name"],
        "higher_is_better": metric["higher_is_better"],
        "share_of_rows": metric.get("share_of_rows"),  # missing in runs from before reports existed
        "rows": reward["rows"],
        "private_rows": competition["private_answers"]["rows"],
        "reward": reward["source"],
        "text": reward["text"],
        "grader": competition["grader"],
        "thresholds": [] if thresholds == "unavailable" else [list(pair) for pair in thresholds.items()],
        "source": leaderboard["source"],
        "note": leaderboard["note"],
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_grade(folder: Path, competition: str, *, alone: bool) -> Mapping[str, Any] | None:
    """grade.json of the competition's best program; None if it is missing or not readable, as in `runs.best.read_best`."""
    path = bundle_dir(folder / "best", competition, alone=alone) / "grade.json"
    try:
        grade = parse_json(path.read_bytes())
    except (OSError, ValueError):  # the page reports it as missing
        return None
    is_sound = isinstance(grade, dict) and all(_is_interval(grade.get(name)) for name in ("interval_95", "private_interval_95"))
    return grade if is_sound else None


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))
