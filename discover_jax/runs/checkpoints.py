"""Checkpoints: each is one atomic step that holds everything a run needs to go on.

Orbax writes a checkpoint under a temporary name and renames it when all of it is there, so that a kill at any moment leaves
either the whole checkpoint or none. What happens to it later, a torn file or a flipped bit, shows by checksums of the content: each array
has one, and so has the host's part, which holds them all. Nothing is unpickled.

Of several processes each writes and reads what its own devices hold; a checkpoint may be restored by another number of them, onto another
mesh. Which checkpoint is whole, the first process finds out alone: orbax's processes wait for each other, and one that met a damaged file
would leave the others waiting.
"""

import contextlib
import copy
import dataclasses
import gc
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from discover_jax.exceptions import RunError
from discover_jax.hosts.processes import ALONE, Processes
from discover_jax.learning.train_state import TrainState
from discover_jax.models.sharding import fetch

# Orbax reports each save on some ten lines, which would tear the console's display.
logging.getLogger("absl").setLevel(logging.WARNING)

_ROOM_PER_ARRAY = 4096
_ROOM_BESIDES = 2**20
"""Bytes asked for beside the arrays' own: names, shardings, block sizes."""


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder, damaged or not, oldest first; `Checkpoints.resume` finds something if there are any."""
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isascii() and entry.name.isdigit())


class Checkpoints:
    """The checkpoints of one folder; only one run may write there at a time (see `workdir`). All its processes make one and call it alike.

    Args:
      directory: made if needed. What a kill left of an unfinished checkpoint is deleted.
      keep: how many of the latest stay.
      every: checkpoints whose step is a multiple of this stay, too; 0: none.
      read_only: only look at checkpoints, those of another run, say: nothing there is written or deleted.
      processes: of the run.

    Raises:
      RunError: the folder cannot be used.
    """

    def __init__(self, directory: Path, keep: int, every: int, *, read_only: bool = False, processes: Processes = ALONE):
        self._directory = Path(directory).absolute()
        self._processes = processes
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=every or None,
            enable_async_checkpointing=False,
            create=not read_only,
            read_only=read_only,
            lightweight_initialize=True,  # the times of old checkpoints are not wanted, and their file may be damaged
        )
        try:
            # Orbax's own cleaning overlooks a folder that was killed right after it was made.
            if processes.leads and not read_only:
                for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
            processes.wait()
            self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        except OSError as error:
            raise RunError(f"The folder of checkpoints {self._directory} cannot be used ({error}).") from error

    def save(self, step: int, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Writes a checkpoint and then drops those that are not to be kept. On return it is complete.

        After an error the process should end: orbax may still be writing other arrays of the checkpoint that failed, and only the next
        process can clear its remains away.

        Args:
          step: number of steps done; above that of every earlier checkpoint.
          train_state: adapter and optimiser; None for a search without training.
          host: all else, as JSON can hold it: archive, journal position, ids of trackers.

        Raises:
          RunError: the disk is full or fails; the earlier checkpoints are untouched.
        """
        parts: dict[str, Any] = {"host": ocp.args.JsonSave(_seal(host, train_state))}
        if train_state is not None:
            parts["train_state"] = ocp.args.StandardSave(train_state)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise RunError(f"Checkpoint {step} would not come after the latest one, {latest}, in {self._directory}.")
        try:
            self._check_room(train_state, host)
            with _quiet():
                self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
                self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a failing disk as ValueError
            raise RunError(
                f"Checkpoint {step} could not be written to {self._directory}: {error}\nThe checkpoints before it are untouched. Free some"
                f" space, then start the same command again: it resumes at {'the beginning' if latest is None else f'step {latest}'}."
            ) from error

    def _check_room(self, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Refuses to begin a checkpoint that cannot be ended: one error with numbers instead of one for every array."""
        leaves = jax.tree.leaves(train_state)
        needed = sum(leaf.nbytes + _ROOM_PER_ARRAY for leaf in leaves) + len(json.dumps(host)) + _ROOM_BESIDES
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(f"it needs about {needed / 1e6:,.1f} MB, but the disk has only {free / 1e6:,.1f} MB free.")

    def latest(self) -> int | None:
        """Step of the last complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract_train_state: TrainState | None) -> tuple[TrainState | None, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          step: of a checkpoint that is there.
          abstract_train_state: shapes, types and, for arrays to be spread over devices, shardings; arrays do, too. None leaves the train
            state out.

        Returns:
          The train state (None if left out) and the host's part.

        Raises:
          RunError: there is no such checkpoint, it is damaged, or it holds arrays of other names or shapes.
        """
        if step not in (steps := sorted(self._manager.all_steps())):
            raise RunError(f"There is no checkpoint {step} in {self._directory}; complete ones: {steps}.")
        try:
            return self._read(step, abstract_train_state)
        except ValueError as error:
            raise RunError(
                f"Checkpoint {step} in {self._directory} cannot be restored: {error}\nIt was damaged or altered, or made by another"
                f" version. Complete checkpoints there: {steps}; delete the folder of a broken one to go back to the one before."
            ) from error

    def _read(self, step: int, abstract_train_state: TrainState | None) -> tuple[TrainState | None, dict[str, Any]]:
        """`restore`, but for the advice.

        Raises:
          RunError: it holds arrays of other names or shapes.
          ValueError: it is damaged; what is wrong, in one line.
        """
        parts: dict[str, Any] = {"host": ocp.args.JsonRestore()}
        fault = ""
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
            except Exception as error:  # what orbax raises for a damaged file depends on which file it is, and where
                fault = _short(error)
            # Only here, where orbax's error is gone and with it all that it refers to, which would speak up when it is collected.
            raise ValueError(fault)

    def resume(
        self, abstract_train_state: TrainState | None, note: Callable[[str], None]
    ) -> tuple[int, TrainState | None, dict[str, Any]] | None:
        """Restores the latest checkpoint that is whole. Damaged ones after it are set aside, beside the folder, and told of.

        Args:
          abstract_train_state: see `restore`.
          note: told, of each checkpoint that is set aside, what is wrong with it and where it is now.

        Returns:
          The step, the train state and the host's part; None if there are no checkpoints, damaged or not.

        Raises:
          RunError: there are some, but none can be restored; all stay where they are.
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
        """What `resume` finds for this process alone: step and host's part. The arrays, read whole to be checked, are let go of."""
        alone = copy.copy(self)
        alone._processes = ALONE
        alone._options = dataclasses.replace(
            self._options,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix="examine"
            ),
        )
        alone._manager = ocp.CheckpointManager(self._directory, options=alone._options)
        try:
            whole = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_train_state)
            found = alone._resume(whole, note)
        finally:
            alone._manager.close()
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
                place = self._set_aside(damaged)
                note(
                    f"Checkpoint {damaged} is damaged, so the run goes back to checkpoint {step} and does the steps after it again. It was"
                    f" moved to {place}. What is wrong with it: {fault}"
                )
            if faults:  # orbax knows the steps that were there when it looked
                self._manager.close()
                self._manager = ocp.CheckpointManager(self._directory, options=self._options)
            return step, train_state, host
        if faults:
            told = "\n".join(f"  - checkpoint {step}: {fault}" for step, fault in faults.items())
            raise RunError(
                f"None of the checkpoints in {self._directory} can be restored, so the run cannot go on:\n{told}\nPut them back from a"
                " copy, or start a new run in another folder (--workdir). The journal and best/ in this one stay as they are."
            )
        return None

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way of the next one of its step."""
        folder = self._directory.with_name(f"{self._directory.name}.damaged")
        try:
            folder.mkdir(exist_ok=True)
            number = 1
            while (place := folder / f"{step}-{number}").exists():
                number += 1
            (self._directory / str(step)).rename(place)
        except OSError as error:
            raise RunError(
                f"The damaged checkpoint {step} in {self._directory} could not be moved to {folder} ({error}). Move it yourself, then"
                " start the same command again: it goes on from the checkpoint before."
            ) from error
        return place

    def _check_layout(self, step: int, wanted: TrainState) -> None:
        """Compares names, types and shapes before orbax does, which would tell of the first difference only, and in its own terms."""
        folder: Any = self._directory / str(step) / "train_state"  # orbax names a path type of its own, but takes this one
        if not folder.is_dir():
            raise RunError(f"Checkpoint {step} in {self._directory} holds no adapter: a search made it. Give the folder of a training run.")
        found_all, wanted_all = _layout(ocp.StandardCheckpointHandler().metadata(folder).tree), _layout(wanted)
        names = [name for name in wanted_all | found_all if found_all.get(name) != wanted_all.get(name)]
        if names:
            differences = "\n".join(
                f"  - {name}: checkpoint has {found_all.get(name, 'none')}, this run {wanted_all.get(name, 'none')}" for name in names[:5]
            )
            raise RunError(
                f"Checkpoint {step} in {self._directory} was made with another model, other adapter ranks or another optimiser;"
                f" {len(names)} arrays differ:\n{differences}{f'{chr(10)}  - ...' if len(names) > 5 else ''}\nGive this run the settings of"
                " that one, or do not start from its checkpoint."
            )

    def close(self) -> None:
        """Lets go of orbax's threads; the checkpoints stay."""
        self._manager.close()


def _seal(host: dict[str, Any], train_state: TrainState | None) -> dict[str, Any]:
    """The host's part as it is stored: with the arrays' checksums, and one of its own over everything."""
    content = {"host": host, "arrays": _checksums(train_state)}
    return {**content, "sha256": _sha256(content)}


def _open(sealed: Any, train_state: TrainState | None) -> dict[str, Any]:
    """The host's part of `_seal`, once it has proved to be that, and the restored arrays to be those.

    Raises:
      ValueError: what was altered.
    """
    if not isinstance(sealed, dict) or sealed.keys() != {"host", "arrays", "sha256"}:
        raise ValueError("its host's part is no object of host, arrays and sha256.")
    content = {"host": sealed["host"], "arrays": sealed["arrays"]}
    if not isinstance(content["host"], dict) or not isinstance(content["arrays"], dict):
        raise ValueError("its host's part holds something else than objects.")
    if sealed["sha256"] != _sha256(content):
        raise ValueError("the checksum of its host's part is another.")
    if train_state is not None:
        found = _checksums(train_state)
        changed = sorted(name for name in found | content["arrays"] if found.get(name) != content["arrays"].get(name))
        if changed:
            raise ValueError(f"the checksums of {len(changed)} arrays are others: {', '.join(changed[:3])}{', ...' * (len(changed) > 3)}.")
    return content["host"]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksums(tree: Any) -> dict[str, str]:
    """SHA-256 of each array by its name; the same however the array is spread over devices."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(_host_bytes(leaf)).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _host_bytes(leaf: jax.Array | np.ndarray) -> memoryview:
    """An array's bytes in its own order. Put together from its parts: a conversion of the whole would be kept in memory beside it."""
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
    """The first line of what an error came from: orbax's own text can go on for pages."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    line = (str(cause).strip() or repr(cause)).splitlines()[0]
    return line if len(line) <= 300 else line[:300] + " ..."


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Shape, type and place of a leaf; without a place of its own it goes to the first device. One of numpy's stays on the host."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _layout(tree: Any) -> dict[str, str]:
    """Name of each array -> its type and shape, as in "lora/head/A" -> "float32[5, 2]"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax and asyncio from logging a traceback for every array of a failure: the error that is raised tells it once."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None  # coroutines that were never awaited to the end
    try:
        yield
    except BaseException:
        gc.collect()  # futures whose error nobody asked for log it when they are collected
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook
