"""Child processes that answer one message after the other, and never outlive this process."""

import contextlib
import ctypes
import multiprocessing
import os
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
"""For a child that was asked to end, in which it ends its sandboxes."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_start_lock = threading.Lock()


@contextlib.contextmanager
def _without_main_module():
    """Hides the main script while a process is spawned, which would import it again, and jax with it."""
    with _start_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class Child:
    """This process's end of one child. `ask` is for one thread at a time."""

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
        """The child's reply.

        A timer bounds it rather than a limit on waiting: a process that was stopped may hang amid taking the message or sending its reply.

        Raises:
          SandboxError: it ended, or did not reply within `seconds`, for which it is ended.
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
            raise SandboxError(f"The {self._kind} process {self.pid} did not reply within {seconds:g} s and was ended.")
        raise SandboxError(f"The {self._kind} process {self.pid} ended unexpectedly (exit code {self._process.exitcode}).")

    def interrupt(self) -> None:
        """Asks the process to end, and returns at once; whoever waits for its reply is told that it ended. Any thread may call it."""
        self._process.terminate()

    def end(self) -> None:
        """Ends the process, and so its sandboxes. Any thread may call it."""
        self.interrupt()
        if not wait([self._process.sentinel], _LEAVING_SECONDS):  # it hangs, or was stopped
            self._process.kill()

    def stop(self) -> None:
        """Ends the process and lets go of it."""
        self.connection.close()
        self.end()
        self._process.join()


class ChildSlot:
    """A slot for one child at a time, which starts when it is first needed and again after a fault. `ask` is for one thread at a time."""

    def __init__(self, children: "Children", kind: str, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._children = children
        self._make = lambda: Child(kind, name, target, arguments)
        self._kind = kind
        self.child: Child | None = None

    def warm(self) -> None:
        """Starts the child without waiting for it."""
        with contextlib.suppress(SandboxError):  # no process to be had now: `ask` tries again and tells why
            self._started()

    def ask(self, message: Any, seconds: float) -> Any:
        """The child's reply; an error that it replies with is raised.

        Raises:
          SandboxError: it could not be started, ended, hung, or replied so; the next call starts another one.
          DiscoverError: it replied so.
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
                raise SandboxError(f"A {self._kind} process could not be started: {error}.") from error
        assert self.child is not None
        return self.child

    def drop(self) -> None:
        """Ends the child."""
        child, self.child = self.child, None
        if child is not None:
            child.stop()


class Children:
    """The children of one owner, in places. One thread starts them all and lasts as long: the kernel ends a child with its starter."""

    def __init__(self) -> None:
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="execution-starter")
        self._lock = threading.Lock()
        self._slots: list[ChildSlot] = []
        self.closed = False

    def slot(self, kind: str, name: str, target: Callable[..., None], *arguments: Any) -> ChildSlot:
        """A slot for a child that runs `target(connection, parent, *arguments)`; `kind` is what errors call it."""
        slot = ChildSlot(self, kind, name, target, arguments)
        self._slots.append(slot)
        return slot

    def start(self, slot: ChildSlot, make: Callable[[], Child]) -> None:
        """Starts the child of a slot. Raises OSError if there is no process to be had, SandboxError once this is closed."""

        def begin() -> None:
            with self._lock:  # so that `close` finds all that were started
                if self.closed:
                    raise SandboxError("It was closed while programs ran.")
                slot.child = make()

        try:
            self._starter.submit(begin).result()
        except RuntimeError as error:  # the starter takes nothing more
            raise SandboxError("It was closed while programs ran.") from error

    def close(self) -> None:
        """Ends all children; whoever waits for a reply gets a SandboxError. Idempotent."""
        with self._lock:
            self.closed = True
            running = [child for slot in self._slots if (child := slot.child) is not None]
        for child in running:
            child.interrupt()
        for child in running:
            child.end()

    def release(self) -> None:
        """Lets go of what `close` ended, once nobody waits for replies any more."""
        for slot in self._slots:
            slot.drop()
        self._starter.shutdown()


def begin(parent: int) -> None:
    """To be called first in a child: it ends with its parent, at once if that is gone, and in good order when asked to.

    The kernel kills it when the thread that started it ends. It is handed the orphans of its sandboxes: an init that does not collect them,
    as in many containers, would let them pile up.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != parent:
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the main process decides what it means
    signal.signal(signal.SIGTERM, _leave)


def _leave(*_: object) -> None:
    """Ends the process in good order; a second request must not interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)
