"""Where a run stands before its next step: from its folder's last checkpoint, from another run's, or from nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal
from discover_jax.exceptions import RunError
from discover_jax.learning.train_state import TrainState
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import Console
from discover_jax.runs.host_state import HostState
from discover_jax.runs.workdir import Workdir, write_atomic
from discover_jax.types import Attempt


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
      first_step: number of the run's first step: not 0 for a run that goes on from another one's.
      step: the next step.
      train_state: None for a search.
      frontiers: by the competition's id.
      origin: where all that comes from, in a few words.
    """

    first_step: int
    step: int
    train_state: TrainState | None
    frontiers: Mapping[str, Frontier]
    origin: str


def restore(
    config: Any,
    competitions: Sequence[str],
    workdir: Workdir,
    checkpoints: Checkpoints,
    journal: Journal,
    fresh: TrainState | None,
    console: Console,
) -> Standing:
    """The standing of a run, its journal set back to it.

    Args:
      config: validated.
      competitions: ids of the run's; what the checkpoint knows of others stays in the journal and is not used.
      fresh: the train state of a run that begins; None for a search.
      console: told of checkpoints that had to be set aside.

    Raises:
      RunError: no checkpoint can be read, or journal and checkpoint do not belong together.
    """
    if (found := checkpoints.resume(fresh, console.note)) is not None:
        latest, train_state, row = found
        host = HostState.from_json(row, latest)
        attempts = journal.resume(host.journal_position, host.journal_sha256)
        frontiers = _frontiers(config, competitions, host, attempts)
        return Standing(host.first_step, latest + 1, train_state, frontiers, f"resumed after step {latest + 1}")
    if config.train.resume_from:
        return _go_on(config, competitions, workdir, journal, fresh)
    _refuse_lost_checkpoints(workdir, journal, 0)
    journal.truncate(0)
    return Standing(0, 0, fresh, {id: Frontier(Archive((), config.reuse.capacity)) for id in competitions}, "fresh")


def _go_on(config: Any, competitions: Sequence[str], workdir: Workdir, journal: Journal, fresh: TrainState | None) -> Standing:
    """From the last checkpoint of the run in `train.resume_from`."""
    source = Path(config.train.resume_from).expanduser()
    earlier = Checkpoints(source / "checkpoints", keep=1, every=0, read_only=True) if (source / "checkpoints").is_dir() else None
    if earlier is None or (latest := earlier.latest()) is None:
        raise RunError(
            f"config.train.resume_from = {str(source)!r} holds no checkpoint. Give the folder of a run that finished at least one step,"
            " or leave it empty to start from nothing."
        )
    train_state, row = earlier.restore(latest, fresh)
    host = HostState.from_json(row, latest)
    # The journal comes along, so that the lineage of every program can still be told.
    rows, attempts = Journal(source / "journal.jsonl").check(host.journal_position, host.journal_sha256)
    _refuse_lost_checkpoints(workdir, journal, latest + 1)
    write_atomic(workdir.journal_path, rows)
    frontiers = _frontiers(config, competitions, host, attempts)
    return Standing(latest + 1, latest + 1, train_state, frontiers, f"goes on from step {latest + 1} of {source}")


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
