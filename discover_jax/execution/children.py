"""Child processes that answer messages one at a time and never outlive this process."""

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from discover_jax.exceptions import SandboxError

_LEAVING_SECONDS = 5.0
"""Time for a child to end its sandboxes after it was asked to end."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_start_lock = threading.Lock()


@contextlib.contextmanager
def _without_main_module():
    """Hides the main script while a process is spawned: the child would import it again, and jax with it."""
    with _start_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class HungError(SandboxError):
    """A child did not reply in time and was killed."""


class EndedError(SandboxError):
    """A child ended unexpectedly."""


class Child:
    """This process's end of the connection to a child. Only one thread at a time may call `ask`."""

    def __init__(self, kind: str, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._kind = kind
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=target, args=(theirs, os.getpid(), *arguments), name=name, daemon=True)
        with _without_main_module():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def ask(self, message: Any, seconds: float) -> Any:
        """Sends a message and returns the child's reply.

        A timer kills the child after `seconds`. A timeout on waiting would not do: a stopped process may also block the sending of the
        message or hang in the middle of its reply.

        Raises:
          EndedError: the child ended.
          HungError: it was killed because it did not reply within `seconds`.
        """
        hung = threading.Event()

        def end() -> None:
            hung.set()
            self._process.kill()  # its sandboxes die with it

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            self.connection.send(message)
            if self.connection in wait([self.connection, self._process.sentinel]):
                return self.connection.recv()
        except (EOFError, OSError):  # the connection broke: the child ended
            pass
        finally:
            timer.cancel()
        self._process.join(5)
        if hung.is_set():
            raise HungError(f"The {self._kind} process {self.pid} did not reply within {seconds:g} s and was killed.")
        raise EndedError(f"The {self._kind} process {self.pid} ended unexpectedly (exit code {self._process.exitcode}).")

    def interrupt(self) -> None:
        """Asks the process to end and returns at once; a caller that waits for its reply gets an error. Any thread may call it."""
        self._process.terminate()

    def end(self) -> None:
        """Ends the process and with it its sandboxes. Any thread may call it."""
        self.interrupt()
        if not wait([self._process.sentinel], _LEAVING_SECONDS):  # it hangs or was stopped
            self._process.kill()

    def stop(self) -> None:
        """Ends the process and reaps it."""
        self.connection.close()
        self.end()
        self._process.join()


class ChildSlot:
    """A slot for one child, which starts on first use and again after a failure. Only one thread at a time may call `ask`."""

    def __init__(self, children: "Children", kind: str, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._children = children
        self._make = lambda: Child(kind, name, target, arguments)
        self._kind = kind
        self.child: Child | None = None

    def warm(self) -> None:
        """Starts the child without waiting for it."""
        with contextlib.suppress(SandboxError):  # it cannot start now: `ask` tries again and raises the error
            self._started()

    def ask(self, message: Any, seconds: float) -> Any:
        """Returns the child's reply, or raises it if it is an error.

        Raises:
          SandboxError: the child did not start, ended, hung, or replied with this error; the next call starts another child.
          DiscoverError: the child replied with this error.
        """
        try:
            reply = self._started().ask(message, seconds)
            if isinstance(reply, Exception):
                raise reply
            return reply
        except SandboxError:
            self.drop()
            raise

    def _started(self) -> Child:
        if self.child is None:
            try:
                self._children.start(self, self._make)
            except OSError as error:
                raise SandboxError(f"Cannot start a {self._kind} process: {error}.") from error
        assert self.child is not None
        return self.child

    def drop(self) -> None:
        """Ends the child."""
        child, self.child = self.child, None
        if child is not None:
            child.stop()


class Children:
    """The children of one owner. One long-lived thread starts them all: the kernel kills a child when the thread that started it ends."""

    def __init__(self) -> None:
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="execution-starter")
        self._lock = threading.Lock()
        self._slots: list[ChildSlot] = []
        self.closed = False

    def slot(self, kind: str, name: str, target: Callable[..., None], *arguments: Any) -> ChildSlot:
        """A slot for a child that runs `target(connection, parent, *arguments)`; `kind` names it in errors."""
        slot = ChildSlot(self, kind, name, target, arguments)
        self._slots.append(slot)
        return slot

    def warm_slots(self, count: int, kind: str, target: Callable[..., None], *arguments: Any) -> "queue.SimpleQueue[ChildSlot]":
        """This many such slots, whose children start without being waited for. For `backend.borrowed`."""
        free: queue.SimpleQueue[ChildSlot] = queue.SimpleQueue()
        for number in range(count):
            slot = self.slot(kind, f"{kind}-{number}", target, *arguments)
            slot.warm()
            free.put(slot)
        return free

    def slots_on_demand(self, count: int, kind: str, target: Callable[..., None], *arguments: Any) -> "queue.LifoQueue[ChildSlot]":
        """This many such slots for `backend.borrowed`. One child starts without being waited for, another one only if all are in use."""
        free: queue.LifoQueue[ChildSlot] = queue.LifoQueue()  # so that a slot that was in use comes before those that never were
        for number in reversed(range(count)):
            slot = self.slot(kind, f"{kind}-{number}", target, *arguments)
            if number == 0:
                slot.warm()
            free.put(slot)
        return free

    def start(self, slot: ChildSlot, make: Callable[[], Child]) -> None:
        """Starts the child of a slot. Raises OSError if no process can be started, SandboxError after `close`."""

        def begin() -> None:
            with self._lock:  # so that `close` sees every child that was started
                if self.closed:
                    raise SandboxError("The executor was closed while programs ran.")
                slot.child = make()

        try:
            self._starter.submit(begin).result()
        except RuntimeError as error:  # the starter was shut down
            raise SandboxError("The executor was closed while programs ran.") from error

    def close(self) -> None:
        """Ends all children; callers that wait for a reply get a SandboxError. Idempotent."""
        with self._lock:
            self.closed = True
            running = [child for slot in self._slots if (child := slot.child) is not None]
        for child in running:
            child.interrupt()
        for child in running:
            child.end()

    def release(self) -> None:
        """Releases resources after `close`, once no caller waits for a reply any more."""
        for slot in self._slots:
            slot.drop()
        self._starter.shutdown()


def begin(parent: int) -> None:
    """Ties a child's life to its parent; call it first. The child exits at once if the parent is gone, and cleanly on SIGTERM.

    The kernel kills the child when the thread that started it ends. The child adopts the orphans of its sandboxes: many containers have an
    init that does not reap them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != parent:
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the main process decides what it means
    signal.signal(signal.SIGTERM, _leave)


def _leave(*_: object) -> None:
    """Exits cleanly; a second request must not interrupt this."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)
