"""README's commands: those without a mark (*) are run, as they stand, in a folder that looks like this project."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    """One string a command, comments left out. `make` and the installation are what runs this test."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    unmarked = [line.split(" #")[0].strip() for line in lines if not line.rstrip().endswith("*")]
    return [line for line in unmarked if line and not re.match(r"make |python3 -m venv|pip install", line)]


def test_there_are_commands_to_run():
    assert len(commands()) >= 3
    assert {"train_search.py", "searchNAS201.sh", "visualize.py"} <= set(re.findall(r"\w+\.(?:py|sh)", str(commands())))


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path):
    for path in ROOT.glob("[!.]*"):
        (tmp_path / path.name).symlink_to(path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python(snippet):
    exec(snippet, {})


def test_every_file_is_named():
    named = set(re.findall(r"[\w/]+\.(?:py|sh)\b", README))
    files = [path.name for path in ROOT.glob("*.py")] + [f"nas201/{path.name}" for path in ROOT.glob("nas201/[!_]*.py")]
    assert set(files) <= named
