"""The watcher of one process of a run. It is a separate process, so that it can report when the watched process is killed or aborts.

It uses only the standard library. All watchers connect to the watcher of process 0. A process is lost if its link closes without a goodbye
or is silent for `SILENCE_SECONDS`. A process that fails says why, and with which exit code. A watcher that learns of a loss or a failure
prints it to standard error, tells the others, and ends the process that it watches, with that exit code. It talks to that process over
standard input and output. Messages are lines of JSON.
"""

import contextlib
import hmac
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

PING_SECONDS = 5.0
SILENCE_SECONDS = 30.0
JOIN_SECONDS = 60.0
"""Time limit for all watchers to connect to the watcher of process 0."""
_LEAVING_SECONDS = 10.0
"""Time for the watched process to end by itself before it is killed."""
_LONGEST = 1 << 16
"""Maximum bytes of a message; a sender of more is not a watcher."""
_WITHOUT_A_WORD = "it ended without a message: killed, or out of memory"
_PARENT = os.getppid()


class Link:
    """Lines of JSON over a socket or a pair of pipes."""

    def __init__(self, reader: int, writer: int, held: Any = None):
        self._reader, self._writer, self._held = reader, writer, held
        self._buffer = b""
        self.heard = time.monotonic()
        self.open = True

    def fileno(self) -> int:
        return self._reader

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message. Ignores a closed link: `receive` detects it."""
        with contextlib.suppress(OSError):
            data = json.dumps(message).encode() + b"\n"
            while data:
                data = data[os.write(self._writer, data) :]

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived; sets `open` to whether more can arrive."""
        try:
            data = os.read(self._reader, _LONGEST)
        except OSError:
            data = b""
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.open = bool(data) and len(self._buffer) < _LONGEST
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.open = False
                break
            messages.append(message)
        return messages

    def close(self) -> None:
        if self._held is not None:
            self._held.close()


class Watcher:
    """The state of one watcher.

    Args:
      parent: link to the watched process.
      index, count: index of that process, and number of processes.
      token: secret shared by all watchers of the run.
      advice: how to resume the run; ends each message about a loss.
      after_a_failure: what to do; ends each message about a process that failed and said why.
      lost_code: exit code of processes that end because another one was lost without a message.
      closed_code: exit code of processes that end because the network between the watchers is closed.
    """

    def __init__(
        self, parent: Link, index: int, count: int, token: str, advice: str, after_a_failure: str, lost_code: int, closed_code: int
    ):
        self._parent, self._index, self._count, self._token = parent, index, count, token
        self._advice, self._after_a_failure, self._lost_code, self._closed_code = advice, after_a_failure, lost_code, closed_code
        self._server: socket.socket | None = None
        self._strangers: list[Link] = []  # connected to the server, not yet identified
        self._links: dict[int, Link] = {}  # by the index of the process at the other end
        self._names: dict[int, str] = {index: _name()}
        self._gone: set[int] = set()  # said goodbye
        self._left = False

    def listen(self) -> int:
        """Opens the server of process 0 and returns its port."""
        dual = socket.has_dualstack_ipv6()
        self._server = (
            socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) if dual else socket.create_server(("", 0))
        )
        return self._server.getsockname()[1]

    def join(self, addresses: list[str], port: int) -> None:
        """Connects to the watcher of process 0, at the first of its addresses that answers with the right token.

        Raises:
          OSError: no address answered within `JOIN_SECONDS`.
        """
        deadline, refused = time.monotonic() + JOIN_SECONDS, ""
        while time.monotonic() < deadline:
            for address in addresses:
                try:
                    held = socket.create_connection((address, port), timeout=5)
                    link = _link(held)
                    link.send({"hello": self._index, "token": self._token, "name": _name()})
                    if select.select([link], [], [], 5)[0]:
                        for message in link.receive():
                            if hmac.compare_digest(str(message.get("token")), self._token):
                                self._links[0], self._names[0] = link, str(message.get("name"))
                                return
                    held.close()
                except OSError as error:
                    refused = f"{address}: {error}"
            time.sleep(0.5)
        raise OSError(f"none of {', '.join(addresses)} answered at port {port} within {JOIN_SECONDS:g} s ({refused})")

    def run(self) -> None:
        """Watches until the run succeeds or fails."""
        pinged, began, ready = 0.0, time.monotonic(), False
        while not self._is_over():
            ready = ready or self._tell_ready()
            now = time.monotonic()
            if now - pinged > PING_SECONDS:
                pinged = now
                for link in self._links.values():
                    link.send({"ping": 1})
            links = [link for link in (self._parent, *self._links.values(), *self._strangers) if link.open]
            wanted = links + ([self._server] if self._server is not None else [])
            for source in select.select(wanted, [], [], 1.0)[0]:
                self._hear(source)
            for index, link in list(self._links.items()):
                if link.open and time.monotonic() - link.heard > SILENCE_SECONDS:
                    self._lose(index, f"no message from it for {SILENCE_SECONDS:g} s: its host or the network is down", self._lost_code)
            if not ready and self._server is not None and now - began > JOIN_SECONDS + 10:
                absent = [index for index in range(1, self._count) if index not in self._links and index not in self._gone]
                self._lose(absent[0], "its watcher could not reach the watcher of process 0. Check for a firewall.", self._closed_code)

    def _tell_ready(self) -> bool:
        known = set(self._links) | self._gone
        if self._server is not None and len(known) < self._count - 1:
            return False
        self._parent.send({"ready": 1})
        return True

    def _is_over(self) -> bool:
        """Whether the run succeeded in this process and, for process 0, in all others."""
        return self._left and (self._index != 0 or len(self._gone) == self._count - 1)

    def _hear(self, source: Any) -> None:
        if isinstance(source, socket.socket):
            held, _ = source.accept()
            self._strangers.append(_link(held))
            return
        messages = source.receive()
        if source is self._parent:
            self._hear_parent(messages)
            return
        if source in self._strangers:
            self._strangers.remove(source)
            self._welcome(source, messages)
            return
        index = next((index for index, link in self._links.items() if link is source), None)
        if index is None:
            return
        for message in messages:
            if "bye" in message:
                self._gone.add(index)
            elif "lost" in message:
                self._end(int(message["lost"]), str(message["name"]), str(message["why"]), int(message["code"]))
            elif "failed" in message:
                source.send({"heard": 1})
                self._lose(index, str(message["failed"]), int(message["code"]))
        if not source.open:
            del self._links[index]
            source.close()
            if index not in self._gone:
                self._lose(index, f"{_WITHOUT_A_WORD}, or its host is down", self._lost_code)

    def _welcome(self, link: Link, messages: list[dict[str, Any]]) -> None:
        hello = messages[0] if messages else {}
        index = hello.get("hello")
        known = hmac.compare_digest(str(hello.get("token")), self._token)
        if not known or not isinstance(index, int) or not 0 < index < self._count or index in self._links:
            link.close()
            return
        self._links[index], self._names[index] = link, str(hello.get("name"))
        link.send({"token": self._token, "name": _name()})

    def _hear_parent(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "done" in message:
                self._left = True
                for link in self._links.values():
                    link.send({"bye": 1})
                return
            if "failed" in message:
                self._tell_others(self._index, str(message["failed"]), int(message["code"]))
                self._parent.send({"told": 1})
                sys.exit(0)
        if not self._parent.open and not self._left:
            self._tell_others(self._index, _WITHOUT_A_WORD, self._lost_code)
            self._end_after_parent()

    def _end_after_parent(self) -> None:
        """Reports why the watched process is gone. If process 0 was lost first, that is the reason: jax then aborts the others."""
        deadline = time.monotonic() + _LEAVING_SECONDS
        while (link := self._links.get(0)) is not None and time.monotonic() < deadline:
            if not select.select([link], [], [], 0.1)[0]:
                continue
            messages = link.receive()
            if any("heard" in message for message in messages):
                break
            for message in messages:
                if "lost" in message:
                    self._end(int(message["lost"]), str(message["name"]), str(message["why"]), int(message["code"]))
            if not link.open:
                self._end(0, self._names[0], _WITHOUT_A_WORD, self._lost_code)
        why = f"{_WITHOUT_A_WORD}, or aborted by jax (see its message above)"
        self._say(self._index, self._names[self._index], why, self._lost_code)
        sys.exit(0)

    def _tell_others(self, index: int, why: str, code: int) -> None:
        for other, link in self._links.items():
            if self._index == 0:
                if other != index:
                    link.send({"lost": index, "name": self._names.get(index, "?"), "why": why, "code": code})
            else:
                link.send({"failed": why, "code": code})

    def _lose(self, index: int, why: str, code: int) -> None:
        """Tells all linked watchers that process `index` is lost or failed, and ends the watched process."""
        self._tell_others(index, why, code)
        self._end(index, self._names.get(index, "never seen"), why, code)

    def _end(self, index: int, name: str, why: str, code: int) -> None:
        """Prints which process was lost or failed, and ends the watched process with this exit code."""
        self._say(index, name, why, code)
        self._parent.send({"lost": index, "why": why, "code": code})
        deadline = time.monotonic() + _LEAVING_SECONDS
        while self._parent.open and time.monotonic() < deadline:
            if select.select([self._parent], [], [], 0.1)[0]:
                self._parent.receive()
        if self._parent.open:
            with contextlib.suppress(ProcessLookupError):
                if os.getppid() == _PARENT:  # otherwise it has already ended
                    os.kill(_PARENT, signal.SIGKILL)
        sys.exit(0)

    def _say(self, index: int, name: str, why: str, code: int) -> None:
        if code == self._lost_code:
            what, advice = "was lost", self._advice
        else:
            what, advice = "failed", f"All processes of the run end with its exit code, {code}. {self._after_a_failure}"
        print(f"error: process {index} of {self._count} ({name}) {what}: {why}\n{advice}", file=sys.stderr, flush=True)


def _name() -> str:
    return f"host {socket.gethostname()}, id {_PARENT}"


def _link(held: socket.socket) -> Link:
    held.settimeout(None)
    held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Link(held.fileno(), held.fileno(), held)


def main() -> None:
    """Reads its identity from standard input, reports its port (process 0) or that it is connected, and watches."""
    # The watched process handles signals to the whole group; the watcher ends after it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = Link(sys.stdin.fileno(), sys.stdout.fileno())
    order = json.loads(os.read(parent.fileno(), _LONGEST))
    addresses, port = order.pop("addresses", []), order.pop("port", 0)
    watcher = Watcher(parent, **order)
    if order["index"] == 0:
        parent.send({"port": watcher.listen()})
    else:
        try:
            watcher.join(addresses, port)
        except OSError as error:
            parent.send({"unreachable": str(error)})
            return
    watcher.run()


if __name__ == "__main__":
    main()
