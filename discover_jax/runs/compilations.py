"""The folder of compiled programs, kept between runs: native code that is run unseen, so nobody else may be able to write there."""

import logging
import os
import stat
import tempfile
from pathlib import Path

import jax

from discover_jax.exceptions import RunError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_compilations() -> None:
    """Keeps compiled programs between runs, unless the environment already says where or whether.

    Raises:
      RunError: the folder is not this user's own, or others can write there.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "discover_jax" / "compiled"
    try:
        own_folder(folder)
    except OSError as error:  # a home that cannot be written costs time, not the run
        logging.getLogger(__name__).warning("Compiled programs are not kept between runs: %s cannot be used (%s).", folder, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def own_folder(folder: Path) -> None:
    """Makes a folder that this user alone can write, or checks that it is one; the folder above it, too, from which it could be replaced.

    Raises:
      RunError: somebody else could put files there.
      OSError: it cannot be made.
    """
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(each)
        if not stat.S_ISDIR(status.st_mode):
            raise RunError(f"{each} is no folder (a link, or a file), so it was not made by this project. {_remedy(each)}")
        if status.st_uid != os.geteuid() and status.st_uid != _owner_of_new_files(each):
            raise RunError(
                f"{each} belongs to another user (id {status.st_uid}; this is {os.geteuid()}), who could put native code there that runs as"
                f" yours. {_remedy(each)}"
            )
        if status.st_mode & _OTHERS_WRITE:
            raise RunError(
                f"{each} can be written by others (mode {stat.S_IMODE(status.st_mode):o}), who could put native code there that runs as"
                f" yours. {_remedy(each)} If you trust what is in it: chmod -R go-w {each}"
            )


def _owner_of_new_files(folder: Path) -> int | None:
    """Who a new file there belongs to: a file server may have it that root's are somebody else's. None if none can be made."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_uid
    except PermissionError:
        return None


def _remedy(folder: Path) -> str:
    return (
        f"Delete {folder}, which loses nothing but time: programs are compiled again; or name another folder by the environment variable"
        " JAX_COMPILATION_CACHE_DIR."
    )
