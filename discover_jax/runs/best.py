"""best/: the best program of a run, its submission, grade and lineage, and a script that runs it again."""

import difflib
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from discover_jax.exceptions import RunError
from discover_jax.execution import values
from discover_jax.files import storage_remedy, sync_folder, write_synced
from discover_jax.records import parse_json
from discover_jax.tasks.interval import no_interval
from discover_jax.tasks.prepare import AnyTask
from discover_jax.types import State, Verdict

SUBMISSION, RETURNED = "submission.csv", "returned.value"
"""The file with the program's result: the submission to a competition, or the value that was returned last for a problem, in the form of
`execution.values`."""
PARENT_OUTPUT = "parent_output.value"
"""The value that the program's parent returned, in the same form, if the program could read it (`Problem.reuse_output`)."""

_PARENT_OUTPUT_DIGEST = "parent_output_sha256"
"""Entry of grade.json if there is such a value."""
_MOST_COMPARISONS = 10**8
"""Pairs of equal lines times lines, above which programs are not compared. The worst ones below it take half a second; usual ones have
10^7."""


def bundle_dir(best_dir: Path, competition: str, *, alone: bool) -> Path:
    """The folder of a competition's best program: best/ itself if the run has one competition, else best/COMPETITION."""
    return best_dir if alone else best_dir / competition


def grade_of(task: AnyTask, best: State, verdict: Verdict, seed: int, parent_output: bytes = b"") -> dict[str, Any]:
    """The content of grade.json: scores, their rows and intervals, and what selected the program.

    Args:
      best: state of the program, with a score.
      verdict: verdict on the program.
      seed: seed of the run.
      parent_output: the value that the program's parent returned, if it could read it.
    """
    assert best.score is not None, "the best program always has a score"
    private_score, submission = verdict.grade.private_score, verdict.execution.result
    private_interval = (
        no_interval("there is no private score") if private_score is None else task.private_score_interval(private_score, submission)
    )
    return {
        "id": best.id,
        "competition": task.id,
        "metric": task.metric.name,
        "higher_is_better": task.metric.higher_is_better,
        "score": best.score,
        "rows": task.score_rows,
        "scored_on": task.disclosure.scored_on,
        **task.score_interval(best.score, submission).to_json("interval_95"),
        "private_score": private_score,
        "private_rows": task.private_rows,
        **private_interval.to_json("private_interval_95"),
        "grader": task.disclosure.grader,
        "chosen_by": task.disclosure.text,
        "leaderboard": task.leaderboard,
        "step": best.step,
        "adapter_step": best.adapter_step,
        "seed": seed,
        **({_PARENT_OUTPUT_DIGEST: hashlib.sha256(parent_output).hexdigest()} if parent_output else {}),
    }


def read_best(folder: Path, best: State, competition: str) -> tuple[dict[str, Any], bytes, bytes] | None:
    """grade.json, submission and `read_parent_output` of a program; None if the folder is incomplete or holds another program."""
    try:
        grade = parse_json((folder / "grade.json").read_bytes())
        if not isinstance(grade, dict) or (grade.get("id"), grade.get("competition")) != (best.id, competition):
            return None
        return grade, read_result(folder), read_parent_output(folder, grade)
    except (OSError, ValueError):  # the caller reports the missing bundle
        return None


def bundled_id(folder: Path) -> str:
    """Id of the program in a bundle, as its grade.json names it; empty if it cannot be read."""
    try:
        return str(parse_json((folder / "grade.json").read_bytes())["id"])
    except (OSError, ValueError, KeyError, TypeError):  # the caller reports the missing bundle
        return ""


def read_parent_output(folder: Path, grade: dict[str, Any]) -> bytes:
    """The value of its parent that the program could read, empty if there is none.

    Raises:
      OSError: the file is missing or cannot be read.
      ValueError: it is not the one that `grade`, the content of grade.json, names.
    """
    if _PARENT_OUTPUT_DIGEST not in grade:
        return b""
    value = (folder / PARENT_OUTPUT).read_bytes()
    if hashlib.sha256(value).hexdigest() != grade[_PARENT_OUTPUT_DIGEST]:
        raise ValueError(f"checksum mismatch in {PARENT_OUTPUT}")
    return value


def read_result(folder: Path) -> bytes:
    """The submission or the returned value in a folder. Raises OSError if it has neither."""
    returned = folder / RETURNED
    return (returned if returned.exists() else folder / SUBMISSION).read_bytes()


def write_best(
    best_dir: Path,
    *,
    lineage: list[State],
    submission: bytes,
    grade: dict[str, Any],
    disclosure: bytes,
    rerun: str,
    calls: bool = False,
    parent_output: bytes = b"",
) -> None:
    """Replaces the whole folder: writes a new one next to it, then swaps the two by renaming.

    After a kill between the two renames, best/ is missing and `.best.old` holds the old one. The next call repairs this; a resumed run
    makes it.

    Args:
      best_dir: the folder, which need not exist.
      lineage: ancestors of the best state and the state itself, oldest first; see `archive.lineage`.
      submission: its submission, as CSV, or for a problem the value that was returned last.
      grade: content of grade.json, see `grade_of`.
      disclosure: content of the run's disclosure.json, so that the folder can be shared by itself.
      rerun: text of rerun.sh, see `rerun.script`.
      calls: whether it is for a problem. Then returned.json has the value for readers, with arrays as lists.
      parent_output: the value that the program's parent returned, if it could read it; otherwise empty.

    Raises:
      RunError: the lineage is empty, or the disk is full or fails; the old folder is then kept.
    """
    if not lineage:
        raise RunError(f"Cannot write {best_dir}: the best program is not in the journal.")
    best_dir = Path(best_dir)
    new, old = best_dir.with_name(f".{best_dir.name}.new"), best_dir.with_name(f".{best_dir.name}.old")
    try:
        best_dir.parent.mkdir(exist_ok=True)
        _remove(new)
        (new / "lineage").mkdir(parents=True)
        write_synced(new / "solution.py", _text(lineage[-1].code))
        write_synced(new / (RETURNED if calls else SUBMISSION), submission)
        if calls:
            write_synced(new / "returned.json", _readable(submission))
        if parent_output:
            write_synced(new / PARENT_OUTPUT, parent_output)
        write_synced(new / "grade.json", _json(grade))
        write_synced(new / "lineage.diff", _text(_diffs(lineage)))
        write_synced(new / "disclosure.json", disclosure)
        write_synced(new / "rerun.sh", rerun.encode())
        (new / "rerun.sh").chmod(0o755)
        for number, state in enumerate(lineage):
            write_synced(new / "lineage" / f"{number:02d}-{state.id}.py", _text(state.code))
        write_synced(new / "lineage" / "lineage.json", _json([_row(state) for state in lineage]))
        sync_folder(new / "lineage")
        sync_folder(new)
        if best_dir.exists():
            _remove(old)
            best_dir.rename(old)
        new.rename(best_dir)
        sync_folder(best_dir.parent)
        _remove(old)
    except OSError as error:
        raise RunError(
            f"Cannot write the best program to {best_dir} ({error}). It is still in the journal. {storage_remedy(error)} Then"
            " start the same command again."
        ) from error


def _readable(result: bytes) -> bytes:
    """A returned value as JSON; null if it is none that `values.decode` accepts. It keeps all digits; NaN is not standard JSON.

    A program chose the bytes, and this is the run's own process: `values.decode` bounds what they can cost.
    """
    try:
        text = json.dumps(values.decode(result), default=_lists)
    except (ValueError, MemoryError, RecursionError):  # the check was content with less, or with nothing
        text = "null"
    return f"{text}\n".encode()


def _lists(array: np.ndarray) -> list[Any]:
    """An array as lists; complex numbers as strings."""
    return array.tolist() if array.dtype.kind != "c" else [str(number) for number in array.ravel().tolist()]


def _row(state: State) -> dict[str, Any]:
    return {"id": state.id, "parent": state.parent_id, "score": state.score, "step": state.step}


def _diffs(lineage: list[State]) -> str:
    """Unified diffs of each state to the one before it; the oldest is compared with an empty file."""
    parts = []
    before: State | None = None
    for state in lineage:
        old_code, old_name = (before.code, f"{before.id}.py") if before is not None else ("", "/dev/null")
        lines = _diff(old_code.splitlines(), state.code.splitlines(), old_name, f"{state.id}.py")
        parts.append(f"# {state.id}: score {state.score}, step {state.step}\n" + "".join(line + "\n" for line in lines))
        before = state
    return "\n".join(parts)


def _diff(old: list[str], new: list[str], old_name: str, new_name: str) -> Iterator[str]:
    """The lines of a unified diff. It replaces all lines if a comparison could take long, which programs may aim at."""
    counts = Counter(old)
    pairs = sum(counts[line] for line in new)
    if pairs * min(len(old), len(new)) <= _MOST_COMPARISONS:
        return difflib.unified_diff(old, new, old_name, new_name, lineterm="")
    heading = f"--- {old_name}", f"+++ {new_name}", f"@@ -1,{len(old)} +1,{len(new)} @@"
    return itertools.chain(heading, (f"-{line}" for line in old), (f"+{line}" for line in new))


def _text(text: str) -> bytes:
    """A program as UTF-8; lone surrogates, which UTF-8 cannot encode, become question marks."""
    return (text if text.endswith("\n") else text + "\n").encode(errors="replace")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
