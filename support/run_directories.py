"""Make, lock and check run directories, before a run uses them."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TextIO

from support.files import UserError, make_folder, open_regular, sync_folder


def refuse_links(path: Path, folders: tuple[str, ...]) -> None:
    """Raise UserError if one of the `folders` in `path` is a symbolic link.

    Otherwise files would be written to the target of the link.
    """
    for name in folders:
        if (path / name).is_symlink():
            raise UserError(
                f"{path / name}: this is a symbolic link, and files are not written through links. Remove it"
            )


def lock(path: Path) -> TextIO:
    """Keep other processes out of a run directory for as long as the returned file is open.

    Raises UserError.
    """
    try:
        file = open_regular(path / ".lock", "a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A forked process, such as one that reads images, inherits the lock. If the forked process
        # outlived this one, the run would stay locked.
        os.register_at_fork(after_in_child=file.close)
    except BlockingIOError:
        raise UserError(f"{path}: in use by another process. Wait for that process, or stop it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot open the run directory ({error.strerror})") from error
    return file


def make_directory(path: Path, new_name: bool = True) -> Path:
    """Make the directory `path` and return its path. Raises UserError.

    With `new_name`, an existing directory is not used, and path-2 (or path-3, and so on) is made
    instead. So two runs that start in the same second get different directories.
    """
    try:
        make_folder(path.parent)
        if not new_name:
            make_folder(path)
            return path
        for name in (path.name, *(f"{path.name}-{i}" for i in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                path.with_name(name).mkdir()
                sync_folder(path.parent)
                return path.with_name(name)
    except OSError as error:
        raise UserError(f"{path}: cannot make the run directory ({error.strerror})") from error
    raise UserError(f"{path}: cannot make the run directory: too many runs have this name. Choose another name")
