"""Reading files that may be wrong or hostile, writing files that are never half-written, errors. No torch here."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import pickletools
import re
import shlex
import stat
from pathlib import Path


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
    """Open a temporary file beside `path`; it takes `path`'s place, flushed to disk, only if the block succeeds.

    Raises UserError when the folder cannot be written or the disk is full; an existing `path` is then untouched.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open_regular(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


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


def append_line(path, line):
    """Add a line to a text file, control characters escaped.

    Raises UserError when that fails; the file may then end in a part of the line.
    """
    try:
        with open_regular(path, "a") as file:
            file.write(f"{escaped(line)}\n")
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


def read_history(run_dir, count=None):
    """Return the first `count` lines of RUN_DIR/history.jsonl, or all, as dicts. Raises UserError naming a bad line.

    Behind the lines that a checkpoint counts, a crash may have left others, the last of them cut off.
    """
    path, rows = os.path.join(run_dir, "history.jsonl"), []
    hint = "" if count else "; remove the line, or resume the run"
    lines = enumerate(read_bytes(path).splitlines() if os.path.exists(path) else [], start=1)
    for number, line in itertools.islice((line for line in lines if line[1].strip()), count):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON: {error}{hint}") from error
        first = rows[0] if rows else row
        step = row.get("generation" if "generation" in first else "epoch") if isinstance(row, dict) else None
        if type(step) is not int or not 0 < step < 10**6 or (count and step != len(rows) + 1):
            raise UserError(f"{where} does not have a generation, or an epoch, that is a positive whole number")
        for key in row.keys() - {"best_genotype", "true_accuracy", "truth"}:
            if row[key] is not None and type(row[key]) not in (int, float):
                raise UserError(f'{where}: "{key}" is {str(row[key])[:60]!r}, not a number')
        rows.append(row)
    if count and len(rows) < count:
        raise UserError(f"{path} has {len(rows)} lines, but the checkpoint is of line {count}")
    return rows


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
