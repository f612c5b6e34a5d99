"""Command lines: types of flags, defaults in the help, and error messages of one line.

This module does not import torch. Scripts import this module before torch; support/__init__.py
explains why.
"""

import argparse
import errno
import functools
import operator
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from support import end_at_once
from support.files import UserError, emit

# Errors that are not bugs of this program: {part of the exception's message: advice to the user}.
OUT_OF_MEMORY = "out of memory: try --checkpoint (in training) or a smaller --batch_size"
NO_COMPILER = "torch.compile found no compiler that works: give --no-compile, also with --resume"
REMEDIES = {
    "can't allocate memory": OUT_OF_MEMORY,
    "out of memory": OUT_OF_MEMORY,
    "could not create a primitive": OUT_OF_MEMORY,  # in oneDNN
    "can't start new thread": OUT_OF_MEMORY,
    "cannot allocate memory": OUT_OF_MEMORY,  # the loader of shared libraries, in an import
    "without setting an exception": OUT_OF_MEMORY,  # Python, when there is no memory for the MemoryError
    "without exception set": OUT_OF_MEMORY,  # another wording of Python's message
    "InvalidCxxCompiler": NO_COMPILER,
    "CppCompileError": NO_COMPILER,
    "TritonMissing": NO_COMPILER,  # on a GPU
    "captur": "cannot record the step as a CUDA graph: give --no-cuda_graph, also with --resume",
    "gloo": "another process of this run is gone: continue from the last checkpoint with --resume RUN_DIR, "
    "with any number of processes",
}
LARGEST = 3.4028235e38  # the largest float32


def command(main: Callable) -> Callable:
    """Decorate `main(argv=None)` so that it ends with one line, not a traceback, after some errors.

    The user can fix UserError, OSError, MemoryError, and errors whose message REMEDIES lists. Such
    an error prints one line on stderr and exits with code 2. Ctrl-C prints one line and exits with
    code 130.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> object:
        open_missing_streams()
        if hasattr(sys.stdout, "reconfigure"):  # print backslashes for characters that the locale cannot write
            sys.stdout.reconfigure(errors="backslashreplace")
        if signal.getsignal(signal.SIGINT) is end_at_once:  # every module has been imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return main(argv)
        except UserError as error:
            text = f"error: {error}"
            code = 2
        except OSError as error:
            text = f"error: {os_error_text(error)}"
            code = 2
        except (RuntimeError, MemoryError, SystemError, ImportError) as error:
            text = remedy(error)
            code = 2
            if text is None:
                raise
        except KeyboardInterrupt:
            text = "interrupted"
            code = 130
        emit(text, sys.stderr)
        raise SystemExit(code)

    return wrapper


def open_missing_streams() -> None:
    """Open /dev/null in place of standard streams that the caller has closed.

    Otherwise a file of the run could get the file descriptor of stdout or stderr, and output of a
    library would go into that file.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def os_error_text(error: OSError) -> str:
    """Return one line for an OSError: the file and the reason, or that memory ran out."""
    text = str(error.strerror or error)
    if error.filename:
        text = f"{error.filename}: {text}"
    # inspect says "could not get source code" when there is no memory to read it.
    if error.errno == errno.ENOMEM or text == "could not get source code":
        return f"{OUT_OF_MEMORY} ({text})"
    return text


def remedy(error: BaseException | None) -> str | None:
    """Return the advice in REMEDIES for an exception, or for an exception that led to it.

    Returns None if REMEDIES has no advice.
    """
    while error is not None:
        for line in ["out of memory"] if isinstance(error, MemoryError) else str(error).splitlines():
            for part, text in REMEDIES.items():
                if part in line:
                    return f"error: {text} ({line:.200})"
        error = error.__context__
    return None


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A help formatter that shows the default of each flag, unless the default is None or False.

    Line breaks in the description are kept.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses abbreviated flags and reports an error in one line."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        """Raise UserError."""
        raise UserError(f"{message} (see --help)")


class Published(argparse.Action):
    """A flag that only the published scripts have.

    The flag is accepted, but hidden from --help, and a note on stderr says what replaces it.
    `instead` is the command line that replaces the flag, with {} in place of the flag's value.
    Without `instead` the flag is ignored, and the note says `why`.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        instead: str | None = None,
        why: str = "it had no effect in the published scripts",
    ) -> None:
        nothing = argparse.SUPPRESS
        super().__init__(option_strings, nothing, nargs=None if instead else "?", default=nothing, help=nothing)
        self.instead = instead
        self.why = why
        self.noticed: set[str | None] = set()

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        value: object,
        flag: str | None = None,
    ) -> None:
        """Print the note about the flag once, and parse the command line that replaces the flag."""
        from support import distributed  # imports torch, which is needed only for such a flag

        words = [word.format(value) for word in self.instead.split()] if self.instead else []
        if flag not in self.noticed:  # the arguments of a resumed run are parsed twice
            self.noticed.add(flag)
            text = f"read as {' '.join(words)}" if words else f"ignored: {self.why}"
            distributed.say(f"note: {flag} is {text}", file=sys.stderr)
        parser.parse_args(words, namespace)


def file_name(text: str) -> str:
    """Return the name at the end of a path.

    This is an argparse type, which refuses a path without a name.
    """
    last = Path(text).name
    if last in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in a name")
    return last


def number(
    number_type: type, low: float | None = None, high: float | None = None, above: float | None = None
) -> Callable[[str], int | float]:
    """Return an argparse type that parses an int or a float and checks its bounds.

    The number must be at least `low`, at most `high` and greater than `above`. A bound of None is
    not checked.
    """
    all_bounds = [("at least", operator.ge, low), ("greater than", operator.gt, above), ("at most", operator.le, high)]
    bounds = [bound for bound in all_bounds if bound[2] is not None]

    def parse(text: str) -> int | float:
        try:
            value = number_type(re.sub(r"^(\d+)\.0*$", r"\1", text))  # so that int accepts 50.0
        except ValueError:
            whole = "whole " if number_type is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number") from None
        if not abs(value) <= LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number in float32")
        if not all(holds(value, limit) for _, holds, limit in bounds):
            allowed = " and ".join(f"{word} {limit}" for word, _, limit in bounds)
            raise argparse.ArgumentTypeError(f"{text} must be {allowed}")
        return value

    return parse
