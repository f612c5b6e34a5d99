"""README.md, docs/ and tests/README.md: blocks marked `bash run` run as they stand; flags, links and files exist."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "tests/README.md"]
}
LISTS = ("tests", "benchmarks")  # folders that are named as a whole
FENCED = re.compile(r"^```(.*)\n((?s:.*?))^```$", flags=re.MULTILINE)


def blocks(*kinds):
    """The text of every fenced block whose first line names one of these kinds."""
    return [block for text in PAGES.values() for kind, block in FENCED.findall(text) if kind in kinds]


def commands():
    """(module, its arguments) for each line that starts a script of this project."""
    lines = "".join(blocks("bash", "bash run")).replace("\\\n", " ").splitlines()
    scripts = [re.search(r"python -m (?P<module>nas201\.\w+)|(?P<script>\w+)\.(?:py|sh)\b", line) for line in lines]
    modules = [(script["module"] or script["script"], script.string[script.end() :]) for script in scripts if script]
    return [(module.replace("searchNAS201", "nas201.train_search"), arguments) for module, arguments in modules]


def anchors(page):
    """What a link can name in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", PAGES[page]), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("bash run"))
def test_block_runs(block, tmp_path):
    for path in set(ROOT.glob("[!.]*")) - {ROOT / "runs"}:  # there the examples write
        (tmp_path / path.name).symlink_to(path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_every_kind_of_work_is_run():
    run = " ".join(blocks("bash run"))
    scripts = {"train_search.py", "train.py", "test_cifar.py", "searchNAS201.sh", "visualize.py"}
    assert scripts <= set(re.findall(r"\w+\.(?:py|sh)", run))


@pytest.mark.parametrize(("module", "arguments"), commands())
def test_flags_exist(module, arguments, capsys):
    with contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(re.findall(r"(?<= )--\w+", arguments)) <= known


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python(snippet):
    exec(snippet, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", FENCED.sub("", PAGES[page])):
        path, _, anchor = "".join(link).partition("#")
        if not re.match(r"\w+://", path):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_leads_everywhere():
    readme = PAGES[ROOT / "README.md"]
    files = [ROOT.glob(pattern) for pattern in ("*.py", "*.sh", "*/[!_]*.py", "docs/*")]
    names = {str(path.relative_to(ROOT)) for paths in files for path in paths if path.parent.name not in LISTS}
    assert names <= set(re.findall(r"[\w/-]+\.\w+", readme))
