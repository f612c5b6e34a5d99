"""Files, runs, devices, processes and command lines: everything here works without the method of
the project.

Importing this package makes two things end in one line instead of a traceback, if a script of the
project was started: Ctrl-C, and a package that is not installed. `support.cli.command` cannot do
that while a script is still importing torch. So scripts import `support.cli` before torch;
ruff.toml sorts it first.
"""

import sys
from pathlib import Path
from types import TracebackType

from support.files import emit

PROJECT = Path(__file__).resolve().parents[1]


def is_started_script() -> bool:
    """Return whether the running program is a script or module of this project."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and PROJECT in Path(file).resolve().parents


def end_in_one_line(exception_type: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Be a sys.excepthook: print one line for Ctrl-C and for a package that is not installed, which
    exits with 2.
    """
    if exception_type is KeyboardInterrupt:
        emit("interrupted", sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and is_of_others(error.name):
        emit(f"error: the package {error.name} is not installed: pip install -r requirements.txt", sys.stderr)
        raise SystemExit(2)
    else:
        sys.__excepthook__(exception_type, error, traceback)


def is_of_others(module: str | None) -> bool:
    """Return whether a module, such as "torch.nn", is not one of this project's."""
    top = (module or "").split(".")[0]
    return bool(top) and not (PROJECT / top).exists() and not (PROJECT / f"{top}.py").exists()


if is_started_script():
    sys.excepthook = end_in_one_line
