"""`discover_jax.doctor` with the faults that the environment variable DISCOVER_TEST_FAULTS names, separated by commas."""

import contextlib
import errno
import os
import socket

from discover_jax import cli, doctor
from discover_jax.files import NoLocksError
from discover_jax.preflight import all_hosts, one_host, ports
from discover_jax.runs import lock


@contextlib.contextmanager
def _closed(answer):
    """A port that nobody can reach."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    yield port


def _no_locks(descriptor, folder):
    reason = os.strerror(errno.ENOSYS)
    raise NoLocksError(errno.ENOSYS, f"The file system of {folder} has no file locks (flock: {reason}).")


if __name__ == "__main__":
    faults = os.environ.get("DISCOVER_TEST_FAULTS", "").split(",")
    if "packages" in faults:
        known = one_host.packages
        one_host.packages = lambda: [*known(), "numpy==0.1"]
    if "port" in faults:
        ports.listener = _closed
    if "lock" in faults:
        lock.try_flock = _no_locks  # not for the uids of sandboxes
    if "dies" in faults:
        ports.check_ports = lambda meeting: os._exit(9)
    all_hosts.MEET_SECONDS = float(os.environ.get("DISCOVER_TEST_MEET_SECONDS", all_hosts.MEET_SECONDS))
    cli.launch(doctor.run, preflight=cli.Preflight(all_hosts.run, all_hosts.tell_failure))
