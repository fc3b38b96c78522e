"""Where a run stands before its next step: from its folder's last checkpoint, from another run's, or from nothing."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal, from_json, to_json
from discover_jax.exceptions import RunError
from discover_jax.files import write_atomic
from discover_jax.hosts.processes import ALONE, Processes
from discover_jax.learning.train_state import TrainState
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import Console
from discover_jax.runs.host_state import HostState
from discover_jax.runs.rerun import rerun_script
from discover_jax.runs.reward_rows import check_reward_rows, reward_rows
from discover_jax.runs.source import Source, bring_best
from discover_jax.runs.workdir import Workdir
from discover_jax.tasks.task import Task
from discover_jax.types import Attempt


@dataclasses.dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
      first_step: number of the run's first step: not 0 for a run that goes on from another one's.
      step: the next step.
      train_state: None for a search.
      frontiers: by the competition's id.
      rewards: which rows made the scores of the journal and will make those to come, for `HostState`.
      origin: where all that comes from, in a few words.
    """

    first_step: int
    step: int
    train_state: TrainState | None
    frontiers: Mapping[str, Frontier]
    rewards: list[dict[str, Any]]
    origin: str


def restore(
    config: Any,
    tasks: Sequence[Task],
    workdir: Workdir,
    checkpoints: Checkpoints,
    journal: Journal,
    fresh: TrainState | None,
    source: Source | None,
    console: Console,
    processes: Processes = ALONE,
) -> RunState:
    """The standing of a run, its journal set back to it. Of several processes all call it; the first alone reads and writes the journal.

    Args:
      config: validated.
      tasks: the run's; what the checkpoint knows of other competitions stays in the journal and is not used.
      fresh: the train state of a run that begins; None for a search.
      source: see `find_source`.
      console: told of checkpoints that had to be set aside.

    Raises:
      RunError: no checkpoint can be read, or journal and checkpoint do not belong together, or other rows made the checkpoint's scores.
    """
    ids = [task.id for task in tasks]
    if (found := checkpoints.resume(fresh, console.note)) is not None:
        latest, train_state, row = found
        host = HostState.from_json(row, latest)
        check_reward_rows(
            host.rewards,
            host.archive,
            tasks,
            what=f"Checkpoint {latest} in {workdir.checkpoints_dir}",
            remedy="The task's folder was prepared anew from other data, or for another version of the project. Put back what there was, or"
            " start a new run in another folder (--workdir).",
        )
        attempts = _told_by_first(processes, lambda: journal.resume(host.journal_position, host.journal_sha256))
        frontiers = _frontiers(config, ids, host, attempts)
        rewards = reward_rows(tasks, host.rewards)
        return RunState(host.first_step, latest + 1, train_state, frontiers, rewards, f"resumed after step {latest + 1}")
    if source is not None:
        return _go_on(config, tasks, workdir, journal, fresh, source, console, processes)
    if processes.leads:
        _refuse_lost_checkpoints(workdir, journal, 0)
        journal.truncate(0)
    return RunState(0, 0, fresh, {id: Frontier(Archive((), config.reuse.capacity)) for id in ids}, reward_rows(tasks), "fresh")


def _go_on(
    config: Any,
    tasks: Sequence[Task],
    workdir: Workdir,
    journal: Journal,
    fresh: TrainState | None,
    source: Source,
    console: Console,
    processes: Processes,
) -> RunState:
    """From the last checkpoint of the run in `train.resume_from`."""
    first, host = source.step + 1, source.host
    earlier = Checkpoints(source.path / "checkpoints", keep=1, every=0, read_only=True, processes=processes)
    train_state, _ = earlier.restore(source.step, fresh)

    def bring_journal() -> list[Attempt]:
        # It comes along, so that the lineage of every program can still be told.
        rows, attempts = Journal(source.path / "journal.jsonl").check(host.journal_position, host.journal_sha256)
        _refuse_lost_checkpoints(workdir, journal, first)
        write_atomic(workdir.journal_path, rows)
        return attempts

    attempts = _told_by_first(processes, bring_journal)
    frontiers = _frontiers(config, [task.id for task in tasks], host, attempts)
    if processes.leads:
        reruns = {task.id: rerun_script(config, number) for number, task in enumerate(tasks)}
        bring_best(source, frontiers, workdir, attempts, reruns, console)
    return RunState(first, first, train_state, frontiers, reward_rows(tasks, host.rewards), f"goes on from step {first} of {source.path}")


def _told_by_first(processes: Processes, read: Callable[[], list[Attempt]]) -> list[Attempt]:
    """What `read` gives in the first process, in all of them."""
    if processes.count == 1:
        return read()
    return [from_json(row) for row in processes.from_first(lambda: [to_json(attempt) for attempt in read()])]


def _frontiers(config: Any, competitions: Sequence[str], host: HostState, attempts: Sequence[Attempt]) -> dict[str, Frontier]:
    frontiers = {}
    for id in competitions:
        archive = Archive.from_json([row for row in host.archive if row.get("task") == id], config.reuse.capacity)
        frontiers[id] = Frontier.resumed(archive, [attempt for attempt in attempts if attempt.task == id])
    return frontiers


def _refuse_lost_checkpoints(workdir: Workdir, journal: Journal, first_step: int) -> None:
    """Without a checkpoint a run can have got no further than into its first step; to begin again would set all the others aside."""
    last = max((attempt.step for attempt in journal.read()), default=first_step)
    if last > first_step:
        raise RunError(
            f"The journal {workdir.journal_path} goes up to step {last + 1}, but there is no checkpoint in {workdir.checkpoints_dir}: they"
            " were deleted. Put them back to resume the run, or start a new one in another folder (--workdir)."
        )
