"""disclosure.json: the source of rewards, the grader and the isolation of programs, for readers of a run's scores."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.files import write_atomic
from discover_jax.records import parse_json
from discover_jax.runs.workdir import Workdir
from discover_jax.tasks.prepare import AnyTask

NAME = "disclosure.json"


@dataclasses.dataclass(frozen=True)
class Isolation:
    """How the programs behind a run's scores were isolated.

    Attributes:
      isolated: whether no program could reach the answers.
      lines: one per kind of isolation, from `Executor.describe`, in order of first use.
    """

    isolated: bool
    lines: tuple[str, ...]

    def after(self, later: "Isolation") -> "Isolation":
        """This isolation followed by a `later` one: isolated only if both are."""
        return Isolation(self.isolated and later.isolated, tuple(dict.fromkeys([*self.lines, *later.lines])))


def write_disclosure(
    workdir: Workdir,
    tasks: Sequence[AnyTask],
    *,
    search: dict[str, Any],
    isolation: Isolation,
    goes_on_from: dict[str, Any] | None = None,
) -> None:
    """Writes the file when a run starts or resumes.

    Args:
      search: settings that control how scores are used, such as advantage and reuse, as JSON.
      isolation: of the programs of this run and of the run that it continues. A run resumed on another machine keeps the lines of both
        machines; once it is not isolated, it stays so.
      goes_on_from: JSON about the run that this one continues; None if there is none, or the file of a resumed run already has it.

    Raises:
      RunError: an earlier file cannot be read, or the new one cannot be written.
    """
    earlier = read_disclosure(workdir.path)
    if earlier is not None:
        isolation = _isolation(earlier).after(isolation)
        if workdir.resumed:  # otherwise, an earlier start without a step may have continued another run
            goes_on_from = goes_on_from or earlier.get("goes_on_from")
    content = {
        "competitions": [_disclosed(task) for task in tasks],
        "search": search,
        "goes_on_from": goes_on_from,
        "isolation": {"isolated": isolation.isolated, "lines": list(isolation.lines)},
    }
    write_atomic(workdir.path / NAME, (json.dumps(content, indent=2) + "\n").encode())


def _disclosed(task: AnyTask) -> dict[str, Any]:
    disclosure = task.disclosure
    return {
        "id": task.id,
        "metric": {
            "name": task.metric.name,
            "higher_is_better": task.metric.higher_is_better,
            "share_of_rows": task.metric.proportion,
        },
        "reward": {
            "source": disclosure.reward,
            "transform": task.transform,
            "rows": disclosure.rows,
            "selection_rows": disclosure.selection_rows,
            "runs_of_each_program": disclosure.runs,
            "private_answers_reached_the_search": disclosure.reward == "grade",
            "text": disclosure.text,
        },
        "private_answers": {"rows": disclosure.private_rows},
        "grader": disclosure.grader,
        "leaderboard": {
            "thresholds": {threshold.name: threshold.score for threshold in task.thresholds} or "unavailable",
            "source": task.thresholds_source if task.thresholds else None,
            "note": task.thresholds_note,
        },
        "task_fingerprint": task.fingerprint,
    }


def read_isolation(folder: Path) -> Isolation | None:
    """How the programs of the run in a folder were isolated; None if it has no disclosure.json.

    Raises:
      RunError: the file cannot be read.
    """
    content = read_disclosure(folder)
    return None if content is None else _isolation(content)


def _isolation(content: dict[str, Any]) -> Isolation:
    return Isolation(content["isolation"]["isolated"], tuple(content["isolation"]["lines"]))


def read_disclosure(folder: Path) -> dict[str, Any] | None:
    """The content of disclosure.json, with only its isolation checked; None if the folder has no such file.

    Raises:
      RunError: the file cannot be read.
    """
    path = folder / NAME
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content["isolation"]["isolated"], bool) or not all(
            isinstance(line, str) for line in content["isolation"]["lines"]
        ):
            raise TypeError("isolation")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"Cannot read {path} ({error!r}), which records how this run's programs were isolated. Restore the file, or start a new run in"
            " another folder (--workdir)."
        ) from error
    return content
