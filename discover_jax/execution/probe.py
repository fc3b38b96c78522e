"""Runs inside a sandbox instead of the harness and reports what a hostile program could see and do. Uses only the standard library.

It uses the harness's protocol: `ready`, then the facts as JSON in place of the submission. canary.py checks them in the worker.
"""

import errno
import glob
import importlib.util
import json
import os
import signal
import socket
import sys
import time


def _attempt(action) -> str:
    """Runs `action` and returns "done" or the name of the error."""
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return "done"


def _connect() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        connection.connect(("127.0.0.1", 9))


def _leave_a_daemon() -> None:
    """Starts a process that tries to outlive the sandbox: it has its own session, ignores signals and keeps every pipe open."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, signal.NSIG):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):  # SIGKILL and SIGSTOP cannot be ignored; the C library reserves some numbers
                    continue
            time.sleep(3600)
        os._exit(0)
    os.wait()


def facts(options: dict) -> dict:
    """What a program can see and do in this sandbox."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    with open("/proc/net/dev") as file:
        interfaces = [line.split(":")[0].strip() for line in file if ":" in line]
    own = int(os.readlink(f"/proc/self/fd/{options['result_fd']}").rpartition("[")[2].rstrip("]"))
    return {
        "seen": [path for path in options["hidden"] if os.path.lexists(path)],
        "write_data": _attempt(lambda: open("data/.probe", "w").close()),
        "write_root": _attempt(lambda: open("/.probe", "w").close()),
        "write_python": _attempt(lambda: open(os.path.join(sys.prefix, ".probe"), "w").close()),
        "write_core_pattern": _attempt(lambda: open("/proc/sys/kernel/core_pattern", "r+").close()),
        "open_init": _attempt(lambda: open("/proc/1/mem", "r+b").close()),
        "read_data": len(os.listdir("data")),
        "socket": _attempt(_connect),
        "interfaces": interfaces,
        "capabilities": sorted({status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}),
        "no_new_privs": status["NoNewPrivs"].strip(),
        "seccomp": status["Seccomp"].strip(),
        "uid": os.getuid(),
        "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "environment": sorted(os.environ),
        "descriptors": sorted(
            os.readlink(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{name}") and int(name) > 2 and not os.readlink(f"/proc/self/fd/{name}").endswith(f"[{own}]")
        ),
        "accelerators": sorted(glob.glob("/dev/nvidia*") + glob.glob("/dev/accel*") + glob.glob("/dev/dri*") + glob.glob("/dev/kfd*")),
        "cpus": sorted(os.sched_getaffinity(0)),
        "packages": [name for name in ("numpy", "pandas") if importlib.util.find_spec(name)],
    }


def main(options: dict) -> None:
    os.write(options["result_fd"], b"ready\n")
    sys.stdin.read()
    _leave_a_daemon()
    data = json.dumps(facts(options)).encode()
    os.write(options["result_fd"], b"csv - %d\n%s" % (len(data), data))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
