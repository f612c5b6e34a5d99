"""What a run records about its origin: versions, the project's commit, and shell commands."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from support.files import quoted

PROJECT = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of packages that affect results, and of CUDA in PyTorch."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **packages, "cuda": torch.version.cuda}


def git_revision() -> str | None:
    """Return the project's commit, or None outside a git checkout.

    A + follows the commit if files differ from the commit.
    """
    # Without --git-dir, git would also find the repository of a folder above the project.
    command = "git --git-dir=.git describe --always --exclude=* --abbrev=12 --dirty=+".split()
    settings = dict(cwd=PROJECT, text=True, stderr=subprocess.DEVNULL, timeout=10)
    try:
        return subprocess.check_output(command, **settings).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def shell_command(prog: str, *words: object) -> str:
    """Return a shell command that starts a program of this project with the arguments `words`.

    `prog` is a script such as "train.py", or a module such as "python -m package.module". The
    command works from the current directory.
    """
    root = os.path.relpath(PROJECT)
    if not prog.startswith("python"):
        prog = f"python {quoted(os.path.normpath(os.path.join(root, prog)))}"
    elif root != ".":
        prog = f"PYTHONPATH={quoted(root)} {prog}"
    return " ".join([prog, *map(quoted, words)])
