"""Whether all hosts reach each other at ports that the operating system chooses, as watchers, NCCL and Gloo do."""

import concurrent.futures
import contextlib
import secrets
import socket
import threading
from collections.abc import Iterator

from discover_jax.hosts.meeting import Meeting
from discover_jax.hosts.watch import addresses
from discover_jax.preflight.findings import Finding, Level

_CONNECT_SECONDS = 4.0
_SECONDS = 60.0
_AT_ONCE = 16


@contextlib.contextmanager
def listener(answer: bytes) -> Iterator[int]:
    """A server at a port that the operating system chooses, which sends `answer` to whoever connects. Yields the port."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("::" if dual else "", 0), family=family, dualstack_ipv6=dual, backlog=256) as server:

        def serve() -> None:
            while True:
                try:
                    held, _ = server.accept()
                    with held:
                        held.sendall(answer)
                except OSError:  # closed, or the other end left
                    if server.fileno() < 0:
                        return

        threading.Thread(target=serve, name="ports", daemon=True).start()
        yield server.getsockname()[1]
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes `accept`


def check_ports(meeting: Meeting) -> Finding:
    """Connects to every other process. All processes must call this."""
    token = secrets.token_hex(8)
    with listener(token.encode()) as port:
        others = meeting.gather("ports", {"addresses": addresses(), "port": port, "token": token}, _SECONDS)
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            refused = list(pool.map(lambda index: _refused(meeting.index, index, others[index]), range(meeting.count)))
        meeting.gather("ports", None, _SECONDS)  # before any listener closes
    problems = [f"{meeting.names[index]} ({text})" for index, text in enumerate(refused) if text]
    if not problems:
        return Finding("ports", Level.OK, f"all {meeting.count} hosts reach each other" if meeting.count > 1 else "one process needs none")
    text = (
        f"This host does not reach {', '.join(problems)}. All hosts must reach each other at all TCP ports: watchers, jax, NCCL and"
        " Gloo use ports that the operating system chooses. Open them in the firewall (Kubernetes: the NetworkPolicy; Google Cloud: a rule"
        " for the subnet), and check the host names."
    )
    return Finding("ports", Level.FIX, text, f"{len(problems)} closed")


def _refused(mine: int, index: int, other: dict) -> str:
    """Why a process cannot be reached; empty if it can."""
    if mine == index:
        return ""
    problem = ""
    for address in other["addresses"]:
        try:
            with socket.create_connection((address, other["port"]), timeout=_CONNECT_SECONDS) as held:
                if held.recv(64).decode(errors="replace") == other["token"]:
                    return ""
                problem = problem or f"{address} port {other['port']}: another program answers"
        except OSError as error:
            problem = problem or f"{address} port {other['port']}: {error}"
    return problem
