"""The run directory: creation, resuming, refusals, the lock, and atomic files on a failing disk."""

import json
import re
import subprocess
import sys

import pytest

from discover_jax.exceptions import RunError
from discover_jax.runs.workdir import open_workdir

CONFIG = {"seed": 0, "train.steps": 10, "lora.alpha": 32.0, "execution.allow_weaker": False, "name": "ä"}


def test_new_then_resumed(tmp_path):
    path = tmp_path / "runs" / "a"
    with open_workdir(path, CONFIG, "train") as first:
        assert not first.resumed
        assert first.journal_path == path / "journal.jsonl"
        for folder in (first.rollouts_dir, first.checkpoints_dir, first.task_dir, first.cache_dir):
            assert folder.is_dir()
        assert not first.best_dir.exists()
    assert json.loads((path / "config.json").read_text()) == {"kind": "train", "config": CONFIG}
    before = (path / "config.json").read_bytes()
    with open_workdir(path, CONFIG, "train") as second:
        assert second.resumed
    assert (path / "config.json").read_bytes() == before


def test_every_difference_is_named(tmp_path):
    with open_workdir(tmp_path / "a", CONFIG, "train"):
        pass
    other = {"seed": 1, "lora.alpha": 32.0, "execution.allow_weaker": 0, "name": "ä", "groups": 4}
    with pytest.raises(RunError) as caught, open_workdir(tmp_path / "a", other, "search"):
        pass
    message = str(caught.value)
    for line in (
        r'\bkind\b.*"train".*"search"',
        r"\bseed\b.*\b0\b.*\b1\b",
        r"\btrain\.steps\b.*\b10\b",
        r"\bexecution\.allow_weaker\b.*\bfalse\b.*\b0\b",
        r"\bgroups\b.*\b4\b",
    ):
        assert re.search(line, message), line
    assert "lora.alpha" not in message
    assert "--workdir" in message


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"thesis\.tex"), open_workdir(tmp_path, CONFIG, "train"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_killed_at_the_start_is_usable(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.tmp").write_text("{")
    with open_workdir(tmp_path, CONFIG, "train") as opened:
        assert not opened.resumed


def test_broken_config_file(tmp_path):
    with open_workdir(tmp_path / "a", CONFIG, "train"):
        pass
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json"), open_workdir(tmp_path / "a", CONFIG, "train"):
        pass


def test_path_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(RunError, match=re.escape(str(tmp_path / "a"))), open_workdir(tmp_path / "a", CONFIG, "train"):
        pass


def test_one_process_at_a_time(tmp_path):
    code = """
import json, pathlib, sys
from discover_jax.runs.workdir import open_workdir
with open_workdir(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), "train"):
    print("open", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a"), json.dumps(CONFIG)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        message = rf"\b{holder.pid}\b"
        with pytest.raises(RunError, match=message), open_workdir(tmp_path / "a", CONFIG, "train"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with open_workdir(tmp_path / "a", CONFIG, "train") as opened:  # kill -9 releases the lock
        assert opened.resumed


def test_errors_inside_the_context_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), open_workdir(tmp_path / "a", CONFIG, "train"):
        raise FileNotFoundError("mine")
    with open_workdir(tmp_path / "a", CONFIG, "train"):
        pass
