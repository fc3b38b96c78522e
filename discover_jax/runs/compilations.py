"""The folder of compiled functions, kept between runs. It holds native code that jax runs unchecked, so only this user may write there."""

import logging
import os
import stat
import tempfile
from pathlib import Path

import jax

from discover_jax.exceptions import RunError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_compilations() -> None:
    """Keeps compiled functions between runs, unless the environment already configures jax's compilation cache.

    Raises:
      RunError: the folder belongs to another user, or others can write there.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "discover_jax" / "compiled"
    try:
        own_folder(folder)
    except OSError as error:  # without a writable home, the run only takes longer
        logging.getLogger(__name__).warning("Compiled functions are not kept between runs: cannot use %s (%s).", folder, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def own_folder(folder: Path) -> None:
    """Creates a folder that only this user can write, or checks an existing one. Also does so for its parent, where it could be replaced.

    Raises:
      RunError: other users could put files there.
      OSError: it cannot be created.
    """
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(each)
        if not stat.S_ISDIR(status.st_mode):
            raise RunError(f"{each} is not a folder but a link or a file, so this project did not create it. {_remedy(each)}")
        if status.st_uid != os.geteuid() and status.st_uid != _owner_of_new_files(each):
            raise RunError(
                f"{each} belongs to another user (id {status.st_uid}; yours is {os.geteuid()}), who could put native code there that runs"
                f" under your account. {_remedy(each)}"
            )
        if status.st_mode & _OTHERS_WRITE:
            raise RunError(
                f"Others can write to {each} (mode {stat.S_IMODE(status.st_mode):o}) and could put native code there that runs under your"
                f" account. {_remedy(each)} If you trust its content, run chmod -R go-w {each} instead."
            )


def _owner_of_new_files(folder: Path) -> int | None:
    """The owner of new files there; None if no file can be created. A file server may map root to another user."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_uid
    except PermissionError:
        return None


def _remedy(folder: Path) -> str:
    return (
        f"Delete {folder} (functions are then compiled again), or set the environment variable JAX_COMPILATION_CACHE_DIR to another folder."
    )
