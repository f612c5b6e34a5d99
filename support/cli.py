"""Command lines: flags, defaults in the help, and errors that end in one line. No torch here."""

import argparse
import functools
import operator
import sys

from support.files import UserError


def command(main):
    """Decorate `main(argv=None)`: a UserError or OSError ends in one line on stderr and exit code 2, Ctrl-C in 130."""

    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(argv)
        except UserError as error:
            text, code = f"error: {' '.join(str(error).split())}", 2
        except OSError as error:
            text, code = f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 2
        except KeyboardInterrupt:
            text, code = "interrupted; what was saved can be continued with --resume RUN_DIR", 130
        print(text, file=sys.stderr)
        raise SystemExit(code)

    return wrapper


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not None and False, which say nothing."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and one line instead of the usage for a bad argument."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(kind, low=None, high=None, above=None):
    """An argparse type: `kind` (int or float), at least `low`, greater than `above`, at most `high`."""
    bounds = [("at least", operator.ge, low), ("greater than", operator.gt, above), ("at most", operator.le, high)]
    bounds = [bound for bound in bounds if bound[2] is not None]

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not abs(value) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not all(holds(value, bound) for _, holds, bound in bounds):
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(f'{word} {at}' for word, _, at in bounds)}")
        return value

    return parse
