"""Checkpoints: each is one atomic step that holds everything a run needs to go on.

Orbax writes a checkpoint under a temporary name and renames it when all of it is there, so that a kill at any moment leaves
either the whole checkpoint or none.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from discover_jax.exceptions import RunError
from discover_jax.learning.train_state import TrainState

# Orbax reports each save on some ten lines, which would tear the console's display.
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of one folder; only one process may write there at a time (see `workdir`).

    Args:
      directory: made if needed. What a kill left of an unfinished checkpoint is deleted.
      keep: how many of the latest stay.
      every: checkpoints whose step is a multiple of this stay, too; 0: none.
      read_only: only look at checkpoints, those of another run, say: nothing there is written or deleted.

    Raises:
      RunError: the folder cannot be used.
    """

    def __init__(self, directory: Path, keep: int, every: int, *, read_only: bool = False):
        self._directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=every or None,
            enable_async_checkpointing=False,
            create=not read_only,
            read_only=read_only,
        )
        try:
            # Orbax's own cleaning overlooks a folder that was killed right after it was made.
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                if not read_only:
                    shutil.rmtree(unfinished)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise RunError(f"The folder of checkpoints {self._directory} cannot be used ({error}).") from error

    def save(self, step: int, train_state: TrainState | None, host: dict[str, Any]) -> None:
        """Writes a checkpoint and then drops those that are not to be kept. On return it is complete.

        Args:
          step: number of steps done; above that of every earlier checkpoint.
          train_state: adapter and optimiser; None for a search without training.
          host: all else, as JSON can hold it: archive, journal position, ids of trackers.

        Raises:
          RunError: the disk is full or fails; the earlier checkpoints are untouched.
        """
        parts: dict[str, Any] = {"host": ocp.args.JsonSave(host)}
        if train_state is not None:
            parts["train_state"] = ocp.args.StandardSave(train_state)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise RunError(f"Checkpoint {step} would not come after the latest one, {latest}, in {self._directory}.")
        try:
            self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a failing disk as ValueError
            raise RunError(
                f"Checkpoint {step} could not be written to {self._directory}: {error}\nThe checkpoints before it are untouched. Free some"
                f" space, then start the same command again: it resumes at {'the beginning' if latest is None else f'step {latest}'}."
            ) from error

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
          RunError: there is no such checkpoint, or it holds arrays of other names or shapes.
        """
        parts: dict[str, Any] = {"host": ocp.args.JsonRestore()}
        if abstract_train_state is not None:
            abstract = jax.tree.map(_abstract, abstract_train_state)
            parts["train_state"] = ocp.args.StandardRestore(abstract)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"Checkpoint {step} in {self._directory} cannot be restored: {error}\nComplete checkpoints there:"
                f" {sorted(self._manager.all_steps())}. If it is among them, it was made with another model or other adapter ranks, or"
                " was altered."
            ) from error
        return restored.get("train_state"), restored["host"]

    def close(self) -> None:
        """Lets go of orbax's threads; the checkpoints stay."""
        self._manager.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
