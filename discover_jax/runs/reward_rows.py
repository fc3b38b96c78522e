"""Which rows made the scores of a run: kept in its checkpoints, so that scores of other rows never get mixed with them.

Scores of one competition can be compared, and programs chosen by them, only where the same rows made them. Private scores, above all, must
not come into a run with the reward `holdout`, of which every summary says that no prompt, reward or choice saw them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.records import from_row
from discover_jax.tasks.task import Task

_CONFIG_NAMES = {
    "reward": "config.task.reward",
    "holdout_fraction": "config.task.holdout_fraction",
    "holdout_folds": "config.task.holdout_folds",
    "seed": "config.seed, which draws the held-out rows",
    "judge": "config.task.grader",
    "definition_sha256": "the competition's file, SHA-256",
}


@dataclasses.dataclass(frozen=True)
class RewardRows:
    """Which rows made the scores of a competition, and how they became rewards.

    Attributes:
      task: the competition's id.
      reward: "grade" or "holdout".
      fingerprint: the task's: equal ones grade alike.
      settings: name and value of each setting that the fingerprint covers, to tell what differs.
    """

    task: str
    reward: str
    fingerprint: str
    settings: list[Any]


def reward_rows(tasks: Iterable[Task], earlier: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """A row for each task, for `HostState.rewards`, and the `earlier` ones of other competitions, whose scores stay in the journal."""
    mine = [RewardRows(task.id, task.reward_source, task.fingerprint, [list(pair) for pair in task.settings]) for task in tasks]
    ids = {row.task for row in mine}
    return [*(dict(row) for row in earlier if row["task"] not in ids), *map(dataclasses.asdict, mine)]


def check_reward_rows(
    rows: Sequence[Mapping[str, Any]], archive: Sequence[Mapping[str, Any]], tasks: Iterable[Task], *, what: str, remedy: str
) -> None:
    """Refuses to go on where the scores of a checkpoint were made from other rows than those to come.

    Args:
      rows, archive: of the checkpoint's `HostState`.
      tasks: of the run that is to go on; a competition that the checkpoint does not know may join.
      what, remedy: of the error: whose checkpoint it is, and what to do.

    Raises:
      RunError: listing each setting that differs; or a row cannot be read.
    """
    try:
        known = {(checked := from_row(RewardRows, row)).task: checked for row in rows}
    except ValueError as error:
        raise RunError(f"{what} does not say which rows made its scores: {error}. It was altered, or made by another version.") from error
    found = []
    for task in tasks:
        theirs = known.get(task.id)
        if theirs is None and any(row.get("task") == task.id for row in archive):
            found.append(f"  - {task.id}: {what} has programs of it, but does not say which rows made their scores")
        elif theirs is not None and theirs.fingerprint != task.fingerprint:
            found += [f"  - {task.id}: {difference}" for difference in _differences(theirs, task)]
    if found:
        listed = "\n".join(found)
        raise RunError(
            f"{what} holds scores that were made from other rows, or otherwise, than the scores to come, so that neither its programs nor"
            f" its adapter can go on here:\n{listed}\n{remedy}"
        )


def _differences(theirs: RewardRows, task: Task) -> list[str]:
    """Each setting that differs, in people's words."""
    there = {str(pair[0]): pair[1] for pair in theirs.settings if isinstance(pair, list) and len(pair) == 2}
    here = dict(task.settings)
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if not names:
        return ["the prepared tables or the answers are others, though all settings are the same"]
    return [f"{_CONFIG_NAMES.get(name, name)}: there {_shown(there, name)}, here {_shown(here, name)}" for name in names]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name])[:100] if name in settings else "not used"
