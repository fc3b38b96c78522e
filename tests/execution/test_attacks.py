"""Attacks by hostile programs, one per test, through the real launch path. A neighbour runs after each and must get its usual score.

test_isolation.py tests what is refused, and test_outcomes.py how programs can end.
All programs are submitted to one pool together, since they mostly wait. Each program is followed by a neighbour in the other slot.
Attacks that leave their sandbox as it was are carried out by one program, one after the other.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import platform
import re
import socket
import time
from pathlib import Path

import pytest
from tiny_competition import GOOD, GOOD_SCORE, GOOD_WITH_PANDAS, LIMITS, PANDAS

from discover_jax.execution import Executor, memory
from discover_jax.types import Outcome, Verdict

pytestmark = pytest.mark.sandbox

_NO_ACCESS = "EPERM|EACCES"
_REFUSED = ("EPERM", "EACCES", "EROFS", "ENOENT", "EINVAL")
_HELPERS = """
import ctypes, errno, fcntl, mmap, os, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*numbers):
    ctypes.set_errno(0)
    result = libc.syscall(*map(ctypes.c_long, numbers))
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
BUFFER = ctypes.create_string_buffer(b"x", 1)
ADDRESS = ctypes.addressof(BUFFER)
# A BPF program of one instruction: allow everything.
CODE = ctypes.create_string_buffer(bytes.fromhex("060000000000ff7f"), 8)
FILTER = struct.pack("@HP", 1, ctypes.addressof(CODE))
PROGRAM = ctypes.create_string_buffer(FILTER, len(FILTER))
FILE = os.open("locked", os.O_CREAT | os.O_RDWR)
"""


@dataclasses.dataclass(frozen=True)
class Attack:
    """A program, its allowed outcomes, and a pattern that must occur in its output, the detail or the reason.

    `attempts` is the expression of an attack that leaves its sandbox as it was. `ends` puts all of these into one program.
    """

    program: str
    ends: tuple[Outcome, ...]
    said: str = ""
    attempts: str = ""


def _body(text: str) -> str:
    """A program whose run() has these lines."""
    return _HELPERS + "def run():\n" + "".join(f"    {line}\n" for line in text.strip("\n").split("\n"))


def _says(expression: str, said: str) -> Attack:
    """A program that prints the value of an expression, then returns a valid submission."""
    return Attack(_HELPERS + f"print('found', {expression})\n" + GOOD, (Outcome.OK,), f"found ({said})")


def _tries(expression: str, said: str) -> Attack:
    """An attack that leaves its sandbox as it was; `said` is the pattern of its value."""
    return Attack("", (Outcome.OK,), f"({said})\n", expression)


_ANY_REFUSAL = "|".join(_REFUSED)
# A control group bounds all of this. Without one, the limit of a process or the system call filter may come first.
_OUT_OF_MEMORY = (Outcome.OUT_OF_MEMORY,) if memory.find_cgroups() else (Outcome.OUT_OF_MEMORY, Outcome.EXCEPTION)
_NO_MEMORY = "GiB of memory|Cannot allocate memory|MemoryError|Operation not permitted"
_X86 = platform.machine() == "x86_64"

ATTACKS = {
    # --- against memory
    "anonymous memory": Attack(_body("hold = []\nwhile True:\n    hold.append(bytearray(b'x') * 50_000_000)"), (Outcome.OUT_OF_MEMORY,)),
    "shared anonymous memory": Attack(
        _body("m = mmap.mmap(-1, 2 << 30)\nfor at in range(0, 2 << 30, 4096):\n    m[at] = 1"), _OUT_OF_MEMORY, _NO_MEMORY
    ),
    "memory of a memfd": Attack(
        _body("for _ in range(40):\n    fd = os.memfd_create('x')\n    os.write(fd, b'x' * (50 << 20))\ntime.sleep(30)"),
        _OUT_OF_MEMORY,
        _NO_MEMORY,
    ),
    "memory of many processes": Attack(
        _body(
            "for _ in range(20):\n    if os.fork() == 0:\n        hold = b'x' * (100 << 20)\n        time.sleep(30)\n"
            "        os._exit(0)\ntime.sleep(30)"
        ),
        (Outcome.OUT_OF_MEMORY,),
    ),
    "files in scratch, /tmp and /dev/shm": _says(
        "[attempt(lambda: open(path, 'wb').write(bytes(300 << 20))) for path in ('big', '/tmp/big', '/dev/shm/big')]",
        re.escape("['ENOSPC', 'ENOSPC', 'ENOSPC']"),
    ),
    "a sparse file of a terabyte": _tries("attempt(lambda: os.truncate(os.open('s', os.O_CREAT | os.O_RDWR), 1 << 40))", "EFBIG"),
    "a million empty files": Attack(
        _body("for number in range(1_000_000):\n    os.mknod(f'f{number}')\nraise RuntimeError('all made')"),
        (Outcome.EXCEPTION, Outcome.OUT_OF_MEMORY, Outcome.TIMEOUT),  # the last on a busy machine
    ),
    "folders ten thousand deep": _says("[(os.mkdir('d'), os.chdir('d')) for _ in range(10_000)] and os.chdir('/sandbox')", "None"),
    "protection from the OOM killer": _tries(
        "attempt(lambda: os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000'))", _ANY_REFUSAL
    ),
    # --- against processes
    "threads without end": Attack(
        _body("while True:\n    threading.Thread(target=time.sleep, args=(30,), daemon=True).start()"),
        (Outcome.EXCEPTION,),
        "can't start new thread",
    ),
    "killing pid 1 and all others": _says("[attempt(lambda: os.kill(1, 9)), attempt(lambda: os.kill(-1, 9))]", r"\['(done|EPERM)'"),
    "stopping itself": Attack(_body("os.kill(os.getpid(), signal.SIGSTOP)"), (Outcome.TIMEOUT,)),
    "the memory of pid 1": _tries(
        "[attempt(lambda: os.open('/proc/1/' + name, mode)) for name in ('mem', 'task/1/mem', 'maps', 'environ') for mode in (0, 2)]",
        rf"\[('({_NO_ACCESS})'(, )?){{8}}\]",
    ),
    # The same on its own memory works, so the attack on pid 1 would.
    "its own memory": _tries("(os.pwrite(os.open('/proc/self/mem', os.O_RDWR), b'y', ADDRESS), BUFFER.raw)", re.escape("(1, b'y')")),
    "outliving the worker": _tries(
        "[libc.prctl(1, 0, 0, 0, 0), *(attempt(lambda: os.kill(1, number)) for number in (9, 2, 15, 19))]", r"\[-1, .*"
    ),
    "real-time priority": _tries("attempt(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)))", "EPERM"),
    "a better nice value": _tries("attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, -10))", "EACCES|EPERM"),
    "recursion that smashes the stack": Attack(
        _body("sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6):\n    x = [x]\nrepr(x)"),
        (Outcome.KILLED, Outcome.EXCEPTION),  # newer interpreters count C frames separately
    ),
    "threads that continue after run()": Attack(
        "import threading\ndef spin():\n    while True:\n        pass\nthreading.Thread(target=spin).start()\n" + GOOD, (Outcome.OK,)
    ),
    "an exit handler that never ends": Attack("import atexit, time\natexit.register(time.sleep, 60)\n" + GOOD, (Outcome.OK,)),
    # --- against the kernel's tables
    "descriptors without end": Attack(
        _body("hold = []\nwhile True:\n    hold.append(os.open('/dev/null', 0))"), (Outcome.EXCEPTION,), "Too many"
    ),
    "buffers of pipes": Attack(
        _body(
            "import fcntl\nfor _ in range(400):\n    r, w = os.pipe()\n    os.set_blocking(w, False)\n"
            "    attempt(lambda: fcntl.fcntl(w, 1031, 1 << 20))\n"
            "    attempt(lambda: os.write(w, bytes(1 << 20)))\nraise RuntimeError('filled')"
        ),
        (Outcome.EXCEPTION, Outcome.OUT_OF_MEMORY),
    ),
    "watches, asynchronous contexts and write-back": _tries(
        f"[{', '.join(f'call({number}, 0)' for number in ((294, 206, 162, 306, 447) if _X86 else (26, 0, 81, 267, 447)))}]",
        re.escape(str(["EPERM"] * 5)),
    ),
    "the limit on core dumps": _tries(
        f"[resource.getrlimit(resource.RLIMIT_CORE)[0], call({160 if _X86 else 164}, 4, 0), call({302 if _X86 else 261}, 0, 4, 8, 0)]",
        r"\[[01], 'EPERM', 'EPERM'\]",
    ),
    "pseudo-terminals": _tries("[attempt(os.openpty), attempt(lambda: os.open('/dev/pts/ptmx', os.O_RDWR))]", r"\['ENOENT', 'ENOENT'\]"),
    # One call each: thousands of these would stop the machine.
    "filters of sockets and of system calls": _tries(
        "[attempt(lambda: socket.socket(socket.AF_UNIX).setsockopt(socket.SOL_SOCKET, option, FILTER)) for option in (26, 50, 51, 52)]"
        f" + [call({317 if _X86 else 277}, 1, 0, ctypes.addressof(PROGRAM)),"
        f" call({157 if _X86 else 167}, 22, 2, ctypes.addressof(PROGRAM))]",
        re.escape(str(["EPERM"] * 6)),
    ),
    "semaphores, queues and memory policies": _tries(
        f"[{', '.join(f'call({number}, 0, 1, 0o1600)' for number in ((64, 68, 240, 237, 238) if _X86 else (190, 186, 180, 235, 237)))}]",
        re.escape(str(["EPERM"] * 5)),
    ),
    "loops over pages that ignore signals": _tries(
        f"[{', '.join(f'call({number}, 0, 0, 0, 0, 0, 0)' for number in ((27, 279, 256) if _X86 else (232, 239, 238)))}]",
        re.escape(str(["EPERM"] * 3)),
    ),
    "locks of records, leases and notes about files": _tries(
        "[attempt(lambda: fcntl.lockf(FILE, fcntl.LOCK_EX, 1, 2)), attempt(lambda: fcntl.fcntl(FILE, 1024, 0)),"
        " attempt(lambda: fcntl.fcntl(os.open('data', 0), 1026, 1)), attempt(lambda: fcntl.flock(FILE, fcntl.LOCK_EX))]",
        re.escape("['EPERM', 'EPERM', 'EPERM', 'done']"),
    ),
    "pairs of sockets of other families": _tries(
        "[attempt(lambda: socket.socketpair(family, kind)) for family, kind in ((1, 1), (30, 1), (30, 5), (38, 1), (2, 1))]",
        re.escape(str(["done"] + ["EPERM"] * 4)),
    ),
    "address space without end": _tries("attempt(lambda: mmap.mmap(-1, 12 << 40, flags=0x4022))", "ENOMEM"),
    "the host's path of the data": _tries(
        "[line for line in open('/proc/self/mountinfo') if '/data ' in line] + [line.split()[3] for line in open('/proc/self/mountinfo')"
        " if '/harness.py ' in line]",
        r"\[.*'[\d: ]+ data data .*'harness/harness.py'\]",
    ),
    "the kernel's command line": _tries("attempt(lambda: open('/proc/cmdline').read())", _NO_ACCESS),
    "magic keys, the clock and the host's name": _tries(
        "[attempt(lambda: os.write(os.open('/proc/sysrq-trigger', os.O_WRONLY), b'b')), attempt(lambda: time.clock_settime(0, 0.0)),"
        " attempt(lambda: socket.sethostname('x'))]",
        rf"\['({_ANY_REFUSAL})', '({_ANY_REFUSAL})', '({_ANY_REFUSAL})'\]",
    ),
    "devices made by itself": _tries("attempt(lambda: os.mknod('disk', 0o60666, os.makedev(8, 0)))", "EPERM"),
    "becoming another user by a setuid file": _tries(
        "(os.close(os.open('s', os.O_CREAT)), os.chmod('s', 0o6777)) and attempt(lambda: os.chown('s', 0, 0))", "EPERM|EINVAL"
    ),
    # --- against the host
    "a socket of the host by its abstract name": _tries(
        "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0discover-jax-test'))", "ECONNREFUSED"
    ),
    "the host's folders through /proc": _tries(
        "[attempt(lambda: os.listdir(os.path.join('/proc', *path))) for path in (('1', 'root'), ('1', 'cwd'), ('self', 'root', 'boot'))]",
        rf"\['({_NO_ACCESS})', '({_NO_ACCESS})', 'ENOENT'\]",
    ),
    "links out of the scratch folder": Attack(
        _body("os.symlink('/etc/shadow', 'link')\nos.rename('solution.py', 'old')\nos.symlink('/etc/passwd', 'solution.py')\n1 / 0"),
        (Outcome.EXCEPTION,),
        "ZeroDivisionError",
    ),
    # --- against the reply
    "closing the reply's descriptor": Attack(_body("os.closerange(3, 1024)\nreturn 1"), (Outcome.EXCEPTION, Outcome.KILLED)),
    "answering, then hanging": Attack(
        _body("for fd in range(3, 64):\n    attempt(lambda: os.write(fd, b'csv - 5\\nid,y\\n'))\ntime.sleep(60)"), (Outcome.TIMEOUT,)
    ),
    "a length that overflows": Attack(
        _body("for fd in range(3, 64):\n    attempt(lambda: os.write(fd, b'csv - 99999999999999999999\\n'))\nos._exit(0)"),
        (Outcome.EXCEPTION,),
    ),
    "numbers of a hundred thousand digits": Attack(
        f"{PANDAS}def run():\n    return pd.DataFrame({{'id': ['1' * 100_000] * 4, 'y': ['9' * 100_000] * 4}})\n",
        (Outcome.INVALID_SUBMISSION,),
    ),
    "an object that lies about its class": Attack(
        "import pandas as pd\nclass L:\n    __class__ = pd.DataFrame\n    def to_csv(self, *a, **k):\n        return 'id,y'\n"
        "def run():\n    return L()\n",
        (Outcome.INVALID_SUBMISSION,),
        "returned L, not a pandas.DataFrame",
    ),
    "a frame with a method of its own": Attack(
        GOOD_WITH_PANDAS.replace(
            "return frame", "object.__setattr__(frame, 'to_csv', lambda *a, **k: open('/proc/self/mem'))\n    return frame"
        ),
        (Outcome.OK,),
    ),
    "the harness's own modules replaced": Attack(
        "import sys\nfor name in ('io', 'os', 'traceback', 'linecache', 'contextlib', 'builtins'):\n    sys.modules[name] = None\n"
        "def run():\n    1 / 0\n",
        (Outcome.EXCEPTION,),
    ),
    "escape sequences in output": Attack(
        "print('\\x1b[2J\\x1b]0;title\\x07', flush=True)\ndef run():\n    raise ValueError('\\x1b[31mred\\x9b')\n",
        (Outcome.EXCEPTION,),
        "ValueError: red\N{REPLACEMENT CHARACTER}$",
    ),
    "tracing every line": Attack("import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n" + GOOD, (Outcome.OK,)),
    "ten megabytes of source": Attack(f"x = '{'a' * 10_000_000}'\n" + GOOD, (Outcome.OK,)),
    "brackets a hundred thousand deep": Attack("x = " + "(" * 100_000 + "\n" + GOOD, (Outcome.EXCEPTION,), "too many nested"),
}
if _X86:
    # int 0x80 with the number of getpid: a system call through the 32-bit table. The filter kills a process that uses it.
    ATTACKS["system calls of another architecture"] = Attack(
        _body(
            "code = mmap.mmap(-1, 4096, prot=7)\ncode.write(bytes.fromhex('b814000000cd80c3'))\n"
            "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()"
        ),
        (Outcome.KILLED,),
        "SIGSYS",
    )


def _workers() -> set[int | None]:
    """The worker processes of all executors of this process."""
    return {child.pid for child in multiprocessing.active_children() if child.name.startswith("execution-")}


@pytest.fixture(scope="module")
def attacked(task, tmp_path_factory):
    """A pool like the shared one, with a shorter time limit."""
    limits = dataclasses.replace(LIMITS, seconds=10)
    others = _workers()
    with Executor([task], limits, workers=2, cache_dir=tmp_path_factory.mktemp("attacks")) as pool:
        while len(_workers() - others) < 2:  # so that `ends` can check that they survive
            time.sleep(0.01)
        yield pool


@pytest.fixture(scope="module")
def ends(attacked) -> dict[str, tuple[Verdict, Verdict]]:
    """The verdicts of each attack and of its neighbour. The worker processes must stay the same throughout."""
    workers = _workers()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0discover-jax-test")
        listener.listen()
        together = "".join(f"print({name!r}, 'found', {a.attempts})\n" for name, a in ATTACKS.items() if a.attempts)
        programs = {name: a.program or _HELPERS + together + GOOD for name, a in ATTACKS.items()}
        beside = {program: f"{GOOD}# beside {name}\n" for name, program in programs.items()}
        futures = {program: (attacked.submit(program), attacked.submit(neighbour)) for program, neighbour in beside.items()}
        ended = {program: tuple(future.result(timeout=300) for future in both) for program, both in futures.items()}
        found = {name: ended[program] for name, program in programs.items()}
    assert _workers() == workers
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_has_its_outcome_and_its_neighbour_is_scored(ends, name):
    attack, (verdict, neighbour) = ATTACKS[name], ends[name]
    told = f"{verdict.execution.stdout}\n{verdict.execution.detail}\n{verdict.grade.reason}"
    assert verdict.outcome in attack.ends, told
    said = f"{re.escape(name)} found {attack.said}" if attack.attempts else attack.said
    assert re.search(said, told), told
    assert (neighbour.outcome, neighbour.grade.score) == (Outcome.OK, GOOD_SCORE)
    # An attack gets the score of its submission: none, unless it returned the good one.
    assert verdict.grade.score == (GOOD_SCORE if Outcome.OK in attack.ends else None)


def test_attacks_leave_nothing_behind(ends, attacked, spec):
    assert ends
    assert attacked.submit(f"{GOOD}# after everything\n").result(timeout=60).grade.score == GOOD_SCORE
    workers = _workers()
    parents, boxes = {}, []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[pid] = int(parent)
                if b"/harness.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    boxes.append(pid)
    mine = [pid for pid in boxes if _descends(pid, workers, parents)]
    # Each pool of these tests has two slots. Each slot keeps one warm sandbox: bubblewrap outside, bubblewrap inside, and the harness.
    assert len(workers) <= 4
    assert len(mine) <= 3 * len(workers), mine
    if spec.cgroups is not None:
        groups = [group for pid in workers for group in spec.cgroups.memory.glob(f"discover_jax-{pid}-*")]
        assert len(groups) <= 2 * len(workers), groups


def _descends(pid: int, ancestors: set[int | None], parents: dict[int, int]) -> bool:
    while pid in parents:
        if pid in ancestors:
            return True
        pid = parents[pid]
    return False
