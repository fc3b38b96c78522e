"""The state of a run before its next step: from its own last checkpoint, from another run's, or fresh."""

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
from discover_jax.runs.host_state import HostState
from discover_jax.runs.outputs import Outputs
from discover_jax.runs.reward_rows import check_reward_rows, reward_rows
from discover_jax.runs.source import Source, bring_best
from discover_jax.runs.workdir import Workdir
from discover_jax.tasks.prepare import AnyTask
from discover_jax.types import Attempt, State


@dataclasses.dataclass(frozen=True)
class RunState:
    """The state of a run between two steps.

    Attributes:
      first_step: number of the run's first step; not 0 for a run that continues another one.
      step: the next step.
      train_state: adapter and optimiser; None for a search.
      frontiers: by competition id.
      rewards: the rows that made the scores in the journal and make those of later steps, for `HostState`.
      origin: where the state comes from, for the console.
    """

    first_step: int
    step: int
    train_state: TrainState | None
    frontiers: Mapping[str, Frontier]
    rewards: list[dict[str, Any]]
    origin: str


def restore(
    tasks: Sequence[AnyTask],
    workdir: Workdir,
    checkpoints: Checkpoints,
    journal: Journal,
    fresh: TrainState | None,
    source: Source | None,
    rerun_scripts: Mapping[str, str],
    note: Callable[[str], None],
    processes: Processes = ALONE,
    *,
    starts: Mapping[str, Frontier],
) -> RunState:
    """Restores the state of a run and truncates its journal to it. All processes call this; only the first touches the journal.

    Args:
      tasks: of the run. The checkpoint's states of other competitions stay in the journal and are not used.
      fresh: the train state of a new run; None for a search.
      source: the run that this one continues, see `find_source`.
      rerun_scripts: text of best/rerun.sh by competition id.
      note: called with a message about each damaged checkpoint that was set aside.
      starts: the frontier of each competition before the first step, by its id.

    Raises:
      RunError: no checkpoint can be read; journal and checkpoint do not match; other rows made the checkpoint's scores; or a value that
        children of archived programs read is missing or damaged.
    """
    if (found := checkpoints.resume(fresh, note)) is not None:
        latest, train_state, row = found
        host = HostState.from_json(row, latest)
        check_reward_rows(
            host.rewards,
            host.archive,
            tasks,
            what=f"Checkpoint {latest} in {workdir.checkpoints_dir}",
            remedy="The task folder was prepared again from other data, or by another version of the project. Restore the original data, or"
            " start a new run in another folder (--workdir).",
        )
        attempts = _from_first(processes, lambda: journal.resume(host.journal_position, host.journal_sha256))
        frontiers = _frontiers(starts, host, attempts)
        if processes.leads:
            Outputs(workdir.outputs_dir).check(_archived(frontiers))
        rewards = reward_rows(tasks, host.rewards)
        return RunState(host.first_step, latest + 1, train_state, frontiers, rewards, f"resumed after step {latest + 1}")
    if source is not None:
        return _continue(tasks, workdir, journal, fresh, source, rerun_scripts, note, processes, starts)
    if processes.leads:
        _refuse_lost_checkpoints(workdir, journal, 0)
        journal.truncate(0)
    return RunState(0, 0, fresh, starts, reward_rows(tasks), "fresh")


def _continue(
    tasks: Sequence[AnyTask],
    workdir: Workdir,
    journal: Journal,
    fresh: TrainState | None,
    source: Source,
    rerun_scripts: Mapping[str, str],
    note: Callable[[str], None],
    processes: Processes,
    starts: Mapping[str, Frontier],
) -> RunState:
    """The state after the last step of the run in config.train.resume_from."""
    first, host = source.step + 1, source.host
    earlier = Checkpoints(source.path / "checkpoints", keep=1, every=0, read_only=True, processes=processes)
    train_state, _ = earlier.restore(source.step, fresh)

    def bring_journal() -> list[Attempt]:
        # The journal is copied, so that the lineage of every program stays known.
        rows, attempts = Journal(source.path / "journal.jsonl").check(host.journal_position, host.journal_sha256)
        _refuse_lost_checkpoints(workdir, journal, first)
        write_atomic(workdir.journal_path, rows)
        return attempts

    attempts = _from_first(processes, bring_journal)
    frontiers = _frontiers(starts, host, attempts)
    if processes.leads:
        Outputs(workdir.outputs_dir).bring(Outputs(source.path / workdir.outputs_dir.name), _archived(frontiers))
        bring_best(source, frontiers, workdir, attempts, rerun_scripts, note)
    return RunState(first, first, train_state, frontiers, reward_rows(tasks, host.rewards), f"continues from step {first} of {source.path}")


def _from_first(processes: Processes, read: Callable[[], list[Attempt]]) -> list[Attempt]:
    """The result of `read`, which only the first process calls, in all processes."""
    if processes.count == 1:
        return read()
    return [from_json(row) for row in processes.from_first(lambda: [to_json(attempt) for attempt in read()])]


def _frontiers(starts: Mapping[str, Frontier], host: HostState, attempts: Sequence[Attempt]) -> dict[str, Frontier]:
    """The frontiers at a checkpoint.

    Args:
      starts: before the first step, by competition id.
    """
    frontiers = {}
    for id, start in starts.items():
        archive = Archive.from_json([row for row in host.archive if row.get("task") == id], start.archive.capacity)
        own = [attempt for attempt in attempts if attempt.task == id]
        frontiers[id] = Frontier.resumed(archive, own, seed=start.seed, ranking=start.ranking)
    return frontiers


def _archived(frontiers: Mapping[str, Frontier]) -> list[State]:
    return [state for frontier in frontiers.values() for state in frontier.archive.states]


def _refuse_lost_checkpoints(workdir: Workdir, journal: Journal, first_step: int) -> None:
    """Raises if the journal has later steps than a run without a checkpoint can have: starting again would discard them."""
    last = max((attempt.step for attempt in journal.read()), default=first_step)
    if last > first_step:
        raise RunError(
            f"The journal {workdir.journal_path} has {last + 1} steps, but {workdir.checkpoints_dir} has no checkpoint: they were"
            " deleted. Restore them to resume the run, or start a new run in another folder (--workdir)."
        )
