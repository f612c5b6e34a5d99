"""Reading files that may be wrong or hostile, writing files that are never half-written, errors. No torch here."""

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
from pathlib import Path

from support.settings import RunSettings

MOST_ROWS = 10**6  # of a history


class UserError(ValueError):
    """Something the user can mend. Its message is one line: what is wrong, where, what to do. Scripts exit with 2."""


def open_regular(path, mode="rb"):
    """Open a file as `open` does, but neither a pipe, which can wait for ever, nor a device, which can have no end.

    Writing does not follow a symbolic link either. Text is UTF-8, with backslashes for what is not (names of files may
    have other bytes, which Python holds as lone surrogates). Raises OSError.
    """

    def opener(path, flags):
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if writes and os.path.islink(path):
            raise OSError(errno.ELOOP, "it is a symbolic link, through which nothing is written", path)
        file = os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)
        kind = os.fstat(file).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # for a directory Python has its own words
            os.close(file)
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        return file

    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    return open(path, mode, opener=opener, **text)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file next to `path` that replaces it only if the block succeeds.

    When the block is over, `path` has its new content even after a power cut: the file is synced, renamed, and its
    folder is synced. Raises UserError when the folder cannot be written or the disk is full; an existing `path` is then
    untouched.
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


def sync_folder(folder: str | os.PathLike) -> None:
    """Make the names in `folder` (new, renamed or removed ones) survive a power cut. Raises OSError.

    A file system that cannot sync folders is left alone, and so is a folder that may be written but not read.
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
    """Make the folder `path`, and those above it, where they are missing; they survive a power cut. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def keep_as(path: Path, name: Path) -> None:
    """Give the file `path` the second name `name`, in the same folder; it is copied where links are not possible.

    Both names exist at every moment, also after a power cut. Raises UserError.
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
            os.unlink(link)  # still there if `name` already was the same file: then nothing is renamed
        sync_folder(name.parent)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror or error}") from error


def remove_temporary_files(folder: Path) -> None:
    """Remove what `atomic_write`, `keep_as` and earlier versions of them left in `folder` when they were killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.search(r"\.(tmp|link)\d+$", path.name) and not path.is_dir():
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def no_empty_folders(path):
    """Remove, if the block fails, what it made of the folders on the way to `path` and left empty."""
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # it holds something, or is still missing
                folder.rmdir()
        raise


def write_json(path, value):
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def append_line(path, line, sync=False):
    """Add a line to a text file, control characters escaped.

    Raises UserError when that fails; the file may then end in a part of the line. With `sync` the line survives a power
    cut, provided that the file's name does: see `sync_folder`.
    """
    try:
        with open_regular(path, "a") as file:
            file.write(f"{escaped(line)}\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


# What a terminal would obey or a reader misread: C0 and C1 controls, line separators, marks that turn the direction,
# and the surrogates that stand for bytes of file names that are not UTF-8.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""Return `text` with its control characters as \n, \x1b, \u202e: names of files and classes can hold any."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def quoted(word: object) -> str:
    """Return a word as a shell takes it, on one line: with control characters in the form $'..' of bash and zsh."""
    text = str(word)
    if not CONTROLS.search(text):
        return shlex.quote(text)
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + CONTROLS.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in os.fsencode(found[0])), text) + "'"


def end_last_line(path: Path) -> None:
    """Complete the last line of a text file if a crash cut it off. Raises UserError."""
    if path.is_file() and read_bytes(path)[-1:] not in (b"", b"\n"):
        append_line(path, "")


def emit(text, stream, write=print):
    """Print a line at once, control characters escaped.

    A stream that is lost (a closed pipe, a full disk) is given up: nothing ends for it.
    """
    try:
        write(escaped(text), file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in its buffer goes there too


def read_bytes(path):
    """Return the file's bytes. Raises UserError naming the file when it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path):
    """Return the JSON value in `path`. Raises UserError naming the file where it is missing, not UTF-8 or not JSON."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_history(run_dir: str | os.PathLike, settings: RunSettings) -> list[dict]:
    """Return the rows of RUN_DIR/history.jsonl, an empty list if there is no such file.

    The run may be writing the file, so an unfinished last line is left out. Raises UserError, which names the
    line, if a row is not valid.
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
    """Check the form of a row of a history. With `in_order` its step must follow those of the rows `before` it.

    Raises UserError, which begins with `where`.
    """
    name = step_field(before or [row], settings) if isinstance(row, dict) else settings.step_fields[-1]
    step = row.get(name) if isinstance(row, dict) else None
    if type(step) is not int or not 0 < step < MOST_ROWS or (in_order and step != len(before) + 1):
        raise UserError(f"{where}: the row does not count its {' or '.join(settings.step_fields)} from 1")
    for key in row.keys() - settings.other_fields:
        if row[key] is not None and type(row[key]) not in (int, float):
            raise UserError(f'{where}: "{key}" is {str(row[key])[:60]!r}, not a number')


def digest(path):
    """Return the SHA-256 of a file's content, or of the names and sizes of the files in a folder. Raises OSError."""
    sha = hashlib.sha256()
    if os.path.isdir(path):
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            sha.update(os.fsencode(f"{entry.name} {entry.stat().st_size}\n"))
    else:
        with open_regular(path) as file:
            while part := file.read(1 << 20):
                sha.update(part)
    return sha.hexdigest()


def check_unpacked_size(archive, limit):
    """Raises ValueError if the members of a zipfile.ZipFile together claim more than `limit` bytes."""
    if sum(member.file_size for member in archive.infolist()) > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")


MOST_STEPS = 700_000  # opcodes of a pickle; a batch of ImageNet16 has fewer than 300,000


def restricted_unpickle(data, allowed, path, refused=(), **kwargs):
    """Unpickle bytes `data` of file `path`, knowing only the callables in `allowed`: {(module, name): object}.

    Raises UserError for any other callable (which is not executed), for the opcodes named in `refused`, for more than
    MOST_STEPS opcodes and for damaged data. Memo indices and the number of opcodes are checked before anything is
    built, since a pickle of 20 bytes can otherwise ask for gigabytes, and one byte can make an object of 216.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in allowed:
                reference = f"{module}.{name}"
                raise UserError(f"{path} refers to {reference!r:.200}, which a file of its kind never holds: refused")
            return allowed[module, name]

    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step == MOST_STEPS:
                raise UserError(f"{path} has more than {MOST_STEPS:,} pickled parts, far more than a file of its kind")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
                raise UserError(f"{path} is not a valid pickle: memo index {argument}")
            if opcode.name in refused:
                raise UserError(f"{path} holds {opcode.name}, which a file of its kind never does: refused")
        return Restricted(io.BytesIO(data), **kwargs).load()
    except UserError:
        raise
    except Exception as error:  # the unpickler raises nearly any exception on damaged data
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # some messages have two lines
        raise UserError(f"{path} is not a valid pickle: {reason}") from error
