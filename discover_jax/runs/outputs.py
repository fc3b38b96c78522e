"""outputs/: values that programs returned, for their children to read. One file for each distinct value, named by its SHA-256.

The bytes are those of `execution.values`. They come from programs, and nothing here decodes them. The sandboxes of children do, and for
best/ the run's process (see `best.write_best`), both within the bounds of `values.decode`.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

from discover_jax.exceptions import RunError
from discover_jax.execution.limits import MIB
from discover_jax.files import storage_remedy, write_atomic
from discover_jax.hosts.processes import Processes
from discover_jax.tasks.prepare import AnyTask
from discover_jax.types import TOO_LONG, Outcome, State, Verdict, children_read

MOST_BYTES = 4 * MIB
"""Children cannot read a longer value. Reading the worst one of this length takes them about 400 MiB of memory."""


def output_of(task: AnyTask, verdict: Verdict) -> str:
    """`State.output` of a scored program."""
    result = verdict.execution.result
    if not task.reuse_output or verdict.outcome is not Outcome.OK or not result:
        return ""
    digest = hashlib.sha256(result).hexdigest()
    return digest if len(result) <= MOST_BYTES else TOO_LONG + digest


class Outputs:
    """The folder. Files are never deleted: an earlier checkpoint may need them."""

    def __init__(self, folder: Path) -> None:
        """`folder`: need not exist; the first `put` creates it."""
        self._folder = folder

    def put(self, value: bytes) -> None:
        """Stores a value, unless it is there.

        Raises:
          RunError: it cannot be written.
        """
        path = self._path(hashlib.sha256(value).hexdigest())
        try:
            if path.is_file() and path.read_bytes() == value:
                return
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"Cannot write {path} ({error}). {storage_remedy(error)}") from error
        write_atomic(path, value)

    def get(self, digest: str) -> bytes:
        """The value with this SHA-256.

        Raises:
          RunError: it is missing, damaged or cannot be read.
        """
        path = self._path(digest)
        try:
            value = path.read_bytes()
            problem = "" if hashlib.sha256(value).hexdigest() == digest else "checksum mismatch"
        except OSError as error:
            value, problem = b"", str(error)
        if problem:
            raise RunError(
                f"{path} does not hold the value that an archived program returned ({problem}). Its children read it"
                " (Problem.reuse_output), so the run cannot be resumed. Restore the original file, or start a new run in another folder"
                " (--workdir)."
            )
        return value

    def check(self, states: Iterable[State]) -> None:
        """Raises RunError if a value that children of these states read is missing or damaged."""
        for digest in digests_of(states):
            self.get(digest)

    def bring(self, source: "Outputs", states: Iterable[State]) -> None:
        """Copies the values of these states from another run. Raises RunError if one is missing or damaged."""
        for digest in digests_of(states):
            self.put(source.get(digest))

    def for_all(self, processes: Processes, states: Iterable[State]) -> dict[str, bytes]:
        """The values of these states by SHA-256, in all processes. All must call it; only the first reads the files.

        Raises:
          RunError: see `get`.
        """
        digests = digests_of(states)
        if not digests:
            return {}
        texts = processes.from_first(lambda: [base64.b64encode(self.get(digest)).decode() for digest in digests])
        return {digest: base64.b64decode(text) for digest, text in zip(digests, texts, strict=True)}

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.value"


def digests_of(states: Iterable[State]) -> list[str]:
    """The distinct outputs of states that are stored for children, sorted."""
    return sorted({state.output for state in states if children_read(state.output)})
