"""The update in waves: its result does not depend on the order and time in which programs end, nor on the number of processes."""

import concurrent.futures
import dataclasses
import json
import random
import sys
import threading
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("learning")))

import jax
import numpy as np
import pytest
from bigram import Bigram, make_rollouts

from discover_jax import stages
from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.config import default_config
from discover_jax.hosts.executions import StepExecutions
from discover_jax.hosts.processes import ALONE, Processes
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.learning.update import Update
from discover_jax.policy import Policy
from discover_jax.runs.recorder import NullRecorder
from discover_jax.text.reply import Extracted
from discover_jax.types import SEED, Execution, Grade, Outcome, RunKind, Verdict
from discover_jax.waves import add_wave, begin_update, finish_update

GROUPS, GROUP_SIZE = 5, 3
UPDATE = Update(Bigram(), adam(1e-2), reduction="token_mean", kl_coefficient=0.1)


class Recorder(NullRecorder):
    """Notes the phases of the step."""

    def __init__(self):
        self.phases = []

    def phase(self, name, detail=""):
        self.phases.append(name)


class Programs:
    """An executor whose programs end in an order of its own, a few milliseconds apart. The score of a program depends on its text."""

    def __init__(self, seed=None):
        self.retries, self.priorities, self.futures = 0, {}, {}
        self._order = random.Random(seed)
        self._seed = seed

    def submit(self, program, task, parent_output=b"", priority=0):
        self.priorities[program] = priority
        self.futures[program] = future = concurrent.futures.Future()
        return future

    def end_all(self):
        """Ends the programs in the background."""
        programs = list(self.futures)
        if self._seed is not None:
            self._order.shuffle(programs)

        def end():
            for program in programs:
                time.sleep(self._order.uniform(0, 0.02) if self._seed is not None else 0)
                group, score = program.split()
                outcome = Outcome.OK if float(score) else Outcome.TIMEOUT
                score = 1.0 if group == "1" else float(score)  # group 1 has no signal
                grade = Grade(outcome is Outcome.OK, "", score if outcome is Outcome.OK else None, None)
                self.futures[program].set_result(Verdict(outcome, grade, Execution(outcome, None, "", "", 1.0)))

        threading.Thread(target=end).start()


@dataclasses.dataclass(frozen=True)
class Imitation(Processes):
    """Processes simulated by threads that meet at a barrier to gather values."""

    values: list = dataclasses.field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, value):
        assert self.barrier is not None
        self.values[self.index] = json.loads(json.dumps(value))
        self.barrier.wait(60)
        told = list(self.values)
        self.barrier.wait(60)
        return told


def learn(waves, programs, *, substeps=1, processes=ALONE):
    """One step: the adapter and its optimiser state as bytes, all advantages, metrics, the journal, and the phases."""
    config = default_config()
    config.groups, config.group_size = GROUPS, GROUP_SIZE
    config.train.update({"waves": waves, "num_substeps": substeps, "advantage": "mean_baseline", "row_tokens": 24, "row_lengths": 3})
    task = types.SimpleNamespace(id="boats", failure_reward=0.0, reward=float, signals=list, calls=False, reuse_output=False)
    recorder = Recorder()
    run = types.SimpleNamespace(config=config, kind=RunKind.TRAIN, processes=processes, recorder=recorder, updater=UPDATE, last_step=10)
    table = jax.device_put(np.random.default_rng(5).normal(size=(7, 7)).astype(np.float32))
    policy = Policy(None, table, None, init_train_state({"table": 0.3 * table}, adam(1e-2)))  # pyright: ignore
    made, _ = make_rollouts(1, GROUPS * GROUP_SIZE)
    sampled = stages.Sampled(len(made), StepExecutions(programs, [2] * processes.count, processes), 7)
    groups = [stages.Group(task, SEED, ()) for _ in range(GROUPS)]  # pyright: ignore[reportArgumentType]
    wave_of = {group: number for number, wave in enumerate(stages.waves(run, GROUPS)) for group in wave}  # pyright: ignore
    for number in random.Random(3).sample(range(len(made)), len(made)):  # the order in which rollouts end
        group, index = divmod(number, GROUP_SIZE)
        sampled.rollouts[group, index] = dataclasses.replace(made[number], group=group, index=index)
        code = f"{group} {number % 4 / 4 + number / 1000 if number % 4 else 0.0}"
        sampled.programs[group, index] = Extracted(code)
        sampled.executions.submit((group, index), code, 0, priority=wave_of[group])
    programs.end_all()
    update = begin_update(run, policy, sampled.rollouts)  # pyright: ignore[reportArgumentType]
    frontiers = {"boats": Frontier(Archive((), 10))}
    graded, estimates = [], []
    for wave in stages.waves(run, GROUPS):  # pyright: ignore[reportArgumentType]
        graded.append(stages.grade(run, groups, sampled, 0, wave))  # pyright: ignore[reportArgumentType]
        estimates.append(stages.estimate(run, groups, graded[-1].attempts, frontiers, 0, wave))  # pyright: ignore[reportArgumentType]
        add_wave(run, update, sampled.rollouts, estimates[-1].advantages)  # pyright: ignore[reportArgumentType]
    whole, joined = stages.Graded.joined(graded), stages.join_estimates(run, estimates)  # pyright: ignore[reportArgumentType]
    policy, metrics = finish_update(run, policy, update, sampled.rollouts)  # pyright: ignore[reportArgumentType]
    assert policy.train_state is not None
    state = [np.asarray(leaf).tobytes() for leaf in (policy.lora["table"], policy.train_state.opt_state[0].mu["table"])]
    return state, joined.advantages, metrics | joined.metrics, whole.attempts, recorder.phases, sampled.executions


def test_result_does_not_depend_on_when_programs_end():
    expected = learn(3, Programs())
    for seed in range(4):
        found = learn(3, Programs(seed))
        assert found[:5] == expected[:5]


def test_several_processes_have_the_result_of_one():
    expected = learn(3, Programs())
    values, barrier = [None, None], threading.Barrier(2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        each = [pool.submit(learn, 3, Programs(index), processes=Imitation(index, 2, values, barrier)) for index in range(2)]
        found = [one.result() for one in each]
    assert [one[:4] for one in found] == [expected[:4]] * 2
    assert found[0][5].tail_seconds == found[1][5].tail_seconds > 0


def test_groups_and_journal_are_those_of_one_wave_and_the_adapter_up_to_rounding():
    one, three = learn(1, Programs()), learn(3, Programs())
    assert three[1] == one[1]
    assert three[3] == one[3]
    assert {attempt.adapter_step for attempt in three[3]} == {7}
    np.testing.assert_allclose(*(np.frombuffer(found[0][0], np.float32) for found in (one, three)), rtol=0.01, atol=2e-4)
    same = [name for name in one[2] if name not in ("update/filled_frac", "kl_base/mean", "loss", "grad_norm")]  # the KL's mean differs
    assert {name: three[2][name] for name in same} == pytest.approx({name: one[2][name] for name in same}, rel=1e-5)
    assert one[4] == ["running programs", "learning"]
    assert three[4] == ["learning", "running programs", "learning", "running programs", "learning", "running programs", "learning"]


def test_programs_of_earlier_waves_start_first_and_waits_are_measured():
    programs = Programs(1)
    executions = learn(3, programs)[5]
    assert {
        priority: {int(program[0]) for program in programs.priorities if programs.priorities[program] == priority} for priority in range(3)
    } == {
        0: {0, 1},
        1: {2, 3},
        2: {4},
    }
    assert len(executions.waits) == 3
    assert executions.tail_seconds > 0
    assert stages._waits(executions) == {"time/execute_first_s": executions.waits[0], "time/programs_s": executions.tail_seconds}
    assert stages._waits(learn(1, Programs())[5]) == {}


def test_optimiser_steps_do_not_change_what_later_waves_record():
    """The first optimiser step frees the adapter that later waves were sampled with."""
    found = learn(4, Programs(2), substeps=2)
    assert found[:5] == learn(4, Programs(3), substeps=2)[:5]
    assert {attempt.adapter_step for attempt in found[3]} == {7}
    assert found[2]["update/skipped"] == 0


@pytest.mark.parametrize(("groups", "count", "sizes"), [(16, 4, [4, 4, 4, 4]), (5, 3, [2, 2, 1]), (7, 1, [7]), (3, 3, [1, 1, 1])])
def test_waves_are_the_groups_in_order(groups, count, sizes):
    config = default_config()
    config.train.waves = count
    found = stages.waves(types.SimpleNamespace(config=config, kind=RunKind.TRAIN), groups)  # pyright: ignore[reportArgumentType]
    assert [list(wave) for wave in found] == [list(part) for part in np.array_split(np.arange(groups), count)]
    assert [len(wave) for wave in found] == sizes
    assert len(stages.waves(types.SimpleNamespace(config=config, kind=RunKind.SEARCH), groups)) == 1  # pyright: ignore
