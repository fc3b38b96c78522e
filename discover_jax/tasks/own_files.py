"""Makes the files that a competition's prepare() wrote the task's own, so that nothing outside its folder is changed or needed later."""

import os
import shutil
import stat
from pathlib import Path

from discover_jax.exceptions import ConfigError


def own_files(work: Path) -> None:
    """Replaces every link below public/ and private/ of `work` by a copy of what it points to.

    A sandbox contains only public/, so a link would dangle there. And a change of a linked file, of its mode or its rows, would reach the
    original. That holds for hard links, too.

    Raises:
      ConfigError: a link points nowhere, into private/ from public/, or to a folder that contains it; or a file is not a regular one.
    """
    secret = (work / "private").resolve()
    for top in (work / "public", work / "private"):
        for path in [top, *sorted(top.rglob("*"))]:
            if path.is_symlink():
                _replace_link(path, work, None if top.name == "private" else secret)
        for path in sorted(top.rglob("*")):
            _own(path, work)


def _refused(path: Path, work: Path, problem: str) -> ConfigError:
    return ConfigError(f"prepare() wrote {path.relative_to(work)}, which is {problem}. It must write files and folders, or links to some.")


def _replace_link(path: Path, work: Path, secret: Path | None, above: tuple[Path, ...] = ()) -> None:
    """Replaces a symbolic link by a copy of what it points to, and of what links in there point to.

    Args:
      secret: the folder that no link may reach; None if all may.
      above: the linked folders that are being copied.
    """
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, in Python 3.11 and 3.12
        raise _refused(path, work, f"a link to {os.readlink(path)}, where nothing can be found ({error})") from error
    if secret is not None and (secret == target or secret in target.parents or target in secret.parents):
        raise _refused(path, work, f"a link to {target}, where programs would see the answers")
    if target in (*above, path.parent.resolve(), *path.parent.resolve().parents):
        raise _refused(path, work, f"a link to {target}, a folder that contains it")
    path.unlink()
    if target.is_dir():
        path.mkdir()
        for entry in sorted(target.iterdir()):
            (path / entry.name).symlink_to(entry)
            _replace_link(path / entry.name, work, secret, (*above, target))
    elif target.is_file():
        shutil.copyfile(target, path)
    else:
        raise _refused(path, work, f"a link to {target}, which is neither a file nor a folder")


def _own(path: Path, work: Path) -> None:
    """Replaces a file that has further hard links by a copy; refuses what is neither a file nor a folder."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise _refused(path, work, "neither a file nor a folder")
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        copy = path.with_name(path.name + ".copy")
        shutil.copyfile(path, copy)
        os.replace(copy, path)
