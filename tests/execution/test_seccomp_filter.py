"""The filter's bytes, run by a small BPF interpreter, for both architectures. test_isolation.py tests the kernel on this architecture."""

import struct

import pytest

from discover_jax.exceptions import SandboxError
from discover_jax.execution.seccomp import filter_program

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028
# name -> numbers on x86_64 and aarch64, from the kernel's tables
NUMBERS = {"read": (0, 63), "execve": (59, 221), "ptrace": (101, 117), "mount": (165, 40), "bpf": (321, 280), "io_uring_setup": (425, 425)}
# Quotas of the kernel that no control group counts, and loops in the kernel that SIGKILL does not end.
NUMBERS |= {"seccomp": (317, 277), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "mincore": (27, 232)}
NUMBERS |= {"move_pages": (279, 239), "migrate_pages": (256, 238), "mbind": (237, 235), "set_mempolicy": (238, 237)}
SETRLIMIT, PRLIMIT = (160, 164), (302, 261)
CLONE, CLONE3, SOCKET, IOCTL = (56, 220), (435, 435), (41, 198), (16, 29)
SOCKETPAIR, SETSOCKOPT, PRCTL, FCNTL = (53, 199), (54, 208), (157, 167), (72, 25)


def verdict(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """The result of this classic BPF program for one system call."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    code = [struct.unpack_from("<HBBI", program, offset) for offset in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        operation, if_true, if_false, constant = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif operation == 0x06:
            return constant
        else:
            holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_filter(machine, column):
    program, audit = filter_program(machine), AUDIT[machine]
    assert len(program) % 8 == 0
    assert len(program) // 8 <= 4096  # BPF_MAXINSNS

    def ask(pair, *arguments):
        return verdict(program, audit, pair[column], *arguments)

    assert {name: ask(pair) for name, pair in NUMBERS.items()} == {name: ALLOW if name in ("read", "execve") else EPERM for name in NUMBERS}
    thread = 0x003D0F00  # the flags of pthread_create
    assert ask(CLONE, thread) == ALLOW
    assert ask(CLONE, 17) == ALLOW  # fork
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(CLONE, flag | 17) == EPERM
    assert ask(CLONE3, 0, 88) == ENOSYS
    assert [ask(SOCKET, family, 1) for family in (1, 2, 10, 16, 17, 40)] == [ALLOW] + [EPERM] * 5
    assert ask(SOCKET, 1 << 32 | 2, 1) == EPERM  # the kernel uses only the low word
    assert [ask(IOCTL, 0, request) for request in (0x5401, 0x5412, 0x541C, 1 << 32 | 0x5412)] == [ALLOW, EPERM, EPERM, EPERM]
    assert [ask(SOCKETPAIR, family, 1) for family in (1, 2, 16, 30, 38)] == [ALLOW] + [EPERM] * 4
    assert ask(SOCKETPAIR, 1 << 32 | 2, 1) == EPERM
    # SO_SNDBUF, SO_PASSCRED, then the four options that attach a filter
    assert [ask(SETSOCKOPT, 3, 1, option) for option in (7, 16, 26, 50, 51, 52, 1 << 32 | 26)] == [ALLOW] * 2 + [EPERM] * 5
    # PR_SET_NAME, PR_SET_DUMPABLE, PR_GET_PDEATHSIG, then PR_SET_PDEATHSIG, PR_SET_SECCOMP and PR_SCHED_CORE
    assert [ask(PRCTL, option) for option in (15, 4, 2, 1, 22, 62, 1 << 32 | 1)] == [ALLOW] * 3 + [EPERM] * 4
    # F_GETFL, F_GETLK, F_SETPIPE_SZ, then locks of records, F_SETLEASE and F_NOTIFY
    assert [ask(FCNTL, 3, command) for command in (3, 5, 1031, 6, 7, 37, 38, 1024, 1026)] == [ALLOW] * 3 + [EPERM] * 6
    # RLIMIT_CORE is 4, RLIMIT_AS 9; prlimit with a null pointer only reads.
    assert [ask(SETRLIMIT, limit, 1) for limit in (4, 9)] == [EPERM, ALLOW]
    assert [ask(PRLIMIT, 0, *rest) for rest in ((4, 0), (4, 1), (4, 1 << 32), (9, 1))] == [ALLOW, EPERM, EPERM, ALLOW]
    for other in (I386, ARM, *(set(AUDIT.values()) - {audit})):
        assert verdict(program, other, 0) == KILL


def test_memory_without_an_owner_is_denied_without_a_control_group():
    memfd_create, shmget = 319, 29
    for bounded, expected in ((True, ALLOW), (False, EPERM)):
        program = filter_program("x86_64", unseen_memory=bounded)
        assert [verdict(program, AUDIT["x86_64"], number, 0) for number in (memfd_create, shmget)] == [expected] * 2


def test_x32_calls_are_denied():
    program = filter_program("x86_64")
    assert verdict(program, AUDIT["x86_64"], 0x40000000 | 101) == EPERM
    assert verdict(program, AUDIT["x86_64"], 0x3FFFFFFF) == ALLOW


def test_unknown_architecture_is_refused():
    with pytest.raises(SandboxError, match="riscv64"):
        filter_program("riscv64")
