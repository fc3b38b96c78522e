"""Where else the rows of metrics.jsonl go: always into event files for TensorBoard; to Weights & Biases only where the config says so."""

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from discover_jax import config as settings
from discover_jax.exceptions import ConfigError, RunError
from discover_jax.files import write_atomic
from discover_jax.runs.metrics import scalars
from discover_jax.runs.workdir import Workdir


class Tracker(Protocol):
    """One place for rows of metrics."""

    def begin(self, step: int) -> None:
        """Rows from `step` on will come; what the place already has of them is of a start that was cut short, and counts no more."""
        ...

    def write(self, row: dict[str, Any]) -> None:
        """Takes a row; when this returns, a kill of the process loses nothing of it."""
        ...

    def close(self, failed: bool) -> None:
        """No more rows will come."""
        ...


class Trackers:
    """All places of a run together; none in a process that does not lead."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self._trackers = tuple(trackers)

    def begin(self, step: int) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.begin(step)

    def write(self, row: dict[str, Any]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.write(row)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.close(failed)


@contextlib.contextmanager
def open_trackers(config: Any, workdir: Workdir, kind: str, *, leads: bool) -> Iterator[Trackers]:
    """The places that the config names; closed on leaving the context, however it is left.

    Args:
      config: validated.
      workdir: of the run.
      kind: "train" or "search".
      leads: whether this is the run's first process, which alone tells anyone.

    Raises:
      ConfigError: W&B is asked for, and is not installed, or nobody is logged in.
    """
    trackers: list[Tracker] = []
    if leads:
        trackers.append(EventFiles(workdir.tensorboard_dir))
        if config.tracking.wandb != "off":
            trackers.append(WandbRun(config, workdir.path, kind))
    opened, failed = Trackers(trackers), True
    try:
        yield opened
        failed = False
    finally:
        opened.close(failed)


class EventFiles:
    """TensorBoard's files: one for each start of the run, whose first event tells TensorBoard to drop what earlier ones have of its steps.

    Written at once and in this thread: tensorboardX's SummaryWriter leaves that to another, and would wait for ever for one that met a
    full disk.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._tensorboard = _tensorboard()
        self._file: Any = None

    def begin(self, step: int) -> None:
        """Makes the folder and a file.

        Raises:
          RunError: the disk is full or fails.
        """
        event, log, events_writer, _ = self._tensorboard
        with self._told_as_run_error():
            self._folder.mkdir(exist_ok=True)
            self._file = events_writer(str(self._folder / "events"), f".{step:06d}")
            start = log(status=log.START)
            self._file.write_event(event(wall_time=time.time(), step=step, session_log=start))
            self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Adds the row's numbers under their names.

        Raises:
          RunError: the disk is full or fails.
        """
        event, _, _, summary = self._tensorboard
        with self._told_as_run_error():
            values = [summary.Value(tag=name, simple_value=value) for name, value in scalars(row).items()]
            self._file.write_event(event(wall_time=time.time(), step=row["step"], summary=summary(value=values)))
            self._file.flush()

    def close(self, failed: bool) -> None:
        """Lets go of the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # every row was flushed, and told of if it could not be
                self._file.close()

    @contextlib.contextmanager
    def _told_as_run_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"Events for TensorBoard could not be written to {self._folder} ({error}). Free some space, then start the same command"
                " again: it resumes at the last checkpoint."
            ) from error


def _tensorboard() -> tuple[Any, Any, Any, Any]:
    """Of tensorboardX: Event, SessionLog, EventsWriter, Summary. Torch is hidden from it meanwhile: where it is installed it would be
    imported, for three seconds and hundreds of megabytes, for the sake of a type in an annotation."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # protobuf makes them
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
    finally:
        if hidden:
            del sys.modules["torch"]
    return Event, SessionLog, EventsWriter, Summary


_WANDB_ID = "wandb_id"
"""File of the run's folder that keeps the id under which W&B knows it."""


class WandbRun:
    """The run at Weights & Biases: metrics and settings (paths among them) go there, and its package adds the host's name and versions;
    code, prompts, programs, console and load of the machine do not. Steps that it already has are not sent again.

    Args:
      config: validated; `tracking.wandb` is "online" or "offline".
      folder: the run's.
      kind: "train" or "search".

    Raises:
      ConfigError: wandb is not installed, or nobody is logged in.
    """

    def __init__(self, config: Any, folder: Path, kind: str):
        mode = config.tracking.wandb
        instead = "or set config.tracking.wandb='off'; a run that has begun may be resumed so, too."
        # Its reports on itself would tell of this machine, too, and offline mode alone does not hold all of them back.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"config.tracking.wandb = {mode!r}, but the package wandb cannot be imported ({error}). Install it by `pip install"
                f" 'discover_jax[tracking]'`, {instead}"
            ) from error
        if mode == "offline":
            wandb.setup(settings=wandb.Settings(mode=mode))
        else:
            try:
                known = wandb.login(prompt=False, verify=True)
            except wandb.Error as error:
                raise ConfigError(f"config.tracking.wandb = 'online', but W&B refuses the login ({error}). Mend it, {instead}") from error
            if not known:
                raise ConfigError(
                    "config.tracking.wandb = 'online', but nobody is logged in at W&B here (or WANDB_MODE says otherwise). Run `wandb"
                    f" login`, set WANDB_API_KEY, use config.tracking.wandb='offline', {instead}"
                )
        self._wandb, self._config, self._folder, self._kind, self._mode = wandb, config, folder, kind, mode
        self._run: Any = None

    def begin(self, step: int) -> None:
        """Begins the run there, or goes on with it.

        Raises:
          RunError: W&B does not answer, or the id cannot be kept.
        """
        wandb, tracking = self._wandb, self._config.tracking
        quiet = {"console": "off", "silent": True, "disable_git": True, "disable_code": True, "save_code": False}
        unsaid = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False}
        try:
            self._run = wandb.init(
                project=tracking.project,
                entity=tracking.entity or None,
                name=self._config.name,
                job_type=self._kind,
                id=self._id(),
                resume="allow",
                dir=str(self._folder),
                config=settings.flatten(self._config),
                mode=self._mode,
                settings=wandb.Settings(**quiet, **unsaid),
            )
        except wandb.Error as error:
            raise RunError(
                f"The run could not begin at W&B ({error}). Start the same command again, or with config.tracking.wandb='off' or"
                " 'offline': it resumes at the last checkpoint."
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Hands the row's numbers over; W&B's own process sends them when it can."""
        # A step below its own W&B would ignore, too, but with a warning for each number.
        if row["step"] >= self._run.step:
            self._run.log(scalars(row), step=row["step"], commit=True)

    def close(self, failed: bool) -> None:
        """Waits until W&B has all rows."""
        if self._run is not None:
            self._run.finish(exit_code=1 if failed else 0)

    def _id(self) -> str:
        """Of the run at W&B: drawn at the first start that asks for it, and kept in the run's folder."""
        path = self._folder / _WANDB_ID
        if not path.exists():
            write_atomic(path, f"{secrets.token_hex(8)}\n".encode())
        try:
            return path.read_text().strip()
        except OSError as error:
            raise RunError(f"{path}, which keeps the run's id at W&B, cannot be read ({error}).") from error
