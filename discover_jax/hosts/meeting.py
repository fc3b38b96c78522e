"""Processes that meet at the coordinator's port before jax uses it, exchange values, and know by name who is missing.

jax itself aborts when a process does not join, and does not say which. It uses only the standard library. Messages are lines of JSON. The
hosts share no secret, so any host that reaches the port can join. What is exchanged here is therefore neither executed nor trusted.
"""

import contextlib
import json
import os
import re
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

from discover_jax.exceptions import ConfigError, TemporaryError
from discover_jax.hosts.waiting import reminder

_MAGIC = "discover_jax preflight 1"
_LONGEST = 1 << 26
"""Maximum bytes of a message."""
_HELLO_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_LATE_SECONDS = 10.0
"""Time for further processes to come and hear that the processes contradict each other."""


class _Line:
    """Lines of JSON over a socket."""

    def __init__(self, held: socket.socket):
        held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._held, self._buffer = held, b""

    def send(self, message: Any) -> None:
        self._held.settimeout(30)
        self._held.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> Any:
        """The next message. Raises OSError if the other end closed or said nothing until `deadline` (of time.monotonic)."""
        while b"\n" not in self._buffer:
            if not select.select([self._held], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("it did not answer in time")
            data = self._held.recv(1 << 16)
            self._buffer += data
            if not data or len(self._buffer) > _LONGEST:
                raise ConnectionError("it closed the connection")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise ConnectionError("it sent something else than JSON") from error

    def close(self) -> None:
        self._held.close()


class Meeting:
    """The processes that met. All must call the same methods in the same order.

    Attributes:
      index, count: of this process, and number of processes.
      names: a name of each process for messages, such as "node-7 (process 1)".
    """

    def __init__(self, index: int, names: list[str], lines: dict[int, _Line]):
        self.index, self.count, self.names = index, len(names), names
        self._lines = lines

    def gather(self, what: str, value: Any, seconds: float) -> list[Any]:
        """The values of all processes, by index. They must be JSON.

        Args:
          what: what the processes do before they have their values, for the message.
          value: of this process.
          seconds: time limit for the slowest process.

        Raises:
          TemporaryError: a process ended or did not answer. All other processes raise it; the message names the lost one.
        """
        deadline = time.monotonic() + seconds
        if self.index:
            try:
                self._lines[0].send({"value": value})
                message = self._lines[0].receive(deadline + 10)  # process 0 waits for the slowest
            except OSError as error:
                raise TemporaryError(f"{self.names[0]} was lost during the check of {what}: {error}.") from error
            if isinstance(message, str):
                raise TemporaryError(message)
            return message
        values, lost = [value], []
        for index in range(1, self.count):
            try:
                values.append(self._lines[index].receive(deadline)["value"])
            except OSError as error:
                lost.append(f"{self.names[index]} was lost during the check of {what}: {error}.")
        answer = values if not lost else " ".join(lost)
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # the next exchange notices it
                line.send(answer)
        if lost:
            raise TemporaryError(" ".join(lost))
        return values

    def from_first(self, what: str, value: Any, seconds: float) -> Any:
        """The value of process 0."""
        return self.gather(what, value, seconds)[0]


@contextlib.contextmanager
def meet(coordinator: str, count: int, index: int, seconds: float) -> Iterator[Meeting]:
    """Waits for all processes.

    Args:
      coordinator: HOST:PORT of process 0. The port is free again when this has returned: jax can listen there.
      count, index: number of processes, and index of this one.
      seconds: time limit for the last process.

    Raises:
      TemporaryError: processes did not come; the message names them.
      ConfigError: the port is in use, or processes contradict each other.
    """
    if count == 1:
        yield Meeting(0, [f"{socket.gethostname()} (process 0)"], {})
        return
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    names, lines = (
        _wait_for_others(int(port), count, deadline, seconds)
        if index == 0
        else _reach_first(host.strip("[]"), int(port), count, index, deadline, seconds)
    )
    try:
        yield Meeting(index, names, lines)
    finally:
        for line in lines.values():
            line.close()


def _wait_for_others(port: int, count: int, deadline: float, seconds: float) -> tuple[list[str], dict[int, _Line]]:
    """What process 0 does: accepts the others until all are there, and tells them the names."""
    lines: dict[int, _Line] = {}
    names = {0: f"{socket.gethostname()} (process 0)"}
    try:
        dual = socket.has_dualstack_ipv6()
        address = ("::" if dual else "", port)
        server = socket.create_server(address, family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=count)
    except OSError as error:
        raise ConfigError(f"Process 0 cannot listen at port {port} of --coordinator: {error}. Give a free port.") from error
    invalid: ConfigError | None = None
    told = 0  # processes that know about it
    with server, reminder(lambda: f"note: waiting for {count - len(names)} of {count} processes, at most {seconds:.0f} s in all."):
        while (told < count - 1 if invalid else len(names) < count) and time.monotonic() < deadline:
            if not select.select([server], [], [], _LOOK_SECONDS)[0]:
                continue
            line = _Line(server.accept()[0])
            try:
                hello = line.receive(time.monotonic() + _HELLO_SECONDS)
                index = _check_hello(hello, count, names)
            except OSError:  # not one of us
                line.close()
                continue
            except ConfigError as error:
                if invalid is None:
                    # Processes that come later are told, too. Without an answer, they would wait until their time limit.
                    invalid, deadline = error, min(deadline, time.monotonic() + _LATE_SECONDS)
                    _tell(lines, {"invalid": str(error)})
                    told = len(lines)
            else:
                if invalid is None:
                    lines[index], names[index] = line, f"{str(hello['name'])[:200]} (process {index})"
                    continue
            _tell({0: line}, {"invalid": str(invalid)})
            told += 1
    if invalid is not None:
        raise invalid
    if len(names) < count:
        known = expected_names(count)
        absent = ", ".join(
            f"{known[index]} (process {index})" if known else f"process {index}" for index in range(count) if index not in names
        )
        text = (
            f"{absent} did not appear within {seconds:.0f} s. Present: {', '.join(names[index] for index in sorted(names))}. Check that its"
            f" host is up, that its command was started with the same --coordinator, and that it reaches port {port} of process 0."
        )
        _tell(lines, {"absent": text})
        raise TemporaryError(text)
    ordered = [names[index] for index in range(count)]
    _tell(lines, ordered)
    return ordered, lines


def _tell(lines: dict[int, _Line], message: Any) -> None:
    for line in lines.values():
        with contextlib.suppress(OSError):  # the first exchange notices it
            line.send(message)


def _check_hello(hello: Any, count: int, names: dict[int, str]) -> int:
    """The index of a process that says hello. Raises ConnectionError if it is not one, ConfigError if it contradicts the others."""
    if not isinstance(hello, dict) or hello.get("magic") != _MAGIC or not isinstance(index := hello.get("index"), int):
        raise ConnectionError("not a process of a preflight")
    if hello.get("count") != count or not 0 < index < count:
        raise ConfigError(
            f"Process {index} on {hello.get('name')} was started with --num_processes={hello.get('count')}, process 0 with {count}. Give"
            " all the same number, and each a different --process_id from 0 to that number minus 1."
        )
    if index in names:
        raise ConfigError(f"Two processes have --process_id={index}: {names[index]} and one on {hello.get('name')}. Give each its own.")
    return index


def _reach_first(host: str, port: int, count: int, index: int, deadline: float, seconds: float) -> tuple[list[str], dict[int, _Line]]:
    """What the other processes do: connect to process 0, and wait until all have."""
    refused = ""
    first = f"process 0 at {host}:{port}"
    with reminder(lambda: f"note: waiting for {first} ({refused or 'it answers'}) and the others, at most {seconds:.0f} s in all."):
        while time.monotonic() < deadline:
            try:
                line = _Line(socket.create_connection((host, port), timeout=5))
            except OSError as error:
                refused = str(error)
                time.sleep(_LOOK_SECONDS)
                continue
            try:
                line.send({"magic": _MAGIC, "index": index, "count": count, "name": socket.gethostname()})
                answer = line.receive(deadline + 10)
            except OSError as error:  # something else listens there, or process 0 was just ending
                refused = f"it is reached, but {error}"
                line.close()
                time.sleep(_LOOK_SECONDS)
                continue
            if isinstance(answer, dict):
                raise TemporaryError(answer["absent"]) if "absent" in answer else ConfigError(str(answer.get("invalid")))
            return [str(name) for name in answer], {0: line}
    raise TemporaryError(
        f"Process 0 did not answer at {host}:{port} within {seconds:.0f} s ({refused or 'no answer'}). Check that it was started, that this"
        " host resolves its name, and that no firewall closes the port."
    )


def expected_names(count: int) -> list[str]:
    """Names of the hosts of all processes, by index, from the scheduler's environment; empty if it does not say."""
    if nodes := os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        names = nodes.split(",")
    else:
        names = expand_nodes(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", ""))
    return names if len(names) == count else []


def expand_nodes(nodes: str) -> list[str]:
    """The hosts of a list of Slurm, such as "gpu[01-03,7],login"."""
    found = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if last else [first]
            found += [f"{prefix}{number}{suffix}" for number in numbers]
    return found
