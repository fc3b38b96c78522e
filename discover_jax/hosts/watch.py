"""Ends a run on all hosts within half a minute when a process is lost, with a message that names the process and the reason.

jax detects a loss as well, but it aborts with a stack trace, or waits for a missed heartbeat while a collective blocks on a GPU. It does
not report the error with which a process failed. So each process has a `watcher`.
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

from discover_jax.exceptions import HostError, TemporaryError
from discover_jax.hosts.exit_codes import LOST, USER_ERROR
from discover_jax.hosts.processes import Processes

_TELLING_SECONDS = 10.0
"""Time for a failure to reach the other processes."""
_SAME_ERROR_SECONDS = 2.0
"""Time for this process to raise the same error as another one that ended. Twice this is less than the watcher waits for the end."""
_AFTER_A_FAILURE = "Fix the cause, then start the same command again on all hosts: the run resumes at the last checkpoint."


class Watch:
    """Watches the processes of a run from its creation on. All processes create theirs at the same time.

    Args:
      processes: the processes of the run. With one process there is nothing to watch.
      advice: how to resume the run after a loss, for the message.

    Raises:
      HostError: the watchers cannot reach each other.
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
        order |= {"after_a_failure": _AFTER_A_FAILURE, "lost_code": LOST, "closed_code": USER_ERROR}
        found = None
        if processes.leads:
            self._begin(order)
            found = {"addresses": addresses(), "port": self._answer()["port"]}
        found = processes.from_first(lambda: found)
        if not processes.leads:
            self._begin(order | found)
        answer = self._answer()
        if "ready" not in answer:
            raise HostError(
                f"The watcher of process {processes.index} cannot reach that of process 0: {answer.get('unreachable', answer)}. The hosts"
                " of a run must reach each other on all ports. Check for a firewall and check the host names."
            )
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def failed(self, reason: str, code: int) -> None:
        """Tells all other processes that this one ends and why, so that they end with the same exit code. The caller must then end this
        process.

        If this process failed only because another one was lost, the loss is reported first, and this call does not return. If the others
        fail with the same error, such as an invalid config, each ends with its own.
        """
        if self._watcher is None:
            return
        self._failure = reason
        self._failing.set()
        if not self._told.wait(1.0):
            if self._lost:
                threading.Event().wait()  # `_listen` ends this process
            with contextlib.suppress(HostError):  # the original error is more important
                self._send({"failed": reason, "code": code})
                self._told.wait(_TELLING_SECONDS)
        self._let_others_leave()

    def finished(self) -> None:
        """The run succeeded in this process; waits for the others."""
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
        assert self._watcher is not None, "called only with several processes"
        assert self._watcher.stdin is not None
        assert self._watcher.stdout is not None
        return self._watcher.stdin, self._watcher.stdout

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._pipes[0].write(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise TemporaryError("The watcher of this process ended unexpectedly. Start the same command again on all hosts.") from error

    def _answer(self) -> dict[str, Any]:
        line = self._pipes[1].readline()
        if not line:
            raise TemporaryError("The watcher of this process ended before it was ready. Start the same command again on all hosts.")
        return json.loads(line)

    def _listen(self) -> None:
        """Ends this process when the watcher demands it or is gone. The watcher itself prints the message about a loss."""
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
                os._exit(message["code"])
        if not self._done and not self._told.is_set():
            print("error: The watcher of this process was killed. Start the same command again on all hosts.", file=sys.stderr, flush=True)
            os._exit(LOST)

    def _let_others_leave(self) -> None:
        """Process 0 exits last: without its service, jax aborts the other processes before they can exit cleanly."""
        if self._leads:
            time.sleep(_SAME_ERROR_SECONDS + 0.5)


def addresses() -> list[str]:
    """Addresses at which other hosts may reach this one. The loopback is last, for processes on one host."""
    name, found = socket.gethostname(), []
    with contextlib.suppress(OSError):  # a host may not resolve its own name
        found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):  # there may be no route
        probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel chooses the outgoing address
        found.append(probe.getsockname()[0])
    own = [address for address in found if not address.startswith("127.") and address != "::1"]
    return list(dict.fromkeys([*own, name, "127.0.0.1"]))
