"""A program that does not die when it is killed: its verdict stands, and its slot waits. It is imitated by signals that are not sent."""

import contextlib
import ctypes
import dataclasses
import logging
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_competition import LIMITS

from discover_jax.exceptions import SandboxError
from discover_jax.execution import memory, quarantine, sandbox, sandbox_process, values, worker
from discover_jax.execution.backend import End, Execute, Load, ShownTask
from discover_jax.execution.children import Children
from discover_jax.execution.local import LocalSlot, lent
from discover_jax.execution.quarantine import Survivor, survivor
from discover_jax.types import Answer, Execution, Outcome

TIMEOUT = Execution(Outcome.TIMEOUT, None, "", "it did not end within 1 s", 1.0)


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


def test_survivor_ends_with_its_process_and_is_not_taken_for_another(process):
    found = survivor(process.pid)
    assert found is not None
    assert found.alive()
    assert not Survivor(process.pid, found.started + 1).alive()  # a later process with this pid
    process.kill()
    deadline = time.monotonic() + 10
    while found.alive():  # a zombie has ended
        assert time.monotonic() < deadline
    process.wait()
    assert survivor(process.pid) is None


def test_process_names_that_are_no_text_are_read():
    """A program chooses the names of its processes. An error here would end the worker, and after three tries the run."""
    name = b") R \xff\xfe(\n"
    libc = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(16)
    libc.prctl(16, before)
    libc.prctl(15, name)
    try:
        assert Path(f"/proc/{os.getpid()}/stat").read_bytes().startswith(b"%d (" % os.getpid() + name)
        found = survivor(os.getpid())
        assert found is not None
        assert found.alive()
        assert memory.tree_cpu_seconds(os.getpid()) > 0
    finally:
        libc.prctl(15, before)


def test_waiting_is_logged_and_can_be_given_up(process, caplog):
    found = survivor(process.pid)
    looks = iter([False, False, True])
    with caplog.at_level(logging.WARNING):
        quarantine.wait_until_gone(found, lambda: next(looks))
    assert [str(process.pid) in record.getMessage() for record in caplog.records] == [True]
    quarantine.wait_until_gone(None, lambda: False)


class _Worker:
    """A `ChildSlot` with these replies."""

    def __init__(self, *replies: worker.Reply) -> None:
        self.replies, self.asked, self.dropped = list(replies), [], 0

    def ask(self, request, seconds):
        self.asked.append(request)
        return self.replies.pop(0)

    def drop(self):
        self.dropped += 1


def test_verdict_stands_and_the_slot_is_lent_again_only_after_the_process_has_ended(process):
    children = Children()
    slow, other = (LocalSlot(_Worker(worker.Reply(TIMEOUT, left)), 9.0, None, children) for left in (survivor(process.pid), None))  # type: ignore
    free: queue.SimpleQueue[LocalSlot] = queue.SimpleQueue()
    free.put(slow)
    with lent(free) as slot:
        assert slot.ask(Execute(0, 0, "")) is TIMEOUT
        assert slot.quarantined
    free.put(other)
    for _ in range(2):  # nobody waits for the slow slot while another one is free
        with lent(free) as slot:
            assert slot is other
    time.sleep(0.3)
    assert free.qsize() == 1
    process.kill()
    assert free.get(timeout=10) is other
    assert free.get(timeout=10) is slow


def test_slot_in_quarantine_does_not_hold_up_the_end(process):
    children = Children()
    slot = LocalSlot(_Worker(worker.Reply(TIMEOUT, survivor(process.pid))), 9.0, None, children)  # type: ignore
    free: queue.SimpleQueue[LocalSlot] = queue.SimpleQueue()
    free.put(slot)
    with lent(free):
        slot.ask(Execute(0, 0, ""))
    children.close()
    assert free.get(timeout=10) is slot


def test_next_run_of_a_program_waits_and_calls_do_not(process):
    """Each run of a program (`Execute`) has a sandbox of its own in the same slot."""
    child = _Worker(worker.Reply(TIMEOUT, survivor(process.pid)), worker.Reply("", None), worker.Reply(TIMEOUT, None))
    slot = LocalSlot(child, 9.0, None, Children())  # type: ignore
    slot.ask(Execute(0, 0, ""))
    slot.ask(End())
    assert not slot.quarantined
    slot._survivor = survivor(process.pid)
    thread = threading.Thread(target=slot.ask, args=(Execute(0, 1, ""),))
    thread.start()
    time.sleep(0.3)
    assert len(child.asked) == 2
    process.kill()
    thread.join(10)
    assert len(child.asked) == 3


def test_failure_of_the_host_replaces_the_worker(process):
    child = _Worker(worker.Reply(SandboxError("no memory"), None))
    with pytest.raises(SandboxError, match="no memory"):
        LocalSlot(child, 9.0, None, Children()).ask(Execute(0, 0, ""))  # type: ignore
    assert child.dropped == 1


class _Box:
    """A sandbox whose process does not end before `dies` is set."""

    made: ClassVar[list["_Box"]] = []

    def __init__(self, spec):
        self.dies, self.survivor, self.closed = False, None, 0
        self.made.append(self)

    def wait_ready(self):
        pass

    def run(self, program):
        return TIMEOUT

    def load(self, *_):
        return Answer(Outcome.OK, None, "", 0.0, 0.0)

    def end(self):
        return "said"

    def close(self):
        self.closed += 1
        self.survivor = None if self.dies else Survivor(1, 2)


@pytest.mark.parametrize("request_", [Execute(0, 0, ""), Load(0, "", b"", 1.0)], ids=["run", "calls"])
def test_worker_starts_no_sandbox_beside_one_that_is_dying(spec, monkeypatch, request_):
    monkeypatch.setattr(sandbox, "start", _Box)
    monkeypatch.setattr(_Box, "made", [])
    boxes: Any = worker._Sandboxes(spec, [ShownTask([spec.public, spec.public])])
    first = boxes.serve(request_)
    assert first is TIMEOUT or first.outcome is Outcome.OK
    assert boxes.serve(End()) in ("", "said")
    assert boxes.survivor == Survivor(1, 2)
    started = len(_Box.made)
    # A program that starts again while it is dying is at fault. A run would be the host's, so the slot waits before it (see above).
    assert boxes.serve(Load(0, "", b"", 1.0)).outcome is Outcome.TIMEOUT
    with pytest.raises(SandboxError, match="has not ended"):
        boxes.serve(Execute(0, 0, ""))
    assert len(_Box.made) == started
    _Box.made[0].dies = True
    assert boxes.serve(Load(0, "", b"", 1.0)).outcome is Outcome.OK
    assert boxes.survivor is None


@pytest.fixture
def undead(monkeypatch):
    """While it holds, SIGKILL does not reach sandboxes."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(sandbox_process.signal, "pidfd_send_signal", lambda *_: None)
            patch.setattr(memory.Group, "kill", lambda self: None)
            patch.setattr(sandbox_process, "END_SECONDS", 0.3)
            patch.setattr(sandbox_process, "_LATER_SECONDS", 0.05)
            yield

    return context


@pytest.mark.sandbox
def test_sandbox_that_does_not_die_has_its_verdict_and_is_closed_later(spec, undead):
    box = sandbox.start(dataclasses.replace(spec, limits=dataclasses.replace(LIMITS, seconds=0.5)))
    try:
        box.wait_ready()
        with undead():
            # It also goes on writing.
            execution = box.run("import os\nwhile True:\n    os.write(1, b'x' * 99)\n")
            assert execution.outcome in (Outcome.TIMEOUT, Outcome.OUTPUT_FLOOD)
            assert box.end()
            box.close()
            assert box.survivor == survivor(box.pid) is not None
            assert memory.tree_bytes(box.pid) > 0
    finally:
        box.close()
    assert box.survivor is None
    box.close()


@pytest.mark.sandbox
def test_program_that_has_answered_keeps_its_answer(spec, undead):
    box = sandbox.start(dataclasses.replace(spec, calls=True, limits=dataclasses.replace(LIMITS, seconds=30)))
    try:
        box.wait_ready()
        assert box.load("def f():\n    return 3\ndef g():\n    1 / 0\n", b"", 20.0).outcome is Outcome.OK
        assert box.call("f", values.encode([], 99), 20.0).outcome is Outcome.OK
        with undead():
            failed = box.call("g", values.encode([], 99), 20.0)
            assert (failed.outcome, "ZeroDivisionError" in failed.detail) == (Outcome.EXCEPTION, True)
            assert box.survivor is not None
    finally:
        box.close()
    assert box.survivor is None
