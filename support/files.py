"""Files that may be wrong or hostile are read safely, and files are never left half-written.

No torch here.
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

MOST_ROWS = 10**6  # of a history
MOST_STEPS = 700_000  # opcodes of a pickle; the largest of our files has fewer than 300,000


class UserError(ValueError):
    """Something that the user can fix. Its message is one line: where, what is wrong, what to do.

    Scripts print it and exit with 2.
    """


# ---- writing


def open_regular(path: AnyPath, mode: str = "rb") -> IO:
    """Open a file as `open` does, but refuse pipes, which can block forever, and devices, which can
    be endless.

    Nothing is written through a symbolic link. Text is UTF-8, and characters that UTF-8 does not
    have are written with backslashes. (File names can have bytes that Python reads as lone
    surrogates.) Raises OSError.
    """

    def opener(path: str, flags: int) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if writes and os.path.islink(path):
            raise OSError(errno.ELOOP, "it is a symbolic link, and nothing is written through one", path)
        file = os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)
        mode = os.fstat(file).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # Python refuses a directory itself
            os.close(file)
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        return file

    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    return open(path, mode, opener=opener, **text)


@contextlib.contextmanager
def atomic_write(path: AnyPath, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file next to `path`, which replaces `path` only if the block succeeds.

    After the block, `path` has its new content even if the power fails: the file is synced and
    renamed, and its folder is synced. Raises UserError if the folder cannot be written or the disk
    is full. An existing `path` is then unchanged.
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
    """Make names in `folder` that are new, renamed or removed survive a power cut. Raises OSError.

    Does nothing on a file system that cannot sync folders, and in a folder that can be written but
    not read.
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
    """Make the folder `path` and missing folders above it, so that they survive a power cut.

    Raises OSError.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def keep_as(path: Path, name: Path) -> None:
    """Give the file `path` a second name in the same folder.

    It is copied if the file system has no links. Both names exist at every moment, even if the
    power fails. Raises UserError.
    """
    link = f"{name}.tmp{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):  # left by a process that was killed and had the same number
            os.unlink(link)
        os.link(path, link)
    except OSError:  # a file system without links
        with atomic_write(name) as file:
            file.write(read_bytes(path))
        return
    try:
        os.replace(link, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)  # if `name` already was the same file, os.replace has done nothing
        sync_folder(name.parent)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror or error}") from error


def remove_temporary_files(folder: Path) -> None:
    """Remove what `atomic_write` and `keep_as` left in `folder` when their processes were killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.search(r"\.tmp\d+$", path.name) and not path.is_dir():
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def no_empty_folders(path: AnyPath) -> Iterator[None]:
    """If the block fails, remove those folders on the way to `path` that it has made and left
    empty.
    """
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty, or does not exist
                folder.rmdir()
        raise


def write_json(path: AnyPath, value: object) -> None:
    """Write `value` as indented JSON, see `atomic_write`. Raises UserError."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def append_line(path: AnyPath, line: str, sync: bool = False) -> None:
    """Append a line to a text file, with control characters escaped.

    With `sync` the line survives a power cut, provided that the file's name does, see
    `sync_folder`. Raises UserError if writing fails. The file can then end with a part of the line.
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
    """Complete the last line of a text file if a crash cut it off. Raises UserError."""
    if path.is_file() and read_bytes(path)[-1:] not in (b"", b"\n"):
        append_line(path, "")


# ---- what people and shells read

# Characters that a terminal would obey or a reader misread: C0 and C1 controls, line separators,
# marks that turn the direction of text, and the surrogates that stand for bytes of file names that
# are not UTF-8.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""Return `text` with control characters as \n, \x1b, \u202e.

    File and class names can contain any character.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def quoted(word: object) -> str:
    """Return a word quoted for a shell, on one line.

    Control characters use the form $'...' of bash and zsh.
    """
    text = str(word)
    if not CONTROLS.search(text):
        return shlex.quote(text)
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + CONTROLS.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in os.fsencode(found[0])), text) + "'"


def emit(text: object, stream: TextIO, write: Callable = print) -> None:
    """Print a line and flush it, with control characters escaped.

    If the stream is lost (a closed pipe, a full disk), it is replaced by /dev/null: the program
    goes on.
    """
    try:
        write(escaped(text), file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # also for what is left in the stream's buffer


# ---- reading


def read_bytes(path: AnyPath) -> bytes:
    """Return the content of a file.

    Raises UserError, which names the file, if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: AnyPath) -> object:
    """Return the JSON value in a file.

    Raises UserError, which names the file, if it is missing or not JSON.
    """
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Restore or remove the file") from error


def read_history(run_dir: str | os.PathLike, settings: RunSettings) -> list[dict]:
    """Return the rows of RUN_DIR/history.jsonl, an empty list if there is no such file.

    The run may be writing the file, so an unfinished last line is left out. Raises UserError, which
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
            remedy = "--resume makes the file again from the run's checkpoint"
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
    """Check the form of a row of a history.

    With `in_order` its step must follow those of the rows `before` it. Raises UserError, which
    begins with `where`.
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
    """Raise ValueError if the members of an archive claim to have more than `limit` bytes together."""
    if sum(member.file_size for member in archive.infolist()) > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")


def restricted_unpickle(
    data: bytes,
    allowed: dict[tuple[str, str], object],
    path: AnyPath,
    refused: Collection[str] = (),
    **kwargs: object,
) -> object:
    """Return the object in the pickle `data`, which was read from `path`.

    Only the callables in `allowed`, {(module, name): object}, are known. `kwargs` go to
    pickle.Unpickler.

    Raises UserError for any other callable (which is not executed), for the opcodes named in
    `refused`, for more than MOST_STEPS opcodes, and for damaged data. Memo indices and the number
    of opcodes are checked before anything is built: a pickle of 20 bytes can ask for gigabytes, and
    one byte can make an object of 216 bytes.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if (module, name) not in allowed:
                reference = f"{module}.{name}"
                raise UserError(f"{path}: refused: it refers to {reference!r:.200}, and such a file never does")
            return allowed[module, name]

    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step == MOST_STEPS:
                raise UserError(f"{path}: refused: it has more than {MOST_STEPS:,} pickle opcodes, far too many")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
                raise UserError(f"{path}: not a valid pickle: memo index {argument}")
            if opcode.name in refused:
                raise UserError(f"{path}: refused: it contains {opcode.name}, and such a file never does")
        return Restricted(io.BytesIO(data), **kwargs).load()
    except UserError:
        raise
    except Exception as error:  # the unpickler raises nearly any exception for damaged data
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # some messages have two lines
        raise UserError(f"{path}: not a valid pickle ({reason})") from error
