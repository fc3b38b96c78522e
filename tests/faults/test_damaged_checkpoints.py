"""Damaged checkpoints: the run resumes from the one before, keeps the damaged one, and says so."""

import itertools
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import contents, flip, largest

from discover_jax.exceptions import RunError
from discover_jax.learning.train_state import TrainState, adam, init_train_state
from discover_jax.runs.checkpoints import Checkpoints


def state_of(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    lora = {
        "A": jax.device_put(rng.normal(size=(50, 40)).astype(np.float32)),
        "B": [jax.device_put(rng.normal(size=300).astype(jnp.bfloat16))],
    }
    return init_train_state(lora, adam())


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    writer = Checkpoints(folder, keep=2, every=0)
    for step in (1, 2):
        writer.save(step, state_of(step), {"step": step, "text": "y" * 100})
    writer.close()
    return folder


def resumed(folder: Path) -> tuple[int, str]:
    """Resumes and checks the state against the step's. Returns the step and the notes."""
    notes: list[str] = []
    checkpoints = Checkpoints(folder, keep=2, every=0)
    found = checkpoints.resume(state_of(0), notes.append)
    assert found is not None
    step, state, host = found
    assert host == {"step": step, "text": "y" * 100}
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert checkpoints.latest() == step
    checkpoints.close()
    return step, "\n".join(notes)


def test_every_file_of_a_checkpoint_torn_flipped_or_gone(two_checkpoints, tmp_path):
    """Either everything is restored as it was saved, or the run resumes from the checkpoint before and the damaged one is set aside."""
    rng = random.Random(0)
    damages = {
        "deleted": lambda path: path.unlink(),
        "emptied": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[: int(rng.uniform(0.1, 0.9) * path.stat().st_size)]),
        "flipped": lambda path: flip(path, rng.random()),
        "replaced": lambda path: path.write_bytes(rng.randbytes(200)),
    }
    names = sorted(path.relative_to(two_checkpoints) for path in (two_checkpoints / "2").rglob("*") if path.is_file())
    assert len(names) > 10
    turn = itertools.cycle(damages)
    noticed = set()
    for number, (name, damage) in enumerate((name, next(turn)) for name in names for _ in range(2)):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(two_checkpoints, folder)
        damages[damage](folder / name)
        damaged = contents(folder / "2")
        step, notes = resumed(folder)
        if step == 2:
            assert not notes
            continue
        noticed.add(name)
        place = folder.with_name("checkpoints.damaged") / "2-1"
        assert re.search(rf"(?s)Checkpoint 2 is damaged: .*\bfrom checkpoint 1\b.*\bmoved to {place}", notes)
        assert contents(place) == damaged
    needed = {Path("2/host/metadata"), Path("2/train_state/_METADATA"), Path("2/train_state/manifest.ocdbt")}
    assert noticed >= needed
    assert len(noticed) > len(needed)


def test_flipped_bit_is_reported_with_the_name_of_the_array(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    flip(largest(tmp_path / "c" / "2"))
    step, notes = resumed(tmp_path / "c")
    assert step == 1
    assert "checksum mismatch in 1 arrays: lora/A." in notes


@pytest.mark.parametrize("part", ["", "host", "train_state"])
def test_missing_checkpoint_folders(two_checkpoints, tmp_path, part):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "2" / part)
    if not part:
        (tmp_path / "c" / "2").mkdir()
    step, notes = resumed(tmp_path / "c")
    assert step == 1
    assert "Checkpoint 2 is damaged" in notes


@pytest.mark.parametrize("text", ["[]", '{"item_handlers": 3}', '{"commit_timestamp_nsecs": 1%s}' % ("0" * 40), "\0"])
def test_damaged_orbax_metadata_does_not_prevent_resuming(two_checkpoints, tmp_path, monkeypatch, text):
    """This project does not use it, for example the time of writing. Also tests users without a name, as in containers."""

    def nobody(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    shutil.copytree(two_checkpoints, tmp_path / "c")
    for step in "12":
        (tmp_path / "c" / step / "_CHECKPOINT_METADATA").write_text(text)
    step, notes = resumed(tmp_path / "c")
    assert step == 2
    assert not notes
    flip(largest(tmp_path / "c" / "2"))
    step, notes = resumed(tmp_path / "c")
    assert step == 1
    assert "Checkpoint 2 is damaged" in notes


def test_damaged_checkpoints_of_one_step_are_all_kept(two_checkpoints, tmp_path):
    for number in (1, 2):
        shutil.copytree(two_checkpoints, tmp_path / "c", dirs_exist_ok=True)
        flip(tmp_path / "c" / "2" / "host" / "metadata")
        assert resumed(tmp_path / "c")[0] == 1
        assert sorted(path.name for path in (tmp_path / "c.damaged").iterdir()) == [f"2-{n}" for n in range(1, number + 1)]


def test_no_valid_checkpoint_is_an_error_and_deletes_nothing(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    flip(largest(tmp_path / "c" / "1"))
    (tmp_path / "c" / "2" / "host" / "metadata").unlink()
    before = contents(tmp_path)
    checkpoints = Checkpoints(tmp_path / "c", keep=2, every=0)
    with pytest.raises(RunError, match=r"(?s)Cannot restore any checkpoint.*checkpoint 2: .*checkpoint 1: .*\blora/A\b.*copy"):
        checkpoints.resume(state_of(0), pytest.fail)
    checkpoints.close()
    assert contents(tmp_path) == before
