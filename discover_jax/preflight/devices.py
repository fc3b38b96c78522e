"""The devices of all hosts: their number against the mesh, the bandwidth of an all-reduce, and whether the run fits.

This runs in a child process. jax aborts a process whose peers are gone, and a collective over a closed network hangs; the parent outlives
both. Afterwards, all memory of the devices is free for the run.
"""

import enum
import functools
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from discover_jax import dry_run
from discover_jax.exceptions import DiscoverError
from discover_jax.hosts.processes import start
from discover_jax.machines import find_machine
from discover_jax.models.config import ModelConfig

_BYTES = {"cpu": 4 << 20, "gpu": 256 << 20, "tpu": 64 << 20}
"""Bytes of the all-reduce on each device: large enough for the links' full speed."""
_REPEATS = 5
TCP_GB = 10.0
"""Bandwidth of an all-reduce between hosts, in GB/s, below which it probably goes over TCP. Plain TCP reaches about 4 on hosts of Google
Cloud, and RDMA 340 (eight GPUs a host). One network card of 100 Gb/s with RDMA carries 12.5."""


class Mode(enum.Enum):
    """How the child looks at the devices; the values are its orders."""

    ALONE = b"a"
    """The run has one process."""
    TOGETHER = b"t"
    """Join the other processes."""
    APART = b"-"
    """The processes do not reach each other: only count the devices of this host."""


class Child:
    """A forked process for the checks with jax. Fork it before this process uses jax."""

    def __init__(self, work: Callable[[Mode, Callable[[str, Any], None]], None]):
        """`work(mode, tell)`: the checks. `tell` sends a result by its name."""
        order_out, order_in = os.pipe()
        result_out, result_in = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(order_in)
            os.close(result_out)
            _be_child(work, order_out, result_in)
        os.close(order_out)
        os.close(result_in)
        self._pid, self._order, self._results = pid, order_in, result_out

    def results(self, mode: Mode, deadline: float) -> dict[str, Any]:
        """Starts the checks and returns their results by name; those that did not come until `deadline` are missing. Ends the child.

        `ended` is the exit code of a child that ended by itself, otherwise None.
        """
        os.write(self._order, mode.value)
        data, ended = b"", None
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._results], [], [], left)[0]:
                if not (part := os.read(self._results, 1 << 16)):
                    ended = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                    self._pid = 0
                    break
                data += part
        found = [json.loads(line) for line in data.split(b"\n")[:-1]]
        self.close()
        return dict(found) | {"ended": ended, "mode": mode.name}

    def close(self) -> None:
        """Kills the child."""
        if self._pid:
            os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _be_child(work: Callable[[Mode, Callable[[str, Any], None]], None], orders: int, results: int) -> None:
    """Waits for the order, works, and ends the process."""
    code = 0
    try:
        if order := os.read(orders, 1):  # nothing if the parent is gone
            work(Mode(order), lambda name, value: _send(results, name, value))
    except DiscoverError as error:
        _send(results, "error", str(error))
    except BaseException as error:
        traceback.print_exception(error)
        _send(results, "error", f"{type(error).__name__}: {error}"[:1000])
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _send(results: int, name: str, value: Any) -> None:
    data = json.dumps([name, value]).encode() + b"\n"
    while data:
        data = data[os.write(results, data) :]


def look(
    config: Any, sizes: ModelConfig | None, coordinator: str, count: int, index: int, mode: Mode, tell: Callable[[str, Any], None]
) -> None:
    """The checks of the child.

    Args:
      config: validated.
      sizes: of the model; None if its weights cannot be read.
      coordinator, count, index: flags of the command line, as for `processes.start`.
      mode: whether to join the other processes.
      tell: sends a result by its name.
    """
    if mode is Mode.TOGETHER:
        start(coordinator, count, index)
    devices = jax.local_devices()
    tell("devices", {"count": len(devices), "kind": devices[0].device_kind, "platform": devices[0].platform})
    if mode is Mode.APART:
        return
    tell("all_reduce", all_reduce_bandwidth() if jax.device_count() > 1 else None)
    needed = config.mesh.data * config.mesh.expert * config.mesh.tensor
    if (mode is Mode.TOGETHER and needed != jax.device_count()) or needed > jax.device_count() or sizes is None:
        return
    machine = find_machine("", needed)
    needs = dry_run.needs(config, sizes, machine, on_compile=lambda line: tell("compiling", line))
    peak = max(needs, key=lambda need: (bool(need.complaint), need.total))
    result = {"fits": all(dry_run.fits(need, machine) for need in needs), "memory": machine.memory}
    tell("dry_run", result | {"total": peak.total, "phase": peak.phase, "function": peak.function, "complaint": peak.complaint})


def all_reduce_bandwidth() -> float:
    """GB/s (10^9 bytes) of an all-reduce over all devices of all processes, as NCCL's own tests count it.

    That is the "bus bandwidth": 2 (n - 1) / n times the bytes on each of n devices, by the time of the fastest of several repeats. With a
    ring, it equals the speed of the slowest link (nccl-tests, PERFORMANCE.md).
    """
    devices = jax.devices()
    mesh, n = Mesh(np.asarray(devices), ("all",)), len(devices)
    size = _BYTES.get(devices[0].platform, 4 << 20) // 4
    spread = NamedSharding(mesh, PartitionSpec("all"))
    values_N = jax.make_array_from_callback((n * size,), spread, lambda index: np.ones(size, np.float32))
    reduce = jax.jit(
        jax.shard_map(functools.partial(jax.lax.psum, axis_name="all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec())
    )
    times = []
    for _ in range(_REPEATS + 1):  # the first compiles and connects
        began = time.monotonic()
        reduce(values_N).block_until_ready()
        times.append(time.monotonic() - began)
    return 2 * (n - 1) / n * 4 * size / min(times[1:]) / 1e9
