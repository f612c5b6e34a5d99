"""Read files that may be damaged or hostile, and write files so that none is left half-written.

This module does not import torch.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shlex
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, TextIO

from support.settings import RunSettings

AnyPath = str | os.PathLike

MOST_ROWS = 10**6  # rows of a history
MOST_STEPS = 700_000  # opcodes of a pickle; the largest of our files has fewer than 300,000


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line: where the error is, what is wrong, and what to do. Scripts print the
    message and exit with code 2.
    """


# ---- writing


def open_regular(path: AnyPath, mode: str = "rb") -> IO:
    """Open a file as `open` does, but refuse anything that is not a regular file. Raises OSError.

    A pipe could block forever, and a device could be endless. A symbolic link is refused for
    writing. Text files are UTF-8. Lone surrogates, which Python uses for undecodable bytes in file
    names, are written as backslash escapes.
    """

    def opener(path: str, flags: int) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if writes and os.path.islink(path):
            raise OSError(errno.ELOOP, "this is a symbolic link, and files are not written through links", path)
        file = os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)
        mode = os.fstat(file).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # Python's open refuses directories
            os.close(file)
            raise OSError(errno.EINVAL, "this is not a regular file", path)
        return file

    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    return open(path, mode, opener=opener, **text)


@contextlib.contextmanager
def atomic_write(path: AnyPath, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file next to `path`, which replaces `path` only if the block succeeds.

    After the block, the new content of `path` survives a power failure, because the file and its
    folder are synced. Raises UserError if the folder is not writable or the disk is full. After an
    error, an existing file `path` is unchanged.
    """
    temporary = f"{path}.tmp{os.getpid()}"  # see remove_temporary_files
    try:
        with open_regular(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def sync_folder(folder: AnyPath) -> None:
    """Sync a folder, so that new, renamed and removed names in it survive a power failure.

    Does nothing if the file system cannot sync folders, or if the folder is not readable. Raises
    OSError.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make the folder `path` and any missing parents, and sync them. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def keep_as(path: Path, name: Path) -> None:
    """Give the file `path` the second name `name` in the same folder.

    `name` becomes a hard link, or a copy if the file system has no hard links. An existing file
    `name` is replaced in one step. So neither file is ever missing, even if the power fails. Raises
    UserError.
    """
    link = f"{name}.tmp{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):  # a killed process with the same process ID may have left it
            os.unlink(link)
        os.link(path, link)
    except OSError:  # the file system has no hard links
        with atomic_write(name) as file:
            file.write(read_bytes(path))
        return
    try:
        os.replace(link, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)  # os.replace does nothing if `name` already was a link to the same file
        sync_folder(name.parent)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror or error}") from error


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files that killed processes left in `folder`.

    Such files come from `atomic_write` and `keep_as`.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.search(r"\.tmp\d+$", path.name) and not path.is_dir():
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def no_empty_folders(path: AnyPath) -> Iterator[None]:
    """If the block fails, remove the folders of `path` that the block has made and left empty."""
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # the folder is not empty, or does not exist
                folder.rmdir()
        raise


def write_json(path: AnyPath, value: object) -> None:
    """Write `value` to `path` as indented JSON, using `atomic_write`. Raises UserError."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def append_line(path: AnyPath, line: str, sync: bool = False) -> None:
    """Append a line to a text file, with control characters escaped.

    With `sync` the line survives a power failure, provided that the folder was synced after the
    file was made (see `sync_folder`). Raises UserError if writing fails. After an error, the file
    may end with a part of the line.
    """
    try:
        with open_regular(path, "a") as file:
            file.write(f"{escaped(line)}\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def end_last_line(path: Path) -> None:
    """Add a missing line end to a text file, if a crash cut off its last line. Raises UserError."""
    if path.is_file() and read_bytes(path)[-1:] not in (b"", b"\n"):
        append_line(path, "")


# ---- text for people and shells

# Characters that a terminal would interpret or a reader would misread: C0 and C1 controls, line
# separators, marks that change the direction of text, and surrogates. Python uses surrogates for
# bytes of file names that are not UTF-8.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""Return `text` with control characters escaped, such as \n, \x1b and \u202e.

    File names and class names can contain any character.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def quoted(word: object) -> str:
    """Return a word quoted for a shell, on one line.

    A word with control characters is written in the form $'...' of bash and zsh.
    """
    text = str(word)
    if not CONTROLS.search(text):
        return shlex.quote(text)
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + CONTROLS.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in os.fsencode(found[0])), text) + "'"


def emit(text: object, stream: TextIO, write: Callable = print) -> None:
    """Print a line with control characters escaped, and flush the stream.

    If the stream cannot be written (a closed pipe, a full disk), the stream is redirected to
    /dev/null, so that the program continues.
    """
    try:
        write(escaped(text), file=stream)
        stream.flush()
    except OSError:
        # /dev/null also takes what is left in the stream's buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- reading


def read_bytes(path: AnyPath) -> bytes:
    """Return the content of a file.

    Raises UserError, which names the file, if the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: AnyPath) -> object:
    """Return the JSON value in a file.

    Raises UserError, which names the file, if the file is missing or not JSON.
    """
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Restore or remove the file") from error


def read_history(run_dir: str | os.PathLike, settings: RunSettings) -> list[dict]:
    """Return the rows of RUN_DIR/history.jsonl, or an empty list if that file does not exist.

    A run may be writing the file, so an unfinished last line is left out. Raises UserError, which
    names the line, if a row is not valid.
    """
    path = os.path.join(run_dir, "history.jsonl")
    lines = read_bytes(path).splitlines(keepends=True) if os.path.exists(path) else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            remedy = "--resume rebuilds the file from the run's checkpoint"
            raise UserError(f"{where}: not valid JSON ({error}); {remedy}") from error
        check_history_row(row, rows, where, settings)
        rows.append(row)
    return rows


def step_field(rows: list[dict], settings: RunSettings) -> str:
    """Return the name of the field that counts the steps in these rows of a history."""
    names = [name for name in settings.step_fields if rows and name in rows[0]]
    return names[0] if names else settings.step_fields[-1]


def check_history_row(
    row: object, before: list[dict], where: str, settings: RunSettings, in_order: bool = False
) -> None:
    """Check that a row of a history has the right form.

    With `in_order` the row's step must follow the steps of the rows `before`. Raises UserError,
    whose message begins with `where`.
    """
    name = step_field(before or [row], settings) if isinstance(row, dict) else settings.step_fields[-1]
    step = row.get(name) if isinstance(row, dict) else None
    if type(step) is not int or not 0 < step < MOST_ROWS or (in_order and step != len(before) + 1):
        raise UserError(f"{where}: the row does not count its {' or '.join(settings.step_fields)} from 1")
    for key in row.keys() - settings.other_fields:
        if row[key] is not None and type(row[key]) not in (int, float):
            raise UserError(f'{where}: "{key}" is {str(row[key])[:60]!r}, not a number')


def digest(path: AnyPath) -> str:
    """Return the SHA-256 of a file's content, or of the names and sizes of the files in a folder.

    Raises OSError.
    """
    sha = hashlib.sha256()
    if os.path.isdir(path):
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            sha.update(os.fsencode(f"{entry.name} {entry.stat().st_size}\n"))
    else:
        with open_regular(path) as file:
            while part := file.read(1 << 20):
                sha.update(part)
    return sha.hexdigest()


def check_unpacked_size(archive: zipfile.ZipFile, limit: int) -> None:
    """Raise ValueError if the members of an archive declare more than `limit` bytes in total."""
    if sum(member.file_size for member in archive.infolist()) > limit:
        raise ValueError(f"the archive unpacks to more than {limit} bytes")


def restricted_unpickle(
    data: bytes,
    allowed: dict[tuple[str, str], object],
    path: AnyPath,
    refused: Collection[str] = (),
    **kwargs: object,
) -> object:
    """Return the object in the pickle `data`, which was read from `path`.

    The pickle may only refer to the objects in `allowed`, {(module, name): object}. `kwargs` are
    passed to pickle.Unpickler.

    Raises UserError if the pickle refers to any other object, which is not executed. Also raises
    UserError for opcodes named in `refused`, for more than MOST_STEPS opcodes, and for damaged
    data.

    Memo indices and the number of opcodes are checked before any object is built. Without these
    checks, a pickle of 20 bytes could ask for gigabytes, and each byte could make an object of 216
    bytes.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if (module, name) not in allowed:
                reference = f"{module}.{name}"
                raise UserError(f"{path}: refused: the pickle refers to {reference!r:.200}, and a valid one never does")
            return allowed[module, name]

    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step == MOST_STEPS:
                raise UserError(f"{path}: refused: the file has more than {MOST_STEPS:,} pickle opcodes, far too many")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
                raise UserError(f"{path}: not a valid pickle: memo index {argument}")
            if opcode.name in refused:
                raise UserError(f"{path}: refused: the pickle contains {opcode.name}, and a valid one never does")
        return Restricted(io.BytesIO(data), **kwargs).load()
    except UserError:
        raise
    except Exception as error:  # the unpickler raises nearly any exception for damaged data
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # some messages have two lines
        raise UserError(f"{path}: not a valid pickle ({reason})") from error
