"""The run that another one continues (`train.resume_from`): compatibility checks, and what the new run takes over."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from discover_jax.archive.archive import lineage
from discover_jax.archive.frontier import Frontier, states_of
from discover_jax.exceptions import RunError
from discover_jax.hosts.processes import ALONE, Processes
from discover_jax.runs.best import RETURNED, bundle_dir, bundled_id, read_best, write_best
from discover_jax.runs.checkpoints import Checkpoints, steps_in
from discover_jax.runs.disclosure import NAME as DISCLOSURE
from discover_jax.runs.disclosure import Isolation, read_isolation
from discover_jax.runs.host_state import HostState
from discover_jax.runs.reward_rows import check_reward_rows
from discover_jax.runs.workdir import Workdir
from discover_jax.tasks.prepare import AnyTask
from discover_jax.types import Attempt


@dataclasses.dataclass(frozen=True)
class Source:
    """A run to continue.

    Attributes:
      path: its directory.
      step: of its last checkpoint.
      host: host state of that checkpoint.
      isolation: how its programs were isolated; the new run's scores depend on it.
    """

    path: Path
    step: int
    host: HostState
    isolation: Isolation

    def disclosed(self) -> dict[str, Any]:
        """For disclosure.json: the adapter may have learned from the answers of other competitions."""
        return {
            "run": str(self.path),
            "steps": self.step + 1,
            "rewards": {row["task"]: row["reward"] for row in self.host.rewards},
        }


def find_source(resume_from: str, tasks: Sequence[AnyTask], workdir: Workdir, processes: Processes = ALONE) -> Source | None:
    """The run in `config.train.resume_from`, checked to be compatible. Call it before anything slow, such as loading weights.

    Args:
      resume_from: directory of the run; "" for none.
      tasks, workdir, processes: of the new run.

    Returns:
      None for a run that starts fresh, or that has checkpoints of its own: it resumes from those and no longer needs the other run.

    Raises:
      RunError: there is no such run, it has no checkpoint, its scores come from other rows, or it does not say how programs were isolated.
    """
    if not resume_from or processes.from_first(lambda: bool(steps_in(workdir.checkpoints_dir))):
        return None
    path = Path(resume_from).expanduser()
    given = f"config.train.resume_from = {str(path)!r}"
    there = (path / "checkpoints").is_dir()
    earlier = Checkpoints(path / "checkpoints", keep=1, every=0, read_only=True, processes=processes) if there else None
    if earlier is None or (latest := earlier.latest()) is None:
        raise RunError(
            f"{given} has no checkpoint. Give the directory of a run that finished at least one step, or leave the setting empty to start"
            " fresh."
        )
    try:
        _, row = earlier.restore(latest, None)
    finally:
        earlier.close()
    host = HostState.from_json(row, latest)
    check_reward_rows(
        host.rewards,
        host.archive,
        tasks,
        what=f"The run in {given}",
        remedy="Give this run the settings and data of that one, or leave config.train.resume_from empty to start fresh. Name another"
        " directory by --workdir in both cases.",
    )
    isolation = read_isolation(path)
    if isolation is None:
        raise RunError(
            f"{given} has no disclosure.json, so it is unknown how its programs were isolated. This run's scores would depend on them."
            " Restore the file, or leave config.train.resume_from empty to start fresh."
        )
    return Source(path, latest, host, isolation)


def bring_best(
    source: Source,
    frontiers: Mapping[str, Frontier],
    workdir: Workdir,
    attempts: Sequence[Attempt],
    reruns: Mapping[str, str],
    note: Callable[[str], None],
) -> None:
    """Copies best/ of the source's best programs, for a run that finds no better one.

    Args:
      frontiers: by competition, of the new run before its first step.
      attempts: rows of the source's journal.
      reruns: text of rerun.sh by competition.
      note: called with a message where the source's best/ does not have the best program of its journal.

    Raises:
      RunError: best/ cannot be written.
    """
    for id, frontier in frontiers.items():
        if (best := frontier.best) is None:
            continue
        states = {state.id: state for state in states_of(attempt for attempt in attempts if attempt.task == id)}
        # The source may have had one competition or several, and it may have chosen another program by retests or by another ranking.
        folders = (source.path / "best", source.path / "best" / id)
        wanted = [(folder, state) for folder in folders for state in (best, states.get(bundled_id(folder)))]
        for folder, state in wanted:
            if state is not None and (found := read_best(folder, state, id)) is not None:
                grade, submission, parent_output = found
                into = bundle_dir(workdir.best_dir, id, alone=len(frontiers) == 1)
                write_best(
                    into,
                    lineage=lineage(attempts, state.id),
                    submission=submission,
                    parent_output=parent_output,
                    calls=(folder / RETURNED).exists(),
                    grade=grade,
                    disclosure=(workdir.path / DISCLOSURE).read_bytes(),
                    rerun=reruns[id],
                )
                break
        else:
            note(
                f"The best program of {id} so far, {best.id} of {source.path}, is missing in that run's best/. It is in this run's journal."
            )
