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
    (path / "checkpoints" / "0").mkdir()
    with open_workdir(path, CONFIG, "train") as second:
        assert second.resumed
    assert (path / "config.json").read_bytes() == before


def test_every_difference_is_named(tmp_path):
    with open_workdir(tmp_path / "a", CONFIG, "train") as opened:
        opened.journal_path.write_text("{}\n")
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
    assert f"config.train.resume_from = '{tmp_path / 'a'}'" in message


_STARTED = ("task/public/train.csv", "task/prepared.json", "retests/x/prepared.json", "seed_programs.json", "tensorboard/e", "report.html")


def _write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x\n")


@pytest.mark.parametrize("setting", ["train.steps", "name", "lora.alpha"])
def test_a_corrected_setting_begins_a_run_without_steps_anew(tmp_path, setting):
    """The start before ended because of an error, such as a wrong path. Nothing that it prepared may stay."""
    with open_workdir(tmp_path, CONFIG, "train"):
        _write(tmp_path, *_STARTED, "cache/ab", "disclosure.json", "wandb_id")
    told = []
    with open_workdir(tmp_path, CONFIG | {setting: "other"}, "search", told.append) as opened:
        assert not opened.resumed
        assert not any((tmp_path / name).exists() for name in (*_STARTED, "wandb_id"))
        assert opened.task_dir.is_dir()
        assert (tmp_path / "cache/ab").exists()
        assert (tmp_path / "disclosure.json").exists(), "programs of the cache may have run with weaker isolation"
    assert json.loads((tmp_path / "config.json").read_text()) == {"kind": "search", "config": CONFIG | {setting: "other"}}
    assert len(told) == 1
    assert re.search(rf"\b{re.escape(setting)}\b.*\bother\b", told[0])


def test_corrected_data_begin_a_run_without_steps_anew(tmp_path):
    with open_workdir(tmp_path, CONFIG, "train"):
        _write(tmp_path, *_STARTED, "wandb_id")
    told = []
    with open_workdir(tmp_path, CONFIG, "train", told.append):
        assert not any((tmp_path / name).exists() for name in _STARTED)
        assert (tmp_path / "wandb_id").exists()
    assert told == []


@pytest.mark.parametrize(
    "kept",
    [
        *("journal.jsonl", "journal.discarded.jsonl", "metrics.jsonl", "checkpoints/0/host", "checkpoints.damaged/0"),
        *("rollouts/step-000000.parquet", "best/solution.py"),
    ],
)
def test_anything_of_a_step_keeps_the_config(tmp_path, kept):
    with open_workdir(tmp_path, CONFIG, "train"):
        _write(tmp_path, *_STARTED, kept)
    with pytest.raises(RunError, match=r"\bseed\b"), open_workdir(tmp_path, CONFIG | {"seed": 1}, "train"):
        pass
    with open_workdir(tmp_path, CONFIG, "train") as opened:
        assert opened.resumed
    assert all((tmp_path / name).exists() for name in (*_STARTED, kept))


@pytest.mark.parametrize("source", ["x\n", "x\nof a later step\n"])
def test_what_a_continued_run_copies_is_not_a_step(tmp_path, source):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/journal.jsonl").write_text(source)
    continued, run = CONFIG | {"train.resume_from": str(tmp_path / "earlier")}, tmp_path / "run"
    with open_workdir(run, continued, "train"):
        _write(run, "journal.jsonl", "best/solution.py")
    with open_workdir(run, CONFIG, "train") as opened:
        assert not opened.resumed
    assert not (run / "journal.jsonl").exists()
    assert not (run / "best").exists()
    assert (tmp_path / "earlier/journal.jsonl").read_text() == source


@pytest.mark.parametrize("source", ["", "y\n", None])
def test_attempts_that_the_continued_run_does_not_have_are_kept(tmp_path, source):
    """A kill in the first step, a user who keeps only the results of an old run, or an earlier run that was moved."""
    (tmp_path / "earlier").mkdir()
    if source is not None:
        (tmp_path / "earlier/journal.jsonl").write_text(source)
    continued, run = CONFIG | {"train.resume_from": str(tmp_path / "earlier")}, tmp_path / "run"
    with open_workdir(run, continued, "train"):
        _write(run, "journal.jsonl", "best/solution.py")
    with pytest.raises(RunError, match=r"\bresume_from\b"), open_workdir(run, CONFIG, "train"):
        pass
    with open_workdir(run, continued, "train") as opened:
        assert opened.resumed
    assert (run / "journal.jsonl").read_text() == "x\n"
    assert (run / "best/solution.py").exists()


@pytest.mark.parametrize("name", ["journal.jsonl", "metrics.jsonl", "best", "rollouts", "checkpoints"])
def test_a_link_to_a_missing_disk_may_hold_steps(tmp_path, name):
    """Its folder or file would be replaced, and the run would start again from nothing."""
    with open_workdir(tmp_path, CONFIG, "train"):
        _write(tmp_path, "task/prepared.json")
    if (tmp_path / name).is_dir():
        (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "unmounted" / name)
    with pytest.raises(RunError, match=rf"\bseed\b|{name}"), open_workdir(tmp_path, CONFIG | {"seed": 1}, "train"):
        pass
    assert (tmp_path / name).is_symlink()
    assert (tmp_path / "task/prepared.json").exists()


def test_a_link_to_an_empty_folder_of_steps_stays(tmp_path):
    """A user may put rollouts and checkpoints on another disk after a start that failed."""
    (tmp_path / "disk").mkdir()
    run = tmp_path / "run"
    with open_workdir(run, CONFIG, "train"):
        pass
    for name in ("rollouts", "checkpoints"):
        (run / name).rmdir()
        (run / name).symlink_to(tmp_path / "disk")
    with open_workdir(run, CONFIG, "train") as opened:
        assert opened.rollouts_dir.is_symlink()
        assert opened.checkpoints_dir.is_symlink()


def test_links_are_removed_without_what_they_point_to(tmp_path):
    _write(tmp_path, "elsewhere/task/a")
    run = tmp_path / "run"
    run.mkdir()
    with open_workdir(run, CONFIG, "train"):
        (run / "task").rmdir()
        (run / "task").symlink_to(tmp_path / "elsewhere/task")
    with open_workdir(run, CONFIG | {"seed": 1}, "train"):
        pass
    assert (tmp_path / "elsewhere/task/a").exists()


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
    with open_workdir(tmp_path / "a", CONFIG, "train"):  # kill -9 releases the lock
        pass


def test_errors_inside_the_context_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), open_workdir(tmp_path / "a", CONFIG, "train"):
        raise FileNotFoundError("mine")
    with open_workdir(tmp_path / "a", CONFIG, "train"):
        pass
