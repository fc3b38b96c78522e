"""Checkpoints: each is one atomic step with everything that a run needs to resume.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a kill at any moment leaves a complete checkpoint or
none. Checksums detect later damage, such as a torn file or a flipped bit: each array has one, and the host state, which stores them, has
one of its own. Nothing is unpickled.

With several processes, each writes and reads what its own devices hold. Another number of processes may restore the checkpoint, onto
another mesh. Only the first process finds the latest intact checkpoint: orbax's processes wait for each other, and one that failed on a
damaged file would leave the others waiting.
"""

import contextlib
import errno
import hashlib
import json
import logging
import shutil
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
from discover_jax.models.sharding import fetch

_ROOM_PER_ARRAY = 4096
_ROOM_EXTRA = 2**20
"""Free bytes required in addition to the arrays' own: names, shardings, block sizes."""


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, damaged or not, oldest first. If there are any, `resume` restores one or raises."""
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isascii() and entry.name.isdigit())


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
        coordination = ocp.options.MultiprocessingOptions()
        if only_first:
            coordination = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="examine")
        writes = not read_only and not only_first
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=every or None,
            enable_async_checkpointing=False,
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

    def save(self, step: int, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Writes a checkpoint, complete on return, and deletes those that `keep` and `every` do not cover.

        End the process after an error: orbax may still be writing other arrays of the failed checkpoint, and only the next process can
        delete its remains.

        Args:
          step: greater than the step of every earlier checkpoint.
          train_state: adapter and optimiser; None for a search.
          host: everything else, as JSON values: archive, journal position.

        Raises:
          RunError: the disk is full or fails; earlier checkpoints are unchanged.
        """
        parts: dict[str, Any] = {"host": ocp.args.JsonSave(_seal(host, train_state))}
        if train_state is not None:
            parts["train_state"] = ocp.args.StandardSave(train_state)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise RunError(f"Checkpoint {step} must come after the latest one, {latest}, in {self._directory}.")
        try:
            self._check_room(train_state, host)
            with _quiet():
                self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
                self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a failing disk as ValueError
            raise RunError(
                f"Cannot write checkpoint {step} to {self._directory}: {error}\nEarlier checkpoints are unchanged. {storage_remedy(error)}"
                f" Then start the same command again: it resumes at {'the beginning' if latest is None else f'step {latest}'}."
            ) from error

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
        with _quiet():
            try:
                if abstract_train_state is not None:
                    self._check_layout(step, abstract_train_state)
                    parts["train_state"] = ocp.args.StandardRestore(jax.tree.map(_abstract, abstract_train_state))
                restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
                train_state = restored.get("train_state")
                return train_state, _open(restored.get("host"), train_state)
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
        """Ends orbax's threads; the checkpoints stay."""
        self._manager.close()


def _seal(host: dict[str, Any], train_state: TrainState | None) -> dict[str, Any]:
    """The host state as it is stored: with the checksums of the arrays, and one over everything."""
    content = {"host": host, "arrays": _checksums(train_state)}
    return {**content, "sha256": _sha256(content)}


def _open(sealed: Any, train_state: TrainState | None) -> dict[str, Any]:
    """The host state of `_seal`, after verifying it and the restored arrays.

    Raises:
      ValueError: something was altered.
    """
    if not isinstance(sealed, dict) or sealed.keys() != {"host", "arrays", "sha256"}:
        raise ValueError("the host state is not an object of host, arrays and sha256.")
    content = {"host": sealed["host"], "arrays": sealed["arrays"]}
    if not isinstance(content["host"], dict) or not isinstance(content["arrays"], dict):
        raise ValueError("host and arrays in the host state must be objects.")
    if sealed["sha256"] != _sha256(content):
        raise ValueError("checksum mismatch in the host state.")
    if train_state is not None:
        found = _checksums(train_state)
        changed = sorted(name for name in found | content["arrays"] if found.get(name) != content["arrays"].get(name))
        if changed:
            raise ValueError(f"checksum mismatch in {len(changed)} arrays: {', '.join(changed[:3])}{', ...' * (len(changed) > 3)}.")
    return content["host"]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksums(tree: Any) -> dict[str, str]:
    """SHA-256 of each array by name; independent of how the array is sharded."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(_host_bytes(leaf)).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _host_bytes(leaf: jax.Array | np.ndarray) -> memoryview:
    """An array's bytes in row-major order. Assembled from shards: jax would cache a conversion of the whole array in memory."""
    if isinstance(leaf, np.ndarray) or not leaf.is_fully_addressable:
        return np.ascontiguousarray(fetch(leaf)).reshape(-1).view(np.uint8).data
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if len(shards) == 1 and shards[0].data.shape == leaf.shape:
        values = np.ascontiguousarray(shards[0].data)
    else:
        values = np.empty(leaf.shape, leaf.dtype)
        for shard in shards:
            values[shard.index] = np.asarray(shard.data)
    return values.reshape(-1).view(np.uint8).data


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the loggers of orbax and asyncio: they log a traceback for each array of a failure, which the raised error reports once."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
