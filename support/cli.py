"""Command lines: flags, defaults in the help, and errors that end in one line. No torch here."""

import argparse
import errno
import functools
import operator
import os
import re
import sys
from pathlib import Path

from support.files import UserError, emit

# What ends a run without a fault in the program: a part of the message that torch gives, what it means, what to do.
SMALLER = "memory ran out: give --checkpoint, where it was in training, or a smaller --batch_size or --valid_batch_size"
NO_COMPILE = "torch.compile found no compiler that works here: give --no-compile, also with --resume"
REMEDIES = {
    "can't allocate memory": SMALLER,
    "out of memory": SMALLER,
    "could not create a primitive": SMALLER,  # in oneDNN
    "can't start new thread": SMALLER,
    "cannot allocate memory": SMALLER,  # the loader of shared libraries, in an import
    "without setting an exception": SMALLER,  # Python, where there is no memory for the MemoryError
    "without exception set": SMALLER,  # the same
    "InvalidCxxCompiler": NO_COMPILE,
    "CppCompileError": NO_COMPILE,
    "TritonMissing": NO_COMPILE,  # on a GPU
    "captur": "a step cannot be recorded as a CUDA graph: give --no-cuda_graph, also with --resume",
    "gloo": "another process of this run is gone; continue from the last checkpoint with --resume RUN_DIR, "
    "with as many processes as you like",
}


def command(main):
    """Decorate `main(argv=None)`: an error that the user can mend ends in one line on stderr and exit code 2.

    Such are a UserError, an OSError, want of memory and what REMEDIES knows. Ctrl-C ends in a line and exit code 130.
    """

    @functools.wraps(main)
    def wrapper(argv=None):
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by the caller; a file of the run must not get its number
                setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        if hasattr(sys.stdout, "reconfigure"):  # names that the locale cannot write are shown with backslashes
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except UserError as error:
            text, code = f"error: {error}", 2
        except OSError as error:
            text = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
            no_memory = error.errno == errno.ENOMEM or text == "could not get source code"  # so inspect calls it
            text, code = f"error: {f'{SMALLER} ({text})' if no_memory else text}", 2
        except (RuntimeError, MemoryError, SystemError, ImportError) as error:
            text, code = remedy(error), 2
            if text is None:
                raise
        except KeyboardInterrupt:
            text, code = "interrupted", 130
        emit(text, sys.stderr)
        raise SystemExit(code)

    return wrapper


def remedy(error):
    """Return the line that REMEDIES has for an exception, or for one that led to it, or None."""
    while error is not None:
        for line in ["out of memory"] if isinstance(error, MemoryError) else str(error).splitlines():
            for part, text in REMEDIES.items():
                if part in line:
                    return f"error: {text} ({line:.200})"
        error = error.__context__
    return None


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not None and False, which say nothing. Keeps the lines of the description."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and one line instead of the usage for a bad argument."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class Published(argparse.Action):
    """A flag of the published scripts that is not read here: accepted, hidden from --help, with one line of notice.

    `instead` is the command line it stands for now, {} its value; without one it is ignored, and the notice says `why`.
    """

    def __init__(self, option_strings, dest, instead=None, why="it had no effect in the published scripts"):
        nothing = argparse.SUPPRESS
        super().__init__(option_strings, nothing, nargs=None if instead else "?", default=nothing, help=nothing)
        self.instead, self.why, self.noticed = instead, why, set()

    def __call__(self, parser, namespace, value, flag=None):
        from support import distributed  # imports torch, which a command without such a flag can do without

        words = [word.format(value) for word in self.instead.split()] if self.instead else []
        if flag not in self.noticed:  # a resumed run's arguments are parsed twice
            self.noticed.add(flag)
            text = f"read as {' '.join(words)}" if words else f"ignored: {self.why}"
            distributed.say(f"note: {flag} is {text}", file=sys.stderr)
        parser.parse_args(words, namespace)


def file_name(text):
    """Be an argparse type: return the name at the end of a path. Refuses a path without one."""
    last = Path(text).name
    if last in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in a name")
    return last


LARGEST = 3.4028235e38  # of float32


def number(kind, low=None, high=None, above=None):
    """Make an argparse type: `kind` (int or float), at least `low`, greater than `above`, at most `high`."""
    bounds = [("at least", operator.ge, low), ("greater than", operator.gt, above), ("at most", operator.le, high)]
    bounds = [bound for bound in bounds if bound[2] is not None]

    def parse(text):
        try:
            value = kind(re.sub(r"^(\d+)\.0*$", r"\1", text))  # so that int takes 50.0
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not abs(value) <= LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of float32")
        if not all(holds(value, bound) for _, holds, bound in bounds):
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(f'{word} {at}' for word, _, at in bounds)}")
        return value

    return parse
