"""disclosure.json: what signal reached the search, who graded, and how programs were isolated; for whoever reads a run's scores."""

import json
from collections.abc import Sequence
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.runs.workdir import Workdir, write_atomic
from discover_jax.tasks.task import Task

NAME = "disclosure.json"


def write_disclosure(workdir: Workdir, tasks: Sequence[Task], *, search: dict[str, Any], isolation: str, isolated: bool) -> None:
    """Writes the file at the start of a run, and again at each resumption.

    Args:
      search: the settings that say how scores were used: advantage, reuse and the like; what JSON can hold.
      isolation: one line, as `Executor.describe` gives it. A run that is resumed on another machine keeps the lines of both.
      isolated: whether programs could not reach the answers; once False, it stays so.

    Raises:
      RunError: an earlier file cannot be read, or this one not written.
    """
    earlier = _read(workdir)
    lines = earlier["isolation"]["lines"] if earlier else []
    content = {
        "competitions": [_disclosed(task) for task in tasks],
        "search": search,
        "isolation": {
            "isolated": isolated and (earlier["isolation"]["isolated"] if earlier else True),
            "lines": [*lines, *([] if isolation in lines else [isolation])],
        },
    }
    write_atomic(workdir.path / NAME, (json.dumps(content, indent=2) + "\n").encode())


def _disclosed(task: Task) -> dict[str, Any]:
    disclosure = task.disclosure
    return {
        "id": task.id,
        "metric": {"name": task.metric.name, "higher_is_better": task.metric.higher_is_better},
        "reward": {
            "source": disclosure.reward,
            "transform": task.competition.transform,
            "rows": disclosure.rows,
            "runs_of_each_program": disclosure.runs,
            "private_answers_reached_the_search": disclosure.reward == "grade",
            "text": disclosure.text,
        },
        "private_answers": {"rows": disclosure.private_rows},
        "grader": disclosure.grader,
        "leaderboard": {
            "thresholds": {threshold.name: threshold.score for threshold in task.thresholds} or "unavailable",
            "note": task.thresholds_note or "The competition's definition names none.",
        },
        "task_fingerprint": task.fingerprint,
    }


def weaker_isolation(workdir: Workdir) -> str:
    """How programs were run where that was not in a sandbox, at any time of the run; "" if they always were.

    Raises:
      RunError: disclosure.json cannot be read.
    """
    content = _read(workdir)
    assert content is not None, "written at the start of every run"
    return "" if content["isolation"]["isolated"] else "; then ".join(content["isolation"]["lines"])


def _read(workdir: Workdir) -> dict[str, Any] | None:
    path = workdir.path / NAME
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content["isolation"]["isolated"], bool) or not all(
            isinstance(line, str) for line in content["isolation"]["lines"]
        ):
            raise TypeError("isolation")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({error!r}), so it is not known how this run's programs were isolated before. Put the original back, or"
            " start a new run in another folder (--workdir)."
        ) from error
    return content
