"""The system call filter of the sandbox, as BPF bytes for bubblewrap's --seccomp.

The filter denies the calls in `_DENIED` with EPERM, and those in `_DENIED_VALUES` for some values of one argument: attacks use them,
numeric programs never need them. All others are allowed, with these exceptions. clone3 fails with ENOSYS, because its flags are in memory,
where a filter cannot read them; the C library then falls back to clone, whose flags are checked. The limit on core dumps cannot be changed:
see limits.CORE_BYTES. A call through another architecture's table (32-bit on a 64-bit kernel) kills the process.

Sources of the numbers: Linux' arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (aarch64). Layout of the
filter's input (struct seccomp_data): nr at 0, arch at 4, args[i] at 16 + 8 i, low word first on both architectures.
"""

import dataclasses
import platform
import struct

from discover_jax.exceptions import SandboxError

# BPF opcodes (linux/bpf_common.h): load word at absolute offset, jumps on a constant, return a constant.
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NR, _ARCH, _ARGS = 0, 4, 16

# All CLONE_NEW* flags that clone takes: mount, cgroup, uts, ipc, user, pid, net (linux/sched.h).
_NAMESPACE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_AF_UNIX = 1

# Name -> (x86_64, aarch64) number; None where the architecture has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes' memory and descriptors
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # kernel subsystems with a history of vulnerabilities
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    # shared resources: asynchronous contexts of the machine, inotify watches of the uid, write-back of the disks
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "sync": (162, 81),
    "syncfs": (306, 267),
    # the machine's memory for compiled filters: when it is used up, no sandbox starts (see also _DENIED_VALUES)
    "seccomp": (317, 277),
    # kernel memory that belongs to no process, or that not even a control group counts
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    # long loops over pages that ignore SIGKILL
    "mincore": (27, 232),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # memory that not even the kernel can read
    "memfd_secret": (447, 447),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    # the machine itself
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    # cores are leased exclusively: a program must not move to the cores of other slots
    "sched_setaffinity": (203, 122),
}
# Memory that belongs to no process while it is not mapped: only a control group counts it.
_UNSEEN_MEMORY: dict[str, tuple[int | None, int | None]] = {"memfd_create": (319, 279), "shmget": (29, 194)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_SETRLIMIT, _PRLIMIT = (160, 164), (302, 261)
_RLIMIT_CORE = 4
# Calls that are denied if the low word of an argument has one of these values: name -> (numbers, index of the argument, values).
_DENIED_VALUES: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # TIOCSTI and TIOCLINUX push characters into the terminal's input.
    "ioctl": ((16, 29), 1, (0x5412, 0x541C)),
    # PR_SET_PDEATHSIG: outliving the worker. PR_SET_SECCOMP: as seccomp. PR_SCHED_CORE: idle sibling threads of the CPU for its neighbours.
    "prctl": ((157, 167), 0, (1, 22, 62)),
    # SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_REUSEPORT_EBPF: as seccomp.
    "setsockopt": ((54, 208), 2, (26, 50, 51, 52)),
    # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW: no control group counts the memory of record locks (Linux 6.18: 190 bytes each), and a
    # file may have any number. F_SETLEASE delays others that open the file. F_NOTIFY is an older inotify.
    "fcntl": ((72, 25), 1, (6, 7, 37, 38, 1024, 1026)),
    "setrlimit": (_SETRLIMIT, 0, (_RLIMIT_CORE,)),
}
# Calls that are denied unless the low word of their first argument is AF_UNIX.
_ONLY_UNIX: dict[str, tuple[int, int]] = {"socket": (41, 198), "socketpair": (53, 199)}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    column: int
    audit: int  # AUDIT_ARCH_* of linux/audit.h


_ARCHITECTURES = {"x86_64": _Architecture(0, 0xC000003E), "aarch64": _Architecture(1, 0xC00000B7)}


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _load_argument(index: int, *, high: bool = False) -> bytes:
    return _instruction(_LOAD, _ARGS + 8 * index + 4 * high)


def filter_program(machine: str | None = None, *, unseen_memory: bool = True) -> bytes:
    """The filter as an array of struct sock_filter.

    Args:
      machine: "x86_64" or "aarch64"; None for this one.
      unseen_memory: False if no control group limits memory; the calls in `_UNSEEN_MEMORY` are then denied, too.

    Raises:
      SandboxError: the architecture is not supported.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise SandboxError(
            f"The sandbox has no system call filter for the architecture {machine!r}; supported: {', '.join(_ARCHITECTURES)}."
            " Run on one of these, or choose a weaker backend (execution.backend and execution.allow_weaker)."
        )
    arch = _ARCHITECTURES[machine]
    column = arch.column
    deny, allow = _instruction(_RETURN, _ERRNO | _EPERM), _instruction(_RETURN, _ALLOW)
    parts = [
        _instruction(_LOAD, _ARCH),
        _instruction(_JUMP_EQUAL, arch.audit, if_true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NR),
    ]
    if machine == "x86_64":  # numbers from 0x40000000 are the x32 table, which the list below does not cover
        parts += [_instruction(_JUMP_GREATER_EQUAL, 0x40000000, if_false=1), deny]
    for numbers in (_DENIED if unseen_memory else _DENIED | _UNSEEN_MEMORY).values():
        if (number := numbers[column]) is not None:
            parts += [_instruction(_JUMP_EQUAL, number, if_false=1), deny]
    parts += [_instruction(_JUMP_EQUAL, _CLONE3[column], if_false=1), _instruction(_RETURN, _ERRNO | _ENOSYS)]
    # Each of these blocks is skipped unless the number matches; if it matches, the block always returns.
    parts += [
        _instruction(_JUMP_EQUAL, _CLONE[column], if_false=4),
        _load_argument(0),
        _instruction(_JUMP_ANY_BIT, _NAMESPACE_FLAGS, if_false=1),
        deny,
        allow,
    ]
    for numbers in _ONLY_UNIX.values():
        parts += [
            _instruction(_JUMP_EQUAL, numbers[column], if_false=4),
            _load_argument(0),
            _instruction(_JUMP_EQUAL, _AF_UNIX, if_true=1),
            deny,
            allow,
        ]
    for numbers, argument, values in _DENIED_VALUES.values():
        parts += [_instruction(_JUMP_EQUAL, numbers[column], if_false=2 * len(values) + 2), _load_argument(argument)]
        for value in values:
            parts += [_instruction(_JUMP_EQUAL, value, if_false=1), deny]
        parts.append(allow)
    # prlimit can also read limits; its third argument, the address of new limits, is then 0 in both halves.
    parts += [
        _instruction(_JUMP_EQUAL, _PRLIMIT[column], if_false=8),
        _load_argument(1),
        _instruction(_JUMP_EQUAL, _RLIMIT_CORE, if_false=5),
        _load_argument(2),
        _instruction(_JUMP_EQUAL, 0, if_false=2),
        _load_argument(2, high=True),
        _instruction(_JUMP_EQUAL, 0, if_true=1),
        deny,
        allow,
    ]
    parts.append(allow)
    return b"".join(parts)
