"""Checkpoints: each is one atomic step with everything that a run needs to resume.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a kill at any moment leaves a complete checkpoint or
none. Checksums detect later damage, such as a torn file or a flipped bit: each array has one, and the host state, which stores them, has
one of its own. Nothing is unpickled.

A checkpoint is written in the background, between `begin` and `finish`. One process copies the arrays from its devices in the background,
too. They stay on the host from then on: orbax would slice replicated arrays on the devices, whose memory sampling has taken. Several
processes copy and check arrays in `begin`, because that takes collective calls, whose order must be the same in all processes. In the
background they wait for each other without collective calls.

With several processes, each writes and reads what its own devices hold. Another number of processes may restore the checkpoint, onto
another mesh. Only the first process finds the latest intact checkpoint: orbax's processes wait for each other, and one that failed on a
damaged file would leave the others waiting.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from discover_jax.exceptions import RunError
from discover_jax.files import storage_remedy
from discover_jax.hosts.processes import ALONE, Processes
from discover_jax.learning.train_state import TrainState
from discover_jax.runs.background import BackgroundWork
from discover_jax.runs.quiet_logs import quiet_orbax
from discover_jax.runs.seal import on_host, seal, unseal

_ROOM_PER_ARRAY = 4096
_ROOM_EXTRA = 2**20
"""Free bytes required in addition to the arrays' own: names, shardings, block sizes."""
_WRITE_SECONDS = 3600
"""Time limit of several processes for writing a checkpoint together. After it, they count as lost."""


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, damaged or not, oldest first. If there are any, `resume` restores one or raises."""
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isascii() and entry.name.isdigit())


@dataclasses.dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written.

    Attributes:
      step: of the checkpoint.
      latest: step of the checkpoint before, None for none.
      work: writes it.
    """

    step: int
    latest: int | None
    work: BackgroundWork


class Checkpoints:
    """The checkpoints of one directory. Only one run may write there at a time (see `workdir`); all its processes make the same calls.

    Args:
      directory: created if needed. Remains of an unfinished checkpoint are deleted.
      keep: how many of the latest checkpoints stay.
      every: checkpoints whose step is a multiple of this stay, too; 0: none.
      read_only: nothing is written or deleted, for checkpoints of another run.
      processes: of the run.
      only_first: the first of several processes uses this object without the others; `processes` is then `ALONE`.

    Raises:
      RunError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        every: int,
        *,
        read_only: bool = False,
        processes: Processes = ALONE,
        only_first: bool = False,
    ):
        self._directory = Path(directory).absolute()
        self._keep, self._every, self._processes = keep, every, processes
        self._writing: _Writing | None = None
        coordination = ocp.options.MultiprocessingOptions()
        if only_first:
            coordination = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="examine")
        writes = not read_only and not only_first
        together = writes and processes.count > 1
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=every or None,
            enable_async_checkpointing=together,
            async_options=ocp.AsyncOptions(
                timeout_secs=_WRITE_SECONDS,
                create_directories_asynchronously=False,
                barrier_sync_fn=_wait_for_others if together else None,
            ),
            create=writes,  # orbax refuses to create a directory for some of the processes only
            read_only=read_only,
            lightweight_initialize=True,  # do not read the times of old checkpoints: nobody needs them, and the file may be damaged
            multiprocessing_options=coordination,
        )
        try:
            # Orbax's own cleanup misses a directory whose process was killed right after creating it.
            if processes.leads and writes:
                for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
            processes.wait()
            self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        except OSError as error:
            raise RunError(f"Cannot use the checkpoint directory {self._directory} ({error}).") from error

    def begin(self, step: int, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Starts to write a checkpoint, after finishing the one before. `finish` ends it.

        A kill before `finish` has returned may lose this checkpoint. Earlier ones stay until it is complete; then those that `keep` and
        `every` do not cover are deleted.

        Args:
          step: greater than the step of every earlier checkpoint.
          train_state: adapter and optimiser; None for a search. Do not donate its buffers before `finish` has returned.
          host: everything else, as JSON values: archive, journal position. Do not change it before `finish` has returned.

        Raises:
          RunError: the disk is full or fails, or the checkpoint before could not be written; earlier checkpoints are unchanged.
        """
        self.finish()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise RunError(f"Checkpoint {step} must come after the latest one, {latest}, in {self._directory}.")
        with self._write_errors(step, latest):
            self._check_room(train_state, host)
            if self._processes.count == 1:
                work = functools.partial(self._write_alone, step, train_state, host)
            else:
                self._write_parts(step, train_state, host)
                work = self._await_parts
        self._writing = _Writing(step, latest, BackgroundWork(work, name=f"checkpoint {step}"))

    @contextlib.contextmanager
    def _write_errors(self, step: int, latest: int | None) -> Iterator[None]:
        """Errors of writing a checkpoint, as RunError. `latest` is the step of the checkpoint before, None for none."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of a device, not of the disk: it has its own exit code and advice
            raise
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a failing disk as ValueError
            raise RunError(
                f"Cannot write checkpoint {step} to {self._directory}: {error}\nEarlier checkpoints are unchanged. {storage_remedy(error)}"
                f" Then start the same command again: it resumes {'at the beginning' if latest is None else f'at checkpoint {latest}'}."
            ) from error

    def _write_alone(self, step: int, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Copies the arrays to the host and writes the checkpoint of a run with one process."""
        self._write_parts(step, jax.tree.map(on_host, train_state), host)

    def _write_parts(self, step: int, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Writes what this process has of a checkpoint. With several processes, returns once the arrays are on the host."""
        parts: dict[str, Any] = {"host": ocp.args.JsonSave(seal(host, train_state))}
        if train_state is not None:
            parts["train_state"] = ocp.args.StandardSave(train_state)
        with quiet_orbax():
            self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
            self._manager.check_for_errors()

    def _await_parts(self) -> None:
        """Waits until all processes have written what they have of a checkpoint."""
        with quiet_orbax():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @property
    def writing(self) -> int | None:
        """Step of the checkpoint that `begin` has started and `finish` has not finished; None if there is none."""
        return None if self._writing is None else self._writing.step

    def check(self) -> None:
        """Returns at once. Raises what `finish` would raise if the checkpoint in the background has already failed."""
        if (writing := self._writing) is not None and writing.work.failed:
            self.finish()

    def finish(self) -> float | None:
        """Waits until the checkpoint of `begin` is complete and durable. Returns the seconds that writing took; None if there is none.

        End the process after an error: orbax may still be writing other arrays of the failed checkpoint, and only the next process can
        delete its remains.

        Raises:
          RunError: the disk is full or fails; earlier checkpoints are unchanged. It is raised once.
          JaxRuntimeError: a device failed; likewise.
        """
        if (writing := self._writing) is None:
            return None
        with self._write_errors(writing.step, writing.latest):
            try:
                seconds = writing.work.wait()
            except Exception:  # not Ctrl-C, which only ends the wait
                self._writing = None
                raise
        self._writing = None
        return seconds

    def save(self, step: int, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Writes a checkpoint, complete on return: `begin` and `finish`."""
        self.begin(step, train_state, host)
        self.finish()

    def _check_room(self, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Refuses a checkpoint that does not fit on the disk: one error with numbers instead of one for each array."""
        leaves = jax.tree.leaves(train_state)
        needed = sum(leaf.nbytes + _ROOM_PER_ARRAY for leaf in leaves) + len(json.dumps(host)) + _ROOM_EXTRA
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it needs about {needed / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free.")

    def latest(self) -> int | None:
        """Step of the last complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract_train_state: TrainState | None) -> tuple[TrainState | None, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          step: of an existing checkpoint.
          abstract_train_state: shapes, types and shardings, or arrays that have them. None skips the train state.

        Returns:
          The train state (None if skipped) and the host state.

        Raises:
          RunError: there is no such checkpoint, it is damaged, or its arrays have other names or shapes.
        """
        if step not in (steps := sorted(self._manager.all_steps())):
            raise RunError(f"There is no checkpoint {step} in {self._directory}. Complete checkpoints: {steps}.")
        try:
            return self._read(step, abstract_train_state)
        except ValueError as error:
            raise RunError(
                f"Cannot restore checkpoint {step} in {self._directory}: {error}\nIt was damaged or altered, or written by another version."
                f" Complete checkpoints: {steps}. Delete the directory of a damaged one to resume from the one before."
            ) from error

    def _read(self, step: int, abstract_train_state: TrainState | None) -> tuple[TrainState | None, dict[str, Any]]:
        """`restore` without the advice.

        Raises:
          RunError: its arrays have other names or shapes.
          ValueError: it is damaged; the message is one line.
        """
        parts: dict[str, Any] = {"host": ocp.args.JsonRestore()}
        with quiet_orbax():
            try:
                if abstract_train_state is not None:
                    self._check_layout(step, abstract_train_state)
                    parts["train_state"] = ocp.args.StandardRestore(jax.tree.map(_abstract, abstract_train_state))
                restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
                train_state = restored.get("train_state")
                return train_state, unseal(restored.get("host"), train_state)
            except RunError:
                raise
            except Exception as error:  # orbax raises different errors depending on which file is damaged, and where
                fault = _short(error)
        # Raised here, without a context: orbax's error would keep coroutines alive, which complain when they are collected.
        raise ValueError(fault)

    def resume(
        self, abstract_train_state: TrainState | None, note: Callable[[str], None]
    ) -> tuple[int, TrainState | None, dict[str, Any]] | None:
        """Restores the latest intact checkpoint. Moves damaged ones after it to a directory next to the checkpoints and reports them.

        Args:
          abstract_train_state: see `restore`.
          note: called with a message about each damaged checkpoint.

        Returns:
          The step, the train state and the host state; None if there are no checkpoints, damaged or not.

        Raises:
          RunError: there are checkpoints, but none can be restored; none was moved.
        """
        if self._processes.count == 1:
            return self._resume(abstract_train_state, note)
        found = self._processes.from_first(lambda: self._examine(abstract_train_state, note))
        if found is None:
            return None
        self._manager.reload()  # the first process may have moved damaged ones away
        train_state = None
        if abstract_train_state is not None:
            train_state, _ = self.restore(found["step"], abstract_train_state)
        return found["step"], train_state, found["host"]

    def _examine(self, abstract_train_state: TrainState | None, note: Callable[[str], None]) -> dict[str, Any] | None:
        """What `resume` finds, by this process only: step and host state. The arrays are read to be verified, then dropped."""
        alone = Checkpoints(self._directory, self._keep, self._every, only_first=True)
        try:
            shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_train_state)
            found = alone._resume(shapes, note)
        finally:
            alone.close()
        return None if found is None else {"step": found[0], "host": found[2]}

    def _resume(
        self, abstract_train_state: TrainState | None, note: Callable[[str], None]
    ) -> tuple[int, TrainState | None, dict[str, Any]] | None:
        complete = self._manager.all_steps()
        faults: dict[int, str] = {}
        for step in reversed(steps_in(self._directory)):
            if step not in complete:
                faults[step] = "files of it were deleted"
                continue
            try:
                train_state, host = self._read(step, abstract_train_state)
            except (RunError, ValueError) as error:
                faults[step] = str(error)
                continue
            for damaged, fault in faults.items():
                moved_to = self._set_aside(damaged)
                note(
                    f"Checkpoint {damaged} is damaged: {fault} The run resumes from checkpoint {step} and repeats the steps after it. The"
                    f" damaged one was moved to {moved_to}."
                )
            if faults:  # orbax still lists the steps that were moved
                self._manager.close()
                self._manager = ocp.CheckpointManager(self._directory, options=self._options)
            return step, train_state, host
        if faults:
            listed = "\n".join(f"  - checkpoint {step}: {fault}" for step, fault in faults.items())
            raise RunError(
                f"Cannot restore any checkpoint in {self._directory}, so the run cannot resume:\n{listed}\nRestore them from a copy, or"
                " start a new run in another directory (--workdir). The journal and best/ in this one are unchanged."
            )
        return None

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint away, so that its step can be saved again. Returns its new path."""
        folder = self._directory.with_name(f"{self._directory.name}.damaged")
        try:
            folder.mkdir(exist_ok=True)
            number = 1
            while (target := folder / f"{step}-{number}").exists():
                number += 1
            (self._directory / str(step)).rename(target)
        except OSError as error:
            raise RunError(
                f"Cannot move the damaged checkpoint {step} in {self._directory} to {folder} ({error}). Move it yourself, then start the"
                " same command again: it resumes from the checkpoint before."
            ) from error
        return target

    def _check_layout(self, step: int, wanted: TrainState) -> None:
        """Compares names, types and shapes before orbax does, which reports only the first difference, in its own terms."""
        folder: Any = self._directory / str(step) / "train_state"  # orbax declares its own path type, but accepts this one
        if not folder.is_dir():
            raise RunError(f"Checkpoint {step} in {self._directory} has no adapter: it was written by a search run. Give a training run.")
        found_all, wanted_all = _layout(ocp.StandardCheckpointHandler().metadata(folder).tree), _layout(wanted)
        names = [name for name in wanted_all | found_all if found_all.get(name) != wanted_all.get(name)]
        if names:
            differences = "\n".join(
                f"  - {name}: checkpoint has {found_all.get(name, 'none')}, this run {wanted_all.get(name, 'none')}" for name in names[:5]
            )
            raise RunError(
                f"Checkpoint {step} in {self._directory} was written with another model, other adapter ranks or another optimizer;"
                f" {len(names)} arrays differ:\n{differences}{f'{chr(10)}  - ...' if len(names) > 5 else ''}\nUse the settings of that run,"
                " or do not start from its checkpoint."
            )

    def close(self) -> None:
        """Finishes the checkpoint that is being written and ends orbax's threads; the checkpoints stay. Raises RunError as `finish`."""
        self.finish()
        self._manager.close()


def _wait_for_others(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier in threads. After an error of this process, orbax would still wait for the others, which wait for this one."""
    if (error := sys.exc_info()[1]) is not None:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _short(error: Exception) -> str:
    """The first line of an error's root cause: orbax's own message can fill pages."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    line = (str(cause).strip() or repr(cause)).splitlines()[0]
    return line if len(line) <= 300 else line[:300] + " ..."


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Shape, type and sharding of a leaf; the first device if it has no sharding. A numpy array stays on the host."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _layout(tree: Any) -> dict[str, str]:
    """Type and shape of each array by name: "lora/head/A" -> "float32[5, 2]"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
