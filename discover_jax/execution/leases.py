"""What a slot has to itself as long as its executor lives: cores, and, for an executor that root started, a uid.

No two executors of this machine's root share a uid: each uid in use is a locked file in a folder that only root may enter. The kernel
lets go of a lock with its holder, so one that is killed leaves nothing to clean up. Cores are shared out within one executor only: two
runs on one machine keep out of each other's way by `taskset`, or a cpuset of the cluster's.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from discover_jax.exceptions import SandboxError

# In the range that systemd and Debian leave to nobody (60578 to 61183), so that no real user's processes or files are within reach.
UIDS = range(60_600, 61_180)
_PLACES = (Path("/run"), Path("/tmp"))  # not $TMPDIR, which differs between runs that must see each other


def lease_cores(cpus: Sequence[int], cores: int, workers: int | None) -> list[tuple[int, ...]]:
    """CPUs of each slot: `cores` each, no CPU in two slots unless more are asked for than there are.

    Args:
      cpus: those that this process may use.
      cores: wanted for each slot.
      workers: number of slots; None or 0: as many as fit, at least one.
    """
    cpus = sorted(cpus)
    slots = workers or max(1, len(cpus) // cores)
    size = min(cores, len(cpus))
    return [tuple(sorted(cpus[(slot * size + offset) % len(cpus)] for offset in range(size))) for slot in range(slots)]


def _folder() -> Path:
    """The folder of the locks, made if missing."""
    refused = []
    for place in _PLACES:
        folder = place / "discover_jax-uids"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:  # a read-only /run, as in some containers
            refused.append(str(error))
            continue
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise SandboxError(
                f"{folder} has owner {found.st_uid} and mode {stat.S_IMODE(found.st_mode):o}, so that others could hold the locks of uids"
                f" under which programs run. It must be a folder of uid {os.geteuid()} with mode 700: remove it, and look for who made it."
            )
        return folder
    raise SandboxError(
        f"There is no place for the locks that keep two runs from sharing a uid: {'; '.join(refused)}. Make /run or /tmp writable for root."
    )


@contextlib.contextmanager
def lease_uids(count: int) -> Iterator[list[int]]:
    """That many uids which no other executor that root started on this machine has now; given back at the context's end.

    Raises:
      SandboxError: not as many are free, or there is no place to note which are.
    """
    with contextlib.ExitStack() as held:
        folder, leased = _folder(), []
        for uid in UIDS:
            if len(leased) == count:
                break
            # Never unlinked: another might just have opened it, and lock what the next one then makes anew.
            descriptor = os.open(folder / str(uid), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            held.callback(os.close, descriptor)
            leased.append(uid)
        if len(leased) < count:
            raise SandboxError(
                f"{count} slots were asked for, and each needs a uid of its own: of the {len(UIDS)} from {UIDS[0]} on, {len(leased)} are"
                f" free (locks in {folder}). Set execution.workers to {max(1, len(leased))} or less, or wait until another run has ended."
            )
        yield leased
