"""The order of the loop's stages around a checkpoint that is written in the background, and what happens to it when the loop ends early."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax import main, stages
from discover_jax.config import default_config
from discover_jax.exceptions import LearningError, RunError
from discover_jax.hosts.processes import ALONE
from discover_jax.learning.train_state import TrainState, adam, init_train_state
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.recorder import NullRecorder
from discover_jax.types import RunKind

STEPS = 3


class Loop(NullRecorder):
    """A run of `main.discover` whose stages only note that they were called. Checkpoints are real, but each waits for `go`.

    Attributes:
      events: what happened, in order.
      journal: the last step in the journal; no checkpoint may be more than one step behind.
    """

    def __init__(self, monkeypatch, folder, fail_in: str = "", error: BaseException | None = None):
        self.events: list[str] = []
        self.notes: list[str] = []
        self.journal = -1
        self.go = threading.Event()
        self.fail_in, self.error = fail_in, error
        self.checkpoints = Checkpoints(folder, keep=2, every=0)
        self._save = self.checkpoints._manager.save
        monkeypatch.setattr(self.checkpoints._manager, "save", self._write)
        config = default_config()
        self.run = types.SimpleNamespace(config=config, kind=RunKind.TRAIN, checkpoints=self.checkpoints, recorder=self)
        self.run.first_step, self.run.last_step = 0, STEPS
        graded = types.SimpleNamespace(attempts=[], verdicts={})
        estimates = types.SimpleNamespace(advantages={}, metrics={})
        monkeypatch.setattr(main.Graded, "joined", lambda graded: graded[0])
        sampled = types.SimpleNamespace(rollouts={})
        fakes = {
            "select_parents": lambda *_: [],
            "write_prompts": lambda *_: [],
            "sample_and_submit": lambda *_: self._stage("sample") or sampled,
            "grade": lambda *_: self._stage("grade") or graded,
            "estimate": lambda *_: estimates,
            "join_estimates": lambda *_: estimates,
            "begin_update": lambda *_: None,
            "add_wave": lambda *_: None,
            "finish_update": self._update,
            "archive_attempts": lambda *_: {},
            "stage_metrics": lambda *_: {},
            "choose_best": lambda *_: {},
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(main, name, fake)

    def discover(self):
        self.step = -1
        policy = types.SimpleNamespace(train_state=init_train_state({"A": jnp.zeros((4, 2))}, adam()))
        main.discover(self.run, policy, {})  # pyright: ignore[reportArgumentType]

    def _stage(self, name: str) -> None:
        if name == "sample":
            self.step += 1
            assert self.checkpoints.writing == (self.step - 1 if self.step else None)
            assert self.checkpoints.latest() == (self.step - 2 if self.step > 1 else None)  # the last one waits
        self.events.append(f"{name} {self.step}")
        if self.fail_in == f"{name} {self.step}":
            assert self.error is not None
            threading.Timer(0.1, self.go.set).start()
            raise self.error
        if name == "sample":
            threading.Timer(0.05, self.go.set).start()

    def _write(self, step, **options):
        assert self.go.wait(60)
        self.go.clear()
        self._save(step, **options)
        self.events.append(f"checkpoint {step}")

    def _update(self, run, policy, *_):
        self.events.append(f"update {self.step}")
        before: TrainState = policy.train_state
        values = jax.tree.map(lambda leaf: np.array(leaf) + 1, before)
        for leaf in jax.tree.leaves(before):  # the update donates them
            leaf.delete()
        return types.SimpleNamespace(train_state=jax.tree.map(jnp.asarray, values)), {}

    def record(self, record) -> None:
        assert self.checkpoints.latest() == (record.step - 1 if record.step else None), "journal and checkpoints are two steps apart"
        self.events.append(f"record {record.step}")
        assert (record.metrics["time/checkpoint_write_s"] is None) == (record.step == 0)

    def host_state(self, frontiers):
        return {"step": self.step}

    def phase(self, name, detail="") -> None:
        if name == "waiting for the checkpoint" and self.step == STEPS - 1 and self.events[-1] == f"record {self.step}":
            self.go.set()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        self.events.append("finish")


def test_each_checkpoint_is_complete_before_the_next_update(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path)
    loop.discover()
    expected = ["sample 0", "grade 0", "update 0", "record 0"]
    for step in (1, 2):
        expected += [f"sample {step}", f"checkpoint {step - 1}", f"grade {step}", f"update {step}", f"record {step}"]
    assert loop.events == [*expected, "checkpoint 2", "finish"]
    restored, host = loop.checkpoints.restore(2, init_train_state({"A": jnp.zeros((4, 2))}, adam()))
    assert host == {"step": 2}
    assert restored is not None
    np.testing.assert_array_equal(restored.lora["A"], np.full((4, 2), 3.0))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LearningError("not finite"), RunError("standard output was closed")])
def test_a_run_that_ends_early_finishes_its_checkpoint(monkeypatch, tmp_path, error):
    loop = Loop(monkeypatch, tmp_path, "sample 1", error)
    with pytest.raises(type(error)) as raised:
        loop.discover()
    assert raised.value is error
    assert loop.events[-1] == "checkpoint 0"
    assert Checkpoints(tmp_path, keep=2, every=0).latest() == 0
    assert any("finishing the checkpoint of step 1" in note for note in loop.notes)


def test_another_error_of_the_checkpoint_is_logged_and_does_not_hide_the_first(monkeypatch, tmp_path, caplog):
    loop = Loop(monkeypatch, tmp_path, "sample 1", LearningError("not finite"))
    loop._save = lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is gone"))
    monkeypatch.setattr(main.logging, "error", lambda text, *arguments: loop.events.append(text % arguments))
    with pytest.raises(LearningError, match="not finite"):
        loop.discover()
    assert "Cannot write checkpoint 0" in loop.events[-1]
    assert "the disk is gone" in loop.events[-1]


def test_checkpoint_is_finished_although_nothing_can_be_shown(monkeypatch, tmp_path):
    """As when the reader of standard output is gone: the note fails as well."""
    error = RunError("standard output was closed")
    loop = Loop(monkeypatch, tmp_path, "sample 1", error)
    monkeypatch.setattr(loop, "note", lambda _: (_ for _ in ()).throw(RunError("closed")))
    with pytest.raises(RunError) as raised:
        loop.discover()
    assert raised.value is error
    assert loop.events[-1] == "checkpoint 0"


@pytest.mark.parametrize("second", [KeyboardInterrupt(), MemoryError(), jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_LAUNCH_FAILED")])
def test_whatever_ends_the_last_checkpoint_does_not_hide_the_first_error(monkeypatch, tmp_path, second):
    loop = Loop(monkeypatch, tmp_path, "sample 1", LearningError("not finite"))
    monkeypatch.setattr(loop.checkpoints, "finish", lambda: (_ for _ in ()).throw(second) if loop.step else None)
    with pytest.raises(LearningError, match="not finite"):
        loop.discover()


def test_failed_checkpoint_ends_the_sampling_of_the_next_step(tmp_path):
    """A step may sample for an hour; nothing of it could be kept."""
    checkpoints = Checkpoints(tmp_path, keep=1, every=0)
    checkpoints._manager.save = lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is gone"))  # pyright: ignore
    checkpoints.begin(0, None, {})
    assert checkpoints._writing is not None
    assert checkpoints._writing.work._ended.wait(60)

    def sample(*_, on_progress, **__):
        on_progress(None)
        yield pytest.fail("it went on")

    sampler = types.SimpleNamespace(sample=sample)
    parts = {"sampler": sampler, "executor": types.SimpleNamespace(retries=0), "slots_H": [1], "processes": ALONE}
    parts |= {"kind": RunKind.TRAIN, "recorder": NullRecorder(), "checkpoints": checkpoints}
    run = types.SimpleNamespace(config=default_config(), **parts)
    policy = types.SimpleNamespace(frozen=None, lora=None, optimizer_steps=0)
    with pytest.raises(RunError, match=r"(?s)Cannot write checkpoint 0.*the disk is gone"):
        stages.sample_and_submit(run, policy, [], [], 1)  # pyright: ignore


def test_failed_checkpoint_ends_the_run_before_the_next_update(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path)
    loop._save = lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is gone"))
    with pytest.raises(RunError, match=r"(?s)Cannot write checkpoint 0.*the disk is gone.*resumes at the beginning"):
        loop.discover()
    assert loop.events[-1] == "sample 1"


@pytest.mark.parametrize(
    ("first", "steps", "every", "chosen_at"),
    [
        (0, 6, 2, [2, 4, 6]),
        (1, 6, 2, [2, 4, 6]),
        (2, 6, 2, [2, 4, 6]),  # killed after step 2, before or within its choice
        (4, 6, 2, [4, 6]),
        (6, 6, 2, [6]),
        (4, 2, 2, [6]),  # continues another run from its fourth step: nothing of its own to choose yet
        (4, 6, 0, [6]),
    ],
)
def test_a_resumed_run_makes_the_choice_that_a_kill_prevented(monkeypatch, first, steps, every, chosen_at):
    done, chosen = [first], []
    recorder = NullRecorder()
    recorder.choose = chosen.append
    config = default_config()
    config.train.steps, config.finalists.every = steps, every
    run = types.SimpleNamespace(config=config, recorder=recorder, first_step=first, last_step=6)
    nothing = types.SimpleNamespace(rollouts={}, attempts=[], verdicts={}, advantages={}, metrics={})
    names = ("select_parents", "write_prompts", "waves")
    fakes = {name: lambda *_: [] for name in names} | {
        "sample_and_submit": lambda *_: nothing,
        "finish_checkpoint": lambda *_: {},
        "begin_update": lambda *_: None,
        "join_estimates": lambda *_: nothing,
        "finish_update": lambda *_: (None, {}),
        "archive_attempts": lambda *_: {},
        "stage_metrics": lambda *_: {},
        "begin_checkpoint": lambda *arguments: done.append(arguments[-1] + 1),
        "choose_best": lambda *_: done[-1],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(main, name, fake)
    main._run_steps(run, None, {})  # pyright: ignore[reportArgumentType]
    assert chosen == chosen_at
