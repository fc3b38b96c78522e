"""Ends a run on all its hosts when one of its processes is lost, within half a minute and with a message that says which and why.

jax notices a loss, too, but by an abort with a stack trace, or, where a collective waits on a GPU, not before a heartbeat is missed; and it
says nothing of a process that failed by an error of its own. So each process has a `watcher`.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from discover_jax.exceptions import HostError
from discover_jax.hosts.processes import Processes

LOST = 3
"""Exit code of a process that ends because another one was lost."""
_TELLING_SECONDS = 10.0
_SAME_ERROR_SECONDS = 2.0
"""In which this process may come to the same error that another one ended by; twice that is less than the watcher waits for its end."""


class Watch:
    """Watches over the processes of a run from now on. All processes make theirs at the same time.

    Args:
      processes: of the run; there is nothing to watch if this one is alone.
      advice: how the run goes on after a loss, for the message.

    Raises:
      HostError: the watchers do not reach each other.
    """

    def __init__(self, processes: Processes, advice: str):
        self._watcher: subprocess.Popen[bytes] | None = None
        self._told, self._done = threading.Event(), False
        self._failure, self._failing = "", threading.Event()
        self._lost, self._leads = False, processes.leads
        if processes.count == 1:
            return
        token = processes.from_first(lambda: secrets.token_hex(16))
        order = {"index": processes.index, "count": processes.count, "token": token, "advice": advice}
        found = None
        if processes.leads:
            self._begin(order)
            found = {"addresses": _addresses(), "port": self._answer()["port"]}
        found = processes.from_first(lambda: found)
        if not processes.leads:
            self._begin(order | found)
        answer = self._answer()
        if "ready" not in answer:
            raise HostError(
                f"The watcher of process {processes.index} cannot reach that of process 0: {answer.get('unreachable', answer)}. The hosts"
                " of a run must reach each other on all ports; look for a firewall, and at the hosts' names."
            )
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def failed(self, reason: str) -> None:
        """Tells all others that this process ends, and why; they end, too. To be followed by the process's end.

        If this process failed only because another was lost, that is told first, and this call does not return. Where the others fail by
        the same error, such as a config that cannot be, each ends by its own.
        """
        if self._watcher is None:
            return
        self._failure = reason
        self._failing.set()
        if not self._told.wait(1.0):
            if self._lost:
                threading.Event().wait()  # `_listen` ends this process
            with contextlib.suppress(HostError):  # the error that counts is being told
                self._send({"failed": reason})
                self._told.wait(_TELLING_SECONDS)
        self._let_others_leave()

    def finished(self) -> None:
        """The run ended well in this process, and in all others."""
        if self._watcher is not None:
            self._done = True
            self._send({"done": 1})
            self._watcher.wait()

    def _begin(self, order: dict[str, Any]) -> None:
        script = str(Path(__file__).with_name("watcher.py"))
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
        )
        self._send(order)

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._watcher is not None, "there are others to watch"
        assert self._watcher.stdin is not None
        assert self._watcher.stdout is not None
        return self._watcher.stdin, self._watcher.stdout

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._pipes[0].write(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise HostError("The watcher of this process ended unexpectedly. Start the same command again on all hosts.") from error

    def _answer(self) -> dict[str, Any]:
        line = self._pipes[1].readline()
        if not line:
            raise HostError("The watcher of this process ended before it had begun. Start the same command again on all hosts.")
        return json.loads(line)

    def _listen(self) -> None:
        """Ends this process when the watcher says so, or is there no more. What is to be said of a loss, the watcher has said."""
        while line := self._pipes[1].readline():
            if "told" in (message := json.loads(line)):
                self._told.set()
            elif "lost" in message:
                self._lost = True
                self._failing.wait(_SAME_ERROR_SECONDS)
                if self._failure == message["why"]:
                    self._told.set()
                    return
                self._let_others_leave()
                os._exit(LOST)
        if not self._done and not self._told.is_set():
            print("error: The watcher of this process was killed. Start the same command again on all hosts.", file=sys.stderr, flush=True)
            os._exit(LOST)

    def _let_others_leave(self) -> None:
        """Process 0 goes last: without its service jax aborts all others, who were about to end in good order."""
        if self._leads:
            time.sleep(_SAME_ERROR_SECONDS + 0.5)


def _addresses() -> list[str]:
    """By which other hosts may reach this one; the loopback last, for processes on one host."""
    name, found = socket.gethostname(), []
    with contextlib.suppress(OSError):  # a host need not know its own name
        found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):  # there may be no way out
        probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel chooses the address of the way out
        found.append(probe.getsockname()[0])
    own = [address for address in found if not address.startswith("127.") and address != "::1"]
    return list(dict.fromkeys([*own, name, "127.0.0.1"]))
