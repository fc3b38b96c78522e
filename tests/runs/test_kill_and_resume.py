"""kill -9 before any file operation of a run, or midway through a write, and again while it resumes: the results stay the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from discover_jax.archive.journal import Journal
from discover_jax.runs.checkpoints import Checkpoints

_SCRIPT = Path(__file__).with_name("killed_run.py")


def run_files(folder: Path) -> dict[str, bytes]:
    """All files of a run, except checkpoints, which contain the time, and files that were set aside while resuming."""
    skipped = ("checkpoints", ".lock", "journal.discarded.jsonl")
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.relative_to(folder).parts[0] not in skipped}


def check(root: Path, moments: list[int]) -> None:
    ended = subprocess.run([sys.executable, str(_SCRIPT), str(root), *map(str, moments)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    _, *lines = ended.stdout.splitlines()
    expected = run_files(root / "unbroken")
    assert {"journal.jsonl", "metrics.jsonl", "config.json", "best/solution.py", "rollouts/step-000002.parquet"} <= expected.keys()
    attempts = Journal(root / "unbroken" / "journal.jsonl").read()
    assert len({attempt.step for attempt in attempts}) == 3
    host = Checkpoints(root / "unbroken" / "checkpoints", keep=2, every=0, read_only=True).restore(2, None)[1]
    assert len(lines) == len(moments)
    for moment, line in zip(moments, lines, strict=True):
        folder = root / str(moment)
        assert line.split()[:2] == [str(moment), "True"], "the first start was to be killed"
        assert line.split()[3] == "True"
        assert run_files(folder) == expected, f"killed before file operation {moment}"
        checkpoints = Checkpoints(folder / "checkpoints", keep=2, every=0, read_only=True)
        assert checkpoints.latest() == 2
        assert checkpoints.restore(2, None)[1] == host
        # Rows that were set aside are in the journal again, since the steps were repeated. Incomplete rows are not.
        discarded = folder / "journal.discarded.jsonl"
        for row in discarded.read_text().splitlines() if discarded.exists() else []:
            try:
                id = json.loads(row)["id"]
            except ValueError:
                continue
            assert id in {attempt.id for attempt in attempts}


def operations(root: Path) -> int:
    """The number of file operations of the uninterrupted run, about 310."""
    ended = subprocess.run([sys.executable, str(_SCRIPT), str(root)], capture_output=True, text=True, check=True)
    return int(ended.stdout.split()[1])


@pytest.mark.slow  # tests/faults/test_kills.py kills whole runs
def test_killed_at_some_moments(tmp_path):
    count = operations(tmp_path / "count")
    check(tmp_path, [count * part // 3 + 40 for part in range(3)])


@pytest.mark.slow
def test_killed_at_every_moment(tmp_path):
    """All moments except the last few: the count varies a little between runs, because of orbax's threads."""
    check(tmp_path, list(range(1, operations(tmp_path / "count") - 4)))
