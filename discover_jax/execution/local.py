"""Runs programs on this machine: one worker process per slot, each with its own cores and, if root started it, its own uid."""

import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import SandboxError
from discover_jax.execution import bubblewrap, canary, memory, quarantine, summary, worker
from discover_jax.execution.admission import Admission
from discover_jax.execution.backend import End, Execute, Load, Request, ShownTask
from discover_jax.execution.bytecode import write_bytecode
from discover_jax.execution.children import Children, ChildSlot
from discover_jax.execution.leases import lease_cores, lease_uids
from discover_jax.execution.limits import ResourceLimits
from discover_jax.execution.sandbox_spec import SandboxSpec


class LocalBackend:
    """See `backend.Backend`. Checks the isolation, then starts the workers without waiting for them."""

    def __init__(
        self,
        shown: Sequence[ShownTask],
        limits: ResourceLimits,
        *,
        workers: int | None,
        isolation: str,
        hidden: Sequence[Path],
        preload: Sequence[str],
        grace_seconds: float,
    ) -> None:
        """
        Args:
          shown: what programs see of each task.
          limits: of each program.
          workers: number of slots; None or 0: as many as the machine's cores allow.
          isolation: one of sandbox_spec.BACKENDS.
          hidden: paths that programs must not see, in addition to the siblings of the public folders.
          preload: modules that a sandbox imports before it gets a program.
          grace_seconds: a worker that exceeds a program's time limit by more than this counts as hung and is replaced.

        Raises:
          SandboxError: bubblewrap cannot start or does not isolate, or there are not enough uids; the message says what to do.
        """
        shown = [dataclasses.replace(task, folders=[folder.resolve() for folder in task.folders]) for task in shown]
        write_bytecode(("pandas", *preload))
        host = bubblewrap.inspect_host() if isolation == "bubblewrap" else None
        self._cgroups = memory.find_cgroups()
        if self._cgroups is not None:
            memory.remove_stale(self._cgroups)
        cpus = sorted(os.sched_getaffinity(0))
        cores_of_slots = lease_cores(cpus, limits.cores, workers)
        with contextlib.ExitStack() as held:
            uids: Sequence[int | None] = [None] * len(cores_of_slots)
            if host is not None and host.root:
                uids = held.enter_context(lease_uids(len(cores_of_slots)))
            specs = [
                SandboxSpec(isolation, host, self._cgroups, shown[0].folders[0], limits, slot, cores, uid, tuple(preload))
                for slot, (cores, uid) in enumerate(zip(cores_of_slots, uids, strict=True))
            ]
            if host is not None:
                first = [task.folders[0] for task in shown]
                unseen = {path for public in first for path in canary.hidden_paths(host, public, hidden)}
                for public in first:
                    canary.check(dataclasses.replace(specs[0], public=public), sorted(unseen))
            self._uid_leases = held.pop_all()
        # A control group limits each program's memory. Without one, programs wait until enough memory is free.
        admission = Admission(limits.memory_bytes) if self._cgroups is None else None
        self._summary = specs, limits, max(len(task.folders) for task in shown), len(cpus)
        self._children = Children()
        self.all_slots = [
            LocalSlot(
                self._children.slot("worker", f"execution-{spec.slot}", worker.main, spec, shown),
                limits.seconds + grace_seconds,
                admission,
                self._children,
            )
            for spec in specs
        ]
        """For callers that assign slots themselves instead of calling `slot`."""
        self._free: queue.SimpleQueue[LocalSlot] = queue.SimpleQueue()
        for slot in self.all_slots:
            slot.warm()
            self._free.put(slot)

    @property
    def specs(self) -> Sequence[SandboxSpec]:
        """The sandbox spec of each slot."""
        return self._summary[0]

    @property
    def slots(self) -> int:
        return len(self.all_slots)

    @property
    def isolated(self) -> bool:
        return self.specs[0].host is not None

    def describe(self) -> str:
        return summary.describe(*self._summary)

    def slot(self) -> contextlib.AbstractContextManager["LocalSlot"]:
        return lent(self._free)

    def close(self) -> None:
        self._children.close()

    def release(self) -> None:
        self._children.release()
        if self._cgroups is not None:
            memory.remove_stale(self._cgroups)
        self._uid_leases.close()


@contextlib.contextmanager
def lent(free: "queue.SimpleQueue[LocalSlot]") -> Iterator["LocalSlot"]:
    """`backend.borrowed`. But a slot whose program has not ended is not free before it has."""
    slot = free.get()
    try:
        yield slot
    finally:
        if slot.quarantined:
            threading.Thread(target=lambda: (slot.settle(), free.put(slot)), name="execution-quarantine", daemon=True).start()
        else:
            free.put(slot)


class LocalSlot:
    """See `backend.Slot`."""

    def __init__(self, slot: ChildSlot, seconds: float, admission: Admission | None, children: Children) -> None:
        self._slot, self._seconds, self._admission, self._children = slot, seconds, admission, children
        self._admitted = contextlib.ExitStack()
        self._survivor: quarantine.Survivor | None = None

    @property
    def quarantined(self) -> bool:
        """Whether its last program has not ended although it was killed."""
        return self._survivor is not None and self._survivor.alive()

    def settle(self) -> None:
        """Waits until its last program has ended or the backend is closed."""
        quarantine.wait_until_gone(self._survivor, lambda: self._children.closed)

    def warm(self) -> None:
        """Starts the worker and its first sandbox without waiting for them."""
        self._slot.warm()

    def ask(self, request: Request) -> Any:
        if isinstance(request, Execute | Load):
            self.settle()
            self._admit()
        done = True
        try:
            answered: worker.Reply = self._slot.ask(request, self._seconds)
            self._survivor, reply = answered.survivor, answered.value
            if isinstance(reply, SandboxError):
                self._slot.drop()
                raise reply
            done = isinstance(request, Execute | End)
            return reply
        finally:
            if done:
                self._admitted.close()

    def _admit(self) -> None:
        """Without a control group, a program that may start waits until enough memory is free."""
        self._admitted.close()
        if self._admission is not None:
            self._admitted.enter_context(self._admission.program(lambda: self._children.closed))
