"""A run with the reward `holdout` cannot continue one that was rewarded by private answers: nothing of that run enters its directory."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from phrase_config import get_config
from tiny_run import unbroken

from discover_jax import config as settings
from discover_jax import main, preparation
from discover_jax.exceptions import CapacityError, RunError
from discover_jax.execution import sandbox_spec
from discover_jax.runs.console import QuietConsole


@pytest.fixture(scope="module")
def graded(root) -> Path:
    """A run whose rewards, archive and best program come from the private answers."""
    return unbroken(root)


def start(root: Path, workdir: Path, source: Path, **task) -> None:
    config = get_config(str(root / "model"))
    config.train.resume_from = str(source)
    for name, value in task.items():
        config.task[name] = value
    main.run(settings.validate(config), workdir, console=QuietConsole())


@pytest.mark.parametrize("folds", [1, 2])
def test_holdout_cannot_continue_from_private_scores(root, graded, tmp_path, monkeypatch, folds):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    monkeypatch.setattr(preparation, "load_policy", lambda *_: pytest.fail("weights were loaded before the run was refused"))
    with pytest.raises(RunError, match=r"remainders\b.*config\.task\.reward\b.*'grade'.*'holdout'(?s:.)*config\.train\.resume_from\b"):
        start(root, tmp_path / "run", graded, reward="holdout", holdout_folds=folds)
    # The folder has the prepared task and the config, but no program, score or adapter of the other run.
    found = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert found == {"config.json", ".lock", "task"}


def test_source_with_an_altered_checkpoint_is_refused(root, graded, tmp_path, monkeypatch):
    """The checksum of the checkpoint covers its record of the reward's rows."""
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    source = Path(shutil.copytree(graded, tmp_path / "source"))
    for path in (source / "checkpoints").glob("*/host/metadata"):
        content = json.loads(path.read_text())
        content["host"]["rewards"] = []
        path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="checksum"):
        start(root, tmp_path / "run", source, reward="holdout")


def test_a_prompt_that_is_too_long_is_refused_before_weights_are_loaded(root, graded, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    monkeypatch.setattr(preparation, "load_policy", lambda *_: pytest.fail("weights were loaded before the prompt was checked"))
    config = get_config(str(root / "model"))
    config.sampling.max_prompt_tokens = 2
    with pytest.raises(CapacityError, match=r"config\.sampling\.max_prompt_tokens allows 2\b"):
        main.run(settings.validate(config), tmp_path / "run", console=QuietConsole())
