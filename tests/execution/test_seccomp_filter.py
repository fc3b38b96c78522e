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
SETRLIMIT, PRLIMIT = (160, 164), (302, 261)
CLONE, CLONE3, SOCKET, IOCTL = (56, 220), (435, 435), (41, 198), (16, 29)


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

    assert {name: ask(pair) for name, pair in NUMBERS.items()} == {
        "read": ALLOW,
        "execve": ALLOW,
        "ptrace": EPERM,
        "mount": EPERM,
        "bpf": EPERM,
        "io_uring_setup": EPERM,
    }
    thread = 0x003D0F00  # the flags of pthread_create
    assert ask(CLONE, thread) == ALLOW
    assert ask(CLONE, 17) == ALLOW  # fork
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(CLONE, flag | 17) == EPERM
    assert ask(CLONE3, 0, 88) == ENOSYS
    assert [ask(SOCKET, family, 1) for family in (1, 2, 10, 16, 17, 40)] == [ALLOW] + [EPERM] * 5
    assert ask(SOCKET, 1 << 32 | 2, 1) == EPERM  # the kernel uses only the low word
    assert [ask(IOCTL, 0, request) for request in (0x5401, 0x5412, 0x541C, 1 << 32 | 0x5412)] == [ALLOW, EPERM, EPERM, EPERM]
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
