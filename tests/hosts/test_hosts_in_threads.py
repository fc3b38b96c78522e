"""Several hosts, simulated by threads: distribution of programs, exchange of verdicts, and a run directory that is not shared."""

import concurrent.futures
import dataclasses
import json
import re
import threading
from collections import Counter

import pytest

from discover_jax.exceptions import HostError, SandboxError
from discover_jax.hosts.executions import StepExecutions
from discover_jax.hosts.processes import ALONE, Processes
from discover_jax.runs.outputs import Outputs
from discover_jax.runs.workdir import open_shared_workdir
from discover_jax.types import SEED, Execution, Grade, Outcome, Verdict


class Imitated:
    """An executor that returns a verdict immediately. It depends on the program and the host."""

    def __init__(self, host: int):
        self.host, self.retries, self.ran = host, 0, []

    def submit(self, program, task, parent_output=b"", priority=0):
        future = concurrent.futures.Future()
        cached = (task, program) in self.ran
        self.ran.append((task, program))
        self.retries += 1
        if program == "broken":
            future.set_exception(SandboxError("no sandbox to be had"))
        else:
            execution = Execution(Outcome.OK, b"id,y\n\xff", f"host {self.host} \ud800", "", 0.1 + 0.2, cached)
            future.set_result(Verdict(Outcome.OK, Grade(True, "", len(program) / 3, None), execution))
        return future


@dataclasses.dataclass(frozen=True)
class Imitation(Processes):
    """Processes simulated by threads that meet at a barrier to gather values."""

    values: list = dataclasses.field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, value):
        self.values[self.index] = json.loads(json.dumps(value))
        self.barrier.wait(60)
        told = list(self.values)
        self.barrier.wait(60)  # before any thread's next value
        return told


def _on_all(count, host):
    """The results of `host(processes)` on `count` simulated processes."""
    values, barrier = [None] * count, threading.Barrier(count)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: host(Imitation(index, count, values, barrier)), range(count)))


def _spread(slots_H, programs):
    """The executors, and the verdicts and retries of each host."""
    executors = [Imitated(host) for host in range(len(slots_H))]

    def host(processes):
        step = StepExecutions(executors[processes.index], slots_H, processes)
        for place, (task, program) in programs.items():
            step.submit(place, program, task)
        return step.verdicts(lambda: None), step.retried

    return executors, _on_all(len(slots_H), host)


PROGRAMS = {(group, index): (group % 2, f"program {group} {index % 30}") for group in range(4) for index in range(40)}


def test_programs_are_distributed_by_slots_and_all_hosts_get_all_verdicts():
    executors, told = _spread([2, 6, 4], PROGRAMS)
    distinct = [len(set(executor.ran)) for executor in executors]
    assert distinct == [20, 60, 40]  # of 120 different programs, 2 : 6 : 4
    ran = Counter(program for executor in executors for program in set(executor.ran))
    assert set(ran.values()) == {1}, "a program ran on two hosts"
    verdicts, retried = told[0]
    assert list(verdicts) == list(PROGRAMS)
    assert told[1] == told[2] == told[0]
    assert retried == len(PROGRAMS)
    for place, verdict in verdicts.items():
        assert verdict.grade.score == len(PROGRAMS[place][1]) / 3
        assert verdict.execution.cached == (place[1] >= 30)
        assert verdict.execution.result == b"id,y\n\xff"
        assert verdict.execution.seconds == 0.1 + 0.2


def test_only_the_first_host_uses_the_slots_of_a_cluster():
    executors, told = _spread([6, 0], PROGRAMS)
    assert not executors[1].ran
    assert told[1] == told[0]
    assert list(told[0][0]) == list(PROGRAMS)


def test_programs_that_read_other_values_of_their_parents_are_spread():
    executors = [Imitated(0), Imitated(1)]

    def host(processes):
        step = StepExecutions(executors[processes.index], [1, 1], processes)
        for place, parent_output in enumerate((b"1", b"2", b"1", b"2")):
            step.submit(place, "a program", 0, parent_output)
        return [verdict.execution.stdout[:6] for verdict in step.verdicts(lambda: None).values()]

    assert _on_all(2, host) == [["host 0", "host 1"] * 2] * 2


def test_all_hosts_get_the_values_that_only_the_first_reads(tmp_path):
    Outputs(tmp_path / "0").put(b"\xff value")
    (path,) = (tmp_path / "0").iterdir()
    states = [dataclasses.replace(SEED, output=path.stem), SEED]
    told = _on_all(3, lambda processes: Outputs(tmp_path / str(processes.index)).for_all(processes, states))
    assert told == [{path.stem: b"\xff value"}] * 3


def test_single_host_returns_its_executors_verdicts():
    executor = Imitated(0)
    step = StepExecutions(executor, [2], ALONE)
    step.submit("first", "a program", 0)
    assert (step.here, step.done) == (1, 1)
    assert step.verdicts(lambda: None)["first"].execution.stdout == "host 0 \ud800"
    assert step.retried == 1


def test_outcomes_are_available_as_programs_end():
    futures = {name: concurrent.futures.Future() for name in ("a", "b", "c", "broken", "cancelled")}
    executor = Imitated(0)
    executor.submit = lambda program, task, parent_output, priority: futures[program]
    step = StepExecutions(executor, [2], ALONE)
    for name in futures:
        step.submit(name, name, 0)
    assert step.outcomes == Counter()
    for name, outcome in (("a", Outcome.OK), ("b", Outcome.TIMEOUT), ("c", Outcome.TIMEOUT)):
        futures[name].set_result(Verdict(outcome, Grade(False, "", None, None), Execution(outcome, None, "", "", 1.0)))
    futures["broken"].set_exception(SandboxError("no sandbox to be had"))  # an error of the host, not an outcome
    futures["cancelled"].cancel()
    assert step.outcomes == {Outcome.OK: 1, Outcome.TIMEOUT: 2}


def test_host_failures_are_raised():
    step = StepExecutions(Imitated(0), [1], ALONE)
    step.submit("first", "broken", 0)
    with pytest.raises(SandboxError, match="no sandbox to be had"):
        step.verdicts(lambda: None)


def _opened(folder_of, processes):
    try:
        with open_shared_workdir(folder_of(processes.index), {"seed": 1}, "train", processes) as workdir:
            return workdir
    except HostError as error:
        return str(error)


def test_all_hosts_get_the_same_folder(tmp_path):
    first, second = _on_all(2, lambda processes: _opened(lambda _: tmp_path / "run", processes))
    assert first == second
    assert not first.resumed
    assert first.task_dir.is_dir()
    (first.checkpoints_dir / "0").mkdir()
    assert {workdir.resumed for workdir in _on_all(2, lambda processes: _opened(lambda _: tmp_path / "run", processes))} == {True}


def test_folder_that_is_not_shared_is_refused_by_all(tmp_path):
    (tmp_path / "1").mkdir()
    said = _on_all(3, lambda processes: _opened(lambda index: tmp_path / str(min(index, 1)), processes))
    assert len(set(said[1:])) == 1
    for text in said:
        assert re.search(rf"{tmp_path}\S* is missing or a different one for process 1 on \S+, process 2 on \S+\.", text)
        assert "shared file system" in text
