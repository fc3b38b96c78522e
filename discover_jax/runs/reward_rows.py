"""Which rows made the scores of a run. Checkpoints keep this, so that scores of different rows never mix.

Scores of a competition are comparable only if the same rows made them. In particular, private scores must not enter a run with the reward
`holdout`: its summaries state that no prompt, reward or selection used the private answers.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.records import from_row
from discover_jax.tasks.prepare import AnyTask

_CONFIG_NAMES = {
    "reward": "config.task.reward",
    "holdout_fraction": "config.task.holdout_fraction",
    "holdout_folds": "config.task.holdout_folds",
    "selection_fraction": "config.task.selection_fraction",
    "stratified": "config.task.stratified",
    "seed": "config.seed (draws the held-out rows)",
    "judge": "config.task.grader",
    "reuse_output": "config.task.reuse_output",
    "definition_sha256": "SHA-256 of the definition's file",
    "helpers_sha256": "SHA-256 of the modules beside the definition's file",
}


@dataclasses.dataclass(frozen=True)
class RewardRows:
    """Which rows made the scores of a competition, and how they became rewards.

    Attributes:
      task: the competition's id.
      reward: "grade" or "holdout".
      fingerprint: fingerprint of the task; tasks with equal fingerprints give equal grades.
      settings: name and value of each setting that the fingerprint covers, to report differences.
    """

    task: str
    reward: str
    fingerprint: str
    settings: list[Any]


def reward_rows(tasks: Iterable[AnyTask], earlier: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Rows for `HostState.rewards`: one per task, and the `earlier` rows of other competitions, whose scores stay in the journal."""
    mine = [RewardRows(task.id, task.reward_source, task.fingerprint, [list(pair) for pair in task.settings]) for task in tasks]
    ids = {row.task for row in mine}
    return [*(dict(row) for row in earlier if row["task"] not in ids), *map(dataclasses.asdict, mine)]


def check_reward_rows(
    rows: Sequence[Mapping[str, Any]], archive: Sequence[Mapping[str, Any]], tasks: Iterable[AnyTask], *, what: str, remedy: str
) -> None:
    """Raises if other rows made the scores of a checkpoint than will make the next ones.

    Args:
      rows, archive: `rewards` and `archive` of the checkpoint's `HostState`.
      tasks: tasks of the run. Competitions that are not in the checkpoint may be added.
      what, remedy: for the error message: name of the checkpoint, and what to do.

    Raises:
      RunError: a setting differs (the message lists all that do), or a row is invalid.
    """
    try:
        known = {(checked := from_row(RewardRows, row)).task: checked for row in rows}
    except ValueError as error:
        raise RunError(
            f"{what} does not record which rows made its scores: {error}. It was altered or written by another version."
        ) from error
    found = []
    for task in tasks:
        theirs = known.get(task.id)
        if theirs is None and any(row.get("task") == task.id for row in archive):
            found.append(f"  - {task.id}: {what} has programs for it, but does not record which rows made their scores")
        elif theirs is not None and theirs.fingerprint != task.fingerprint:
            found += [f"  - {task.id}: {difference}" for difference in _differences(theirs, task)]
    if found:
        listed = "\n".join(found)
        raise RunError(
            f"{what} has scores that were made from other rows or with other settings, so this run cannot use its programs or adapter:"
            f"\n{listed}\n{remedy}"
        )


def _differences(theirs: RewardRows, task: AnyTask) -> list[str]:
    """A description of each setting that differs."""
    there = {str(pair[0]): pair[1] for pair in theirs.settings if isinstance(pair, list) and len(pair) == 2}
    here = dict(task.settings)
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if not names:
        return ["the prepared tables or the answers differ, although all settings are equal"]
    return [f"{_CONFIG_NAMES.get(name, name)}: {_shown(there, name)} in the checkpoint, {_shown(here, name)} in this run" for name in names]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name])[:100] if name in settings else "not used"
