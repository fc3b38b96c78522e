"""The process through which a run uses a ray cluster. It starts one actor per node; each actor has some of the slots.

It is a separate process because ray ends its driver at once when it loses the cluster's head, and to keep ray's threads, signal handlers
and gRPC out of the process that uses the accelerators.
"""

import collections
import dataclasses
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from discover_jax.exceptions import DiscoverError, RunError, SandboxError
from discover_jax.execution import children
from discover_jax.execution.backend import Call, End, Load, Request, ShownTask
from discover_jax.execution.limits import ResourceLimits
from discover_jax.execution.ray_node import Node, pack

_START_SECONDS = 300.0
"""Time for a node to start its actor, import packages and check the sandbox."""
_LEAVING_SECONDS = 10.0
_DEATHS = 5
"""A node is left out after its actor has ended this many times."""
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run requests from a cluster.

    Attributes:
      address: "auto", "local" or HOST:PORT, see `cluster.RayBackend`.
      shown: what programs see of each task.
      packages: versions of Python and packages, which must be the same on all nodes.
      limits: of each program.
      workers: maximum number of slots; 0: as many as the cluster's CPUs allow.
      preload, grace_seconds: see `local.LocalBackend`.
    """

    address: str
    shown: tuple[ShownTask, ...]
    packages: tuple[str, ...]
    limits: ResourceLimits
    workers: int
    preload: tuple[str, ...]
    grace_seconds: float


@dataclasses.dataclass(frozen=True)
class Opened:
    """The number of slots, and how each node isolates programs: (node name, one line)."""

    slots: int
    nodes: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Refused:
    """Why nodes cannot be used; the text names them."""

    text: str


@dataclasses.dataclass(eq=False)
class _Node:
    id: str
    name: str
    slots: int
    actor: Any = None
    deaths: int = 0


@dataclasses.dataclass(frozen=True)
class _Seat:
    """A slot of a node. Valid while the node's actor lives."""

    node: _Node
    actor: Any
    number: int


def shares(slots_N: Sequence[int], workers: int) -> list[int]:
    """The number of slots to use on each of N nodes: all, or `workers` of them, spread evenly."""
    seats = sorted((number, node) for node, count in enumerate(slots_N) for number in range(count))
    taken = collections.Counter(node for _, node in seats[: workers or None])
    return [taken[node] for node in range(len(slots_N))]


def main(connection: Connection, parent: int, wanted: Wanted) -> None:
    """Joins the cluster on the first message, sends Opened, Refused or a RunError, then serves until the connection closes.

    Receives (number, slot, request), where a slot waits for its reply before the next one, and sends (number, reply or DiscoverError) in
    the order in which replies arrive.
    """
    children.begin(parent)
    connection.recv()
    try:
        cluster = _Cluster(wanted)
    except SandboxError as error:
        connection.send(Refused(str(error)))
        return
    except RunError as error:
        connection.send(error)
        return
    children.begin(parent)  # again: ray has installed its own signal handlers
    sending = threading.Lock()

    def answer(number: int, slot: int, request: Request) -> None:
        reply = cluster.ask(slot, request)
        with sending:
            connection.send((number, reply))

    try:
        connection.send(cluster.opened)
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            # Daemon threads: a lost cluster may never answer them.
            threading.Thread(target=answer, args=job, daemon=True).start()
    finally:
        cluster.close()


class _Cluster:
    """The nodes and their free seats."""

    def __init__(self, wanted: Wanted) -> None:
        """Connects and starts an actor on each node that has enough CPUs.

        Raises:
          RunError: there is no cluster, or no node has enough CPUs.
          SandboxError: nodes cannot isolate programs or have other packages; the message names all of them.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # do not send usage statistics
        import ray  # pyright: ignore[reportMissingImports]

        self._ray, self._wanted = ray, wanted
        options: dict[str, Any] = (
            {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False} if wanted.address == "local" else {}
        )
        try:
            context = ray.init(address=wanted.address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise no_cluster(wanted.address, _text(error)) from error
        self._hidden = [context.address_info["session_dir"]]
        self._changed = threading.Condition()
        self._closed = False
        self._nodes = self._choose(ray.nodes())
        self._archive = ray.put(pack(wanted.shown))
        lines, refused = [], []
        with ThreadPoolExecutor(len(self._nodes)) as pool:
            for node, begun in [(node, pool.submit(self._start, node)) for node in self._nodes]:
                try:
                    lines.append((node.name, begun.result()))
                except SandboxError as error:
                    refused.append(f"  - {node.name}: {error}")
        if refused:
            self.close()
            others = f" These nodes are fine: {', '.join(name for name, _ in lines)}." if lines else ""
            raise SandboxError(
                f"{len(refused)} of the ray cluster's {len(self._nodes)} nodes cannot run programs, so no program was run:\n"
                + "\n".join(refused)
                + f"\nFix them, or remove them from the cluster by `ray stop` on each.{others}"
            )
        self._free = [_Seat(node, node.actor, number) for node in self._nodes for number in range(node.slots)]
        # The last seat of each slot: the sandbox for a program's next run is warm there.
        self._home = dict(enumerate(self._free))
        self._loaded: dict[int, _Seat] = {}  # seats of slots whose program waits for calls
        self.opened = Opened(len(self._free), tuple(lines))

    def _choose(self, known: Sequence[dict[str, Any]]) -> list[_Node]:
        cores, alive = self._wanted.limits.cores, [node for node in known if node["Alive"]]
        cpus_N = [int(node["Resources"].get("CPU", 0)) for node in alive]
        names = [f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})" for node in alive]
        if not any(cpus >= cores for cpus in cpus_N):
            offered = ", ".join(f"{name}: {cpus}" for name, cpus in zip(names, cpus_N, strict=True))
            self._ray.shutdown()
            raise RunError(
                f"No node of the ray cluster has enough CPUs for config.execution.cores = {cores} ({offered}). Lower it, or add nodes by"
                " `ray start --address=...`."
            )
        slots_N = shares([cpus // cores for cpus in cpus_N], self._wanted.workers)
        return [_Node(node["NodeID"], name, slots) for node, name, slots in zip(alive, names, slots_N, strict=True) if slots]

    def _start(self, node: _Node) -> str:
        """Starts a node's actor and returns its line about isolation.

        Raises:
          SandboxError: the actor does not start, or the node cannot isolate programs.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

        wanted = self._wanted
        actor = (
            self._ray.remote(Node)
            .options(
                num_cpus=node.slots * wanted.limits.cores,
                max_concurrency=node.slots + 1,  # one more, to close
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote()
        )
        try:
            reply = self._ray.get(
                actor.open.remote(
                    self._archive,
                    [(len(task.folders), task.calls) for task in wanted.shown],
                    wanted.packages,
                    wanted.limits,
                    slots=node.slots,
                    preload=wanted.preload,
                    grace_seconds=wanted.grace_seconds,
                    hidden=self._hidden,
                ),
                timeout=_START_SECONDS,
            )
        except self._ray.exceptions.GetTimeoutError:
            reply = SandboxError(f"it did not start within {_START_SECONDS:.0f} s. Another job may hold its CPUs: see `ray status`.")
        except self._ray.exceptions.RayError as error:
            reply = SandboxError(
                f"its actor could not start: {_text(error)} Install this project and its packages there, as on this machine."
            )
        if isinstance(reply, DiscoverError):
            self._ray.kill(actor)
            raise SandboxError(str(reply))
        node.actor = actor
        return reply

    def ask(self, slot: int, request: Request) -> Any:
        """Serves a request for one of the run's slots on a node, and returns the reply, or an error of `backend.Slot` or `Backend.slot`.

        From `Load` to `End`, a program keeps its seat, unless the node fails.
        """
        seat = self._loaded.pop(slot, None)
        if seat is None and isinstance(request, End):
            return ""
        try:
            seat = seat or self._take(slot)
        except DiscoverError as error:
            return error
        reply = self._ask_seat(seat, request)
        if isinstance(request, Load | Call) and not isinstance(reply, DiscoverError):
            self._loaded[slot] = seat
        else:
            self._give_back(seat)
        return reply

    def _give_back(self, seat: _Seat) -> None:
        with self._changed:
            if seat.actor is seat.node.actor:
                self._free.append(seat)
                self._changed.notify()

    def _ask_seat(self, seat: _Seat, request: Request) -> Any:
        """The reply of a node. After an error, the program of the seat has ended."""
        # Without control groups, the programs of a node may have to run one at a time.
        patience = seat.node.slots * (self._wanted.limits.seconds + self._wanted.grace_seconds)
        try:
            return self._ray.get(seat.actor.ask.remote(seat.number, request), timeout=patience)
        except self._ray.exceptions.GetTimeoutError:
            why = f"it did not answer within {patience:g} s"
        except self._ray.exceptions.RayError as error:
            why = _text(error)
        self._replace(seat, why)
        return SandboxError(f"The node {seat.node.name} of the ray cluster lost a program: {why}")

    def _take(self, slot: int) -> _Seat:
        """Takes a free seat, preferably the last one of this slot."""
        with self._changed:
            while True:
                if self._closed:
                    raise SandboxError("The executor was closed while the program ran.")
                if not self._nodes:
                    raise RunError(
                        "The ray cluster has no usable node left (see the log above for how each was lost). Start nodes, then the same"
                        " command again: it resumes at the last checkpoint."
                    )
                if self._free:
                    home = self._home[slot]
                    seat = self._home[slot] = home if home in self._free else self._free[0]
                    self._free.remove(seat)
                    return seat
                self._changed.wait()

    def _replace(self, seat: _Seat, why: str) -> None:
        """Restarts a lost node's actor in a thread, or leaves the node out. Only the first call for a lost actor does this."""
        node = seat.node
        with self._changed:
            if node.actor is not seat.actor or self._closed:
                return
            node.actor, node.deaths = None, node.deaths + 1
            self._free = [other for other in self._free if other.node is not node]
        threading.Thread(target=self._revive, args=(seat, why), daemon=True).start()

    def _revive(self, seat: _Seat, why: str) -> None:
        node, left_out = seat.node, ""
        self._ray.kill(seat.actor)
        try:
            if node.deaths == _DEATHS:
                left_out = f"its actor ended {_DEATHS} times, the last time: {why}"
            else:
                self._start(node)
        except (SandboxError, self._ray.exceptions.RayError) as error:
            left_out = f"{why} It did not restart: {error}"
        with self._changed:
            if left_out:
                self._nodes.remove(node)
                _log.warning("From now on, the node %s of the ray cluster is left out: %s", node.name, left_out)
            else:
                self._free += [_Seat(node, node.actor, number) for number in range(node.slots)]
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all programs and actors, then leaves the cluster."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            actors = [node.actor for node in self._nodes if node.actor is not None]
        self._ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=_LEAVING_SECONDS)
        for actor in actors:
            self._ray.kill(actor)
        self._ray.shutdown()


def no_cluster(address: str, why: str) -> RunError:
    """The error if no cluster can be joined."""
    return RunError(
        f"Cannot join a ray cluster at {address!r}: {why} Start one by `ray start --head`, join it from this machine by `ray start"
        " --address=HOST:PORT --num-cpus=0`, and set config.execution.ray_address to 'auto' or HOST:PORT. Or set it to 'local' to start a"
        " cluster on this machine for the run."
    )


def _text(error: Exception) -> str:
    """The beginning of ray's message, which may be long, on one line."""
    return " ".join(str(error).split())[:400]
