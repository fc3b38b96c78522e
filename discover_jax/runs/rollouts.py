"""rollouts/: what the policy wrote, one file a step, for reading and plotting. The run itself never reads it back."""

import json
from pathlib import Path
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.runs.workdir import write_atomic


def write_rollouts(directory: Path, step: int, rows: list[dict[str, Any]]) -> Path:
    """Writes step-NNNNNN.jsonl, one row a rollout, all or nothing; a resumed run replaces the file of a step that it does again.

    Args:
      directory: exists.
      step: from 0.
      rows: what JSON can hold; texts, ids, rewards, as the caller likes.

    Returns:
      The file's path.

    Raises:
      RunError: a row that JSON cannot hold, or a disk that is full or fails.
    """
    try:
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise RunError(f"The rollouts of step {step} cannot be written as JSON: {error}.") from error
    path = directory / f"step-{step:06d}.jsonl"
    write_atomic(path, data)
    return path
