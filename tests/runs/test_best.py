"""best/: content, atomic replacement, and a failing disk."""

import json
import os
import subprocess
import time

import pytest

from discover_jax import files
from discover_jax.exceptions import RunError
from discover_jax.runs.best import write_best
from discover_jax.types import State

BESIDE = {"disclosure": b"{}\n", "rerun": "#!/bin/sh\n"}


def state(id: str, parent: str, code: str, score: float) -> State:
    return State(id=id, parent_id=parent, code=code, value=score, score=score, stdout="", step=int(id[0]), adapter_step=0)


FIRST = state("0-1-2", "seed", "import a\n\ndef run():\n    return 1\n", 0.5)
SECOND = state("3-0-1", "0-1-2", "import a\n\ndef run():\n    return 2\n", 0.75)


def test_bundle(tmp_path):
    write_best(tmp_path / "best", lineage=[FIRST, SECOND], submission=b"id,y\n1,2\n", grade={"score": 0.75}, **BESIDE)
    best = tmp_path / "best"
    assert (best / "solution.py").read_text() == SECOND.code
    assert (best / "submission.csv").read_bytes() == b"id,y\n1,2\n"
    assert json.loads((best / "grade.json").read_text()) == {"score": 0.75}
    assert (best / "disclosure.json").read_bytes() == BESIDE["disclosure"]
    assert (best / "rerun.sh").read_text() == BESIDE["rerun"]
    assert os.access(best / "rerun.sh", os.X_OK)
    names = ["00-0-1-2.py", "01-3-0-1.py", "lineage.json"]
    assert sorted(entry.name for entry in (best / "lineage").iterdir()) == names
    assert json.loads((best / "lineage" / "lineage.json").read_text()) == [
        {"id": "0-1-2", "parent": "seed", "score": 0.5, "step": 0},
        {"id": "3-0-1", "parent": "0-1-2", "score": 0.75, "step": 3},
    ]


def test_diffs_rebuild_the_program(tmp_path):
    """`patch`, applied to an empty file, goes through the ancestors to the solution."""
    write_best(tmp_path / "best", lineage=[FIRST, SECOND], submission=b"", grade={}, **BESIDE)
    (tmp_path / "program.py").write_text("")
    diff = (tmp_path / "best" / "lineage.diff").read_text()
    assert "-    return 1\n+    return 2\n" in diff
    for part in diff.split("\n# "):
        try:
            subprocess.run(["patch", "program.py"], input=part, text=True, cwd=tmp_path, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("this machine has no `patch`")
    assert (tmp_path / "program.py").read_text() == SECOND.code


def test_programs_with_many_equal_lines_are_not_compared(tmp_path):
    """Python's comparison takes cubic time for them: here, ten minutes."""
    old, new = ("\n".join(f"x{step * line % 101}" for line in range(20_000)) for step in (1, -1))
    before = time.process_time()
    lineage = [state("0-1-2", "seed", old, 0.5), state("3-0-1", "0-1-2", new, 0.75)]
    write_best(tmp_path / "best", lineage=lineage, submission=b"", grade={}, **BESIDE)
    assert time.process_time() - before < 5.0
    diff = (tmp_path / "best" / "lineage.diff").read_text().splitlines()
    start = diff.index("@@ -1,20000 +1,20000 @@") + 1
    assert diff[start:] == [*(f"-{line}" for line in old.split("\n")), *(f"+{line}" for line in new.split("\n"))]


def test_bundle_is_replaced_atomically(tmp_path):
    write_best(tmp_path / "best", lineage=[FIRST, SECOND], submission=b"a", grade={"score": 1}, **BESIDE)
    (tmp_path / ".best.new").mkdir()  # left by a kill
    (tmp_path / ".best.new" / "solution.py").write_text("half")
    (tmp_path / ".best.old").mkdir()
    write_best(tmp_path / "best", lineage=[FIRST], submission=b"b", grade={"score": 2}, **BESIDE)
    assert (tmp_path / "best" / "solution.py").read_text() == FIRST.code
    assert not (tmp_path / "best" / "lineage" / "01-3-0-1.py").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]


def test_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    write_best(tmp_path / "best", lineage=[FIRST], submission=b"a", grade={}, **BESIDE)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device"):
            write_best(tmp_path / "best", lineage=[SECOND], submission=b"b", grade={}, **BESIDE)
    assert (tmp_path / "best" / "solution.py").read_text() == FIRST.code
    write_best(tmp_path / "best", lineage=[SECOND], submission=b"b", grade={}, **BESIDE)
    assert (tmp_path / "best" / "solution.py").read_text() == SECOND.code


def test_empty_lineage_is_refused(tmp_path):
    with pytest.raises(RunError, match="lineage"):
        write_best(tmp_path / "best", lineage=[], submission=b"", grade={}, **BESIDE)


def test_code_that_utf8_cannot_encode(tmp_path):
    write_best(tmp_path / "best", lineage=[state("0-0-0", "seed", "x = '\ud800'", 0.5)], submission=b"", grade={}, **BESIDE)
    assert (tmp_path / "best" / "solution.py").read_bytes() == b"x = '?'\n"
