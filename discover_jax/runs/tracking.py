"""Trackers of a run's metrics: TensorBoard event files always, Weights & Biases if the config requests it."""

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from discover_jax.exceptions import ConfigError, RunError
from discover_jax.extras import install_command
from discover_jax.files import storage_remedy, write_atomic
from discover_jax.runs.event_files import EventFile
from discover_jax.runs.metrics import scalars
from discover_jax.runs.workdir import Workdir


class Tracker(Protocol):
    """A destination for metrics rows."""

    def begin(self, step: int) -> None:
        """Rows from `step` on follow. Rows of these steps from an interrupted start no longer count."""
        ...

    def write(self, row: dict[str, Any]) -> None:
        """Takes a row; once this returns, a kill of the process does not lose it."""
        ...

    def close(self, failed: bool) -> None:
        """No more rows follow."""
        ...


class Trackers:
    """All trackers of a run; none in processes other than the first."""

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


@dataclasses.dataclass(frozen=True)
class WandbSettings:
    """Settings of the run at Weights & Biases.

    Attributes:
      mode: "online" or "offline".
      project, entity: project and owner of the run; an empty entity means the user's default.
      name: of the run.
      kind: "train" or "search".
      config: every setting of the run by its dotted name; it is sent along.
    """

    mode: str
    project: str
    entity: str
    name: str
    kind: str
    config: Mapping[str, Any]


@contextlib.contextmanager
def open_trackers(workdir: Workdir, wandb: WandbSettings | None, *, leads: bool) -> Iterator[Trackers]:
    """The trackers of a run, closed when the context ends.

    Args:
      workdir: of the run.
      wandb: None leaves W&B out.
      leads: whether this is the run's first process; the others have no trackers.

    Raises:
      ConfigError: W&B is requested, but it is not installed or nobody is logged in.
    """
    trackers: list[Tracker] = []
    if leads:
        trackers.append(EventFiles(workdir.tensorboard_dir))
        if wandb is not None:
            trackers.append(WandbRun(wandb, workdir.path))
    opened, failed = Trackers(trackers), True
    try:
        yield opened
        failed = False
    finally:
        opened.close(failed)


class EventFiles:
    """TensorBoard's event files: one for each start of the run. Rows are written at once, in the calling thread."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: EventFile | None = None

    def begin(self, step: int) -> None:
        """Makes the directory and a file.

        Raises:
          RunError: the disk is full or fails.
        """
        with self._run_errors():
            self._folder.mkdir(exist_ok=True)
            self._file = EventFile(self._folder, step)

    def write(self, row: dict[str, Any]) -> None:
        """Adds the row's numbers under their names.

        Raises:
          RunError: the disk is full or fails.
        """
        assert self._file is not None, "begin() comes first"
        with self._run_errors():
            self._file.write(row["step"], scalars(row))

    def close(self, failed: bool) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # every row was flushed, or its error raised
                self._file.close()

    @contextlib.contextmanager
    def _run_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"Cannot write TensorBoard events to {self._folder} ({error}). {storage_remedy(error)} Then start the same command"
                " again: it resumes at the last checkpoint."
            ) from error


_WANDB_ID = "wandb_id"
"""File in the run directory with the run's id at W&B."""


class WandbRun:
    """The run at Weights & Biases. It gets the metrics and settings (paths included), and its package adds the host's name and versions.
    It does not get code, prompts, programs, console output or machine statistics. Steps that it already has are not sent again.

    Args:
      settings: of the run there.
      folder: the run directory.

    Raises:
      ConfigError: wandb is not installed, or nobody is logged in.
    """

    def __init__(self, settings: WandbSettings, folder: Path):
        mode = settings.mode
        instead = "or set config.tracking.wandb='off'; this works for a resumed run, too."
        # wandb's error reports would describe this machine; offline mode does not disable all of them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"config.tracking.wandb = {mode!r}, but the package wandb cannot be imported ({error}). Run"
                f" {install_command('tracking')}, {instead}"
            ) from error
        if mode == "offline":
            wandb.setup(settings=wandb.Settings(mode=mode))
        else:
            try:
                known = wandb.login(prompt=False, verify=True)
            except wandb.Error as error:
                raise ConfigError(f"config.tracking.wandb = 'online', but W&B refuses the login ({error}). Fix it, {instead}") from error
            if not known:
                raise ConfigError(
                    "config.tracking.wandb = 'online', but nobody is logged in to W&B here (or WANDB_MODE overrides it). Run `wandb"
                    f" login`, set WANDB_API_KEY, use config.tracking.wandb='offline', {instead}"
                )
        self._wandb, self._settings, self._folder = wandb, settings, folder
        self._run: Any = None

    def begin(self, step: int) -> None:
        """Starts or resumes the run there.

        Raises:
          RunError: W&B does not answer, or the id cannot be stored.
        """
        wandb, settings = self._wandb, self._settings
        quiet = {"console": "off", "silent": True, "disable_git": True, "disable_code": True, "save_code": False}
        private = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False}
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity or None,
                name=settings.name,
                job_type=settings.kind,
                id=self._id(),
                resume="allow",
                dir=str(self._folder),
                config=dict(settings.config),
                mode=settings.mode,
                settings=wandb.Settings(**quiet, **private),
            )
        except wandb.Error as error:
            raise RunError(
                f"Cannot start the run at W&B ({error}). Start the same command again, or with config.tracking.wandb='off' or 'offline':"
                " it resumes at the last checkpoint."
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Hands over the row's numbers; W&B's own process sends them."""
        # W&B ignores steps below its own, but warns for each number.
        if row["step"] >= self._run.step:
            self._run.log(scalars(row), step=row["step"], commit=True)

    def close(self, failed: bool) -> None:
        """Waits until W&B has all rows."""
        if self._run is not None:
            self._run.finish(exit_code=1 if failed else 0)

    def _id(self) -> str:
        """The run's id at W&B: drawn at the first start that needs it, then kept in the run directory."""
        path = self._folder / _WANDB_ID
        if not path.exists():
            write_atomic(path, f"{secrets.token_hex(8)}\n".encode())
        try:
            return path.read_text().strip()
        except OSError as error:
            raise RunError(f"Cannot read {path}, which holds the run's id at W&B ({error}).") from error
