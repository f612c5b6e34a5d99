"""Files, runs, devices, processes and command lines. Nothing here depends on the search method.

If the running program is a script of this project, importing this package sets `sys.excepthook` and
a handler of Ctrl-C. Ctrl-C and a missing package then print one line instead of a traceback.
`support.cli.command` also prints such lines, but only after a script has imported everything, and
importing torch takes seconds. So scripts import `support.cli` before torch; ruff.toml sorts that
import first.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

from support.files import emit

PROJECT = Path(__file__).resolve().parents[1]


def is_started_script() -> bool:
    """Return whether the running program is a script or module of this project."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and PROJECT in Path(file).resolve().parents


def end_in_one_line(exception_type: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Handle an uncaught exception: this function becomes `sys.excepthook`.

    For Ctrl-C and for a package that is not installed it prints one line instead of a traceback. A
    missing package exits with code 2.
    """
    if exception_type is KeyboardInterrupt:
        emit("interrupted", sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and is_of_others(error.name):
        emit(f"error: the package {error.name} is not installed: pip install -r requirements.txt", sys.stderr)
        raise SystemExit(2)
    else:
        sys.__excepthook__(exception_type, error, traceback)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C while a script imports its modules.

    A KeyboardInterrupt could be raised inside the C++ code that sets torch up, which would abort.
    """
    emit("interrupted", sys.stderr)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def is_of_others(module: str | None) -> bool:
    """Return whether a module, such as "torch.nn", comes from outside this project."""
    top = (module or "").split(".")[0]
    return bool(top) and not (PROJECT / top).exists() and not (PROJECT / f"{top}.py").exists()


if is_started_script():
    sys.excepthook = end_in_one_line
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
