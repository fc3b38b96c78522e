"""Exclusive resources of a slot while its executor lives: cores and, if root started the executor, a uid.

No two executors of root on one machine share a uid: each uid in use is a locked file in a folder that only root may enter. The kernel
releases the lock when its holder ends, so a killed process leaves nothing to clean up. Cores are divided within one executor only: to
separate two runs on one machine, use `taskset` or a cpuset of the cluster.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.files import try_flock

# Within the range that systemd and Debian leave unassigned (60578 to 61183), so that no real user has these uids.
UIDS = range(60_600, 61_180)
_PLACES = (Path("/run"), Path("/tmp"))  # not $TMPDIR, which differs between runs that must see each other


def lease_cores(cpus: Sequence[int], cores: int, workers: int | None) -> list[tuple[int, ...]]:
    """The CPUs of each slot: `cores` each. Slots share CPUs only if there are too few.

    Args:
      cpus: CPUs that this process may use.
      cores: number of CPUs for each slot.
      workers: number of slots; None or 0: as many as fit, at least one.
    """
    cpus = sorted(cpus)
    slots = workers or max(1, len(cpus) // cores)
    size = min(cores, len(cpus))
    return [tuple(sorted(cpus[(slot * size + offset) % len(cpus)] for offset in range(size))) for slot in range(slots)]


def _folder() -> Path:
    """The folder of the locks; created if needed."""
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
                f"{folder} has owner {found.st_uid} and mode {stat.S_IMODE(found.st_mode):o}, so others could hold the locks of the"
                f" programs' uids. It must be a folder of uid {os.geteuid()} with mode 700. Remove it, and find out who created it."
            )
        return folder
    raise SandboxError(
        f"Cannot create the locks that keep two runs from sharing a uid: {'; '.join(refused)}. Make /run or /tmp writable for root."
    )


@contextlib.contextmanager
def lease_uids(count: int) -> Iterator[list[int]]:
    """Leases `count` uids that no other executor of root on this machine uses, until the context ends.

    Raises:
      SandboxError: too few uids are free, or the locks cannot be created.
    """
    with contextlib.ExitStack() as held:
        folder, leased = _folder(), []
        for uid in UIDS:
            if len(leased) == count:
                break
            # Never unlink it: a process that has just opened it would lock the old file, and the next one a new file.
            descriptor = os.open(folder / str(uid), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                locked = try_flock(descriptor, folder)
            except OSError as error:
                os.close(descriptor)
                raise SandboxError(
                    f"Cannot lock {folder / str(uid)}, which keeps two runs from sharing a uid: {error.strerror or error}. Mount /run or"
                    " /tmp from a file system with locks, such as tmpfs, ext4 or xfs."
                ) from error
            if not locked:
                os.close(descriptor)
                continue
            held.callback(os.close, descriptor)
            leased.append(uid)
        if len(leased) < count:
            raise SandboxError(
                f"{count} slots need {count} uids, but only {len(leased)} of the {len(UIDS)} from {UIDS[0]} on are free (locks in"
                f" {folder}). Set execution.workers to {max(1, len(leased))} or less, or wait until another run has ended."
            )
        yield leased
