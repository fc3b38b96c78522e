"""Runs programs on the nodes of a ray cluster, through one process that talks to the cluster (ray_driver.py)."""

import contextlib
import dataclasses
import importlib.util
import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from discover_jax.exceptions import ConfigError, RunError, SandboxError
from discover_jax.execution import ray_driver
from discover_jax.execution.backend import Request, ShownTask, borrowed
from discover_jax.execution.cache import packages
from discover_jax.execution.children import Children
from discover_jax.execution.limits import ResourceLimits
from discover_jax.extras import install_command

_OPENING_SECONDS = 900.0
_NAMED = 4
"""Summaries name this many nodes and count the rest."""


class RayBackend:
    """See `backend.Backend`."""

    def __init__(
        self,
        shown: Sequence[ShownTask],
        limits: ResourceLimits,
        *,
        workers: int | None,
        address: str,
        preload: Sequence[str],
        grace_seconds: float,
    ) -> None:
        """Joins the cluster and waits until each node has checked its sandbox.

        Args:
          shown: what programs see of each task; all of it is copied to each node.
          limits: of each program.
          workers: maximum number of slots; None or 0: as many as the cluster's CPUs allow.
          address: "auto": the cluster that this machine is a node of; HOST:PORT: address of the cluster's head; "local": a cluster of this
            machine only, which starts and ends with this object.
          preload, grace_seconds: see `local.LocalBackend`.

        Raises:
          ConfigError: ray is not installed.
          RunError: there is no cluster, or no node has enough CPUs.
          SandboxError: a node's sandbox does not isolate or its packages differ; the message names the node.
        """
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                f"config.execution.backend = 'ray', but the package ray is not installed. Run {install_command('ray')},"
                " here and on all nodes, or use config.execution.backend='bubblewrap' to run programs on this machine."
            )
        self._address = address
        wanted = ray_driver.Wanted(
            address,
            tuple(dataclasses.replace(task, folders=[folder.resolve() for folder in task.folders]) for task in shown),
            tuple(packages()),
            limits,
            workers or 0,
            tuple(preload),
            grace_seconds,
        )
        self._children = Children()
        try:
            self._opened, self._connection = self._open(wanted)
        except BaseException:
            self._children.close()
            self._children.release()
            raise
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] | None = {}  # None once the process is gone
        self._free: queue.SimpleQueue[_RaySlot] = queue.SimpleQueue()
        for number in range(self._opened.slots):
            self._free.put(_RaySlot(self, number))
        self._reader = threading.Thread(target=self._read, name="execution-ray-reader", daemon=True)
        self._reader.start()

    def _open(self, wanted: ray_driver.Wanted) -> tuple[ray_driver.Opened, Connection]:
        slot = self._children.slot("ray", "ray-driver", ray_driver.main, wanted)
        try:
            opened = slot.ask("open", _OPENING_SECONDS)
        except SandboxError as error:  # ray ends the process if there is no cluster
            raise ray_driver.no_cluster(self._address, str(error)) from error
        if isinstance(opened, ray_driver.Refused):
            raise SandboxError(opened.text)
        assert slot.child is not None
        return opened, slot.child.connection

    @property
    def slots(self) -> int:
        return self._opened.slots

    @property
    def isolated(self) -> bool:
        return True

    def describe(self) -> str:
        nodes_of: dict[str, list[str]] = defaultdict(list)
        for name, line in self._opened.nodes:
            nodes_of[line].append(name)
        parts = []
        for line, names in nodes_of.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"on {', '.join(names[:_NAMED])}{more}{', each' if len(names) > 1 else ''}: {line}")
        return f"ray, {self.slots} slots; {' | '.join(parts)}"

    def slot(self) -> contextlib.AbstractContextManager["_RaySlot"]:
        return borrowed(self._free)

    def ask(self, slot: int, request: Request) -> Any:
        """Sends a request for a slot to the driver process and returns the reply.

        Raises:
          SandboxError: see `backend.Slot`.
          RunError: the cluster was lost.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._waiting is None:
                raise self._gone()
            number = next(self._numbers)
            self._waiting[number] = future
            with contextlib.suppress(OSError):  # the process just ended: the reader notices and sets the error
                self._connection.send((number, slot, request))
        reply = future.result()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _read(self) -> None:
        """Delivers replies to the threads that wait for them, until the driver process ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, reply = self._connection.recv()
                with self._lock:
                    assert self._waiting is not None
                    future = self._waiting.pop(number)
                future.set_result(reply)
        with self._lock:
            left, self._waiting = self._waiting or {}, None
        for future in left.values():
            future.set_result(self._gone())

    def _gone(self) -> SandboxError | RunError:
        if self._children.closed:
            return SandboxError("The executor was closed while the program ran.")
        return RunError(
            f"The ray cluster (config.execution.ray_address = {self._address!r}) was lost: its head or its processes on this machine have"
            " ended. See `ray status` and the logs in /tmp/ray/session_latest/logs. Start the cluster, then the same command again: it"
            " resumes at the last checkpoint."
        )

    def close(self) -> None:
        self._children.close()
        self._reader.join()

    def release(self) -> None:
        self._children.release()


class _RaySlot:
    """See `backend.Slot`."""

    def __init__(self, backend: RayBackend, number: int) -> None:
        self._backend, self._number = backend, number

    def ask(self, request: Request) -> Any:
        return self._backend.ask(self._number, request)
