"""README.md and docs/: commands and examples work, links and flags exist, lines are narrow."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import encoding
from genotypes import PRIMITIVES

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "tests/README.md",
]
PAGES = {path: path.read_text() for path in FILES}
README = PAGES[ROOT / "README.md"]
FENCED = re.compile(r"^```(.*)\n((?s:.*?))^```$", flags=re.MULTILINE)
OF_USERS = ("runs", "demo", "data", "search-*", "eval-*")  # what runs leave in the project's folder
LONGEST_LINE = 100
LONGEST_CELL = 80


def blocks(*kinds):
    """The text of every fenced block whose first line names one of these kinds."""
    return [block for text in PAGES.values() for kind, block in FENCED.findall(text) if kind in kinds]


def commands():
    """(module, its arguments) for each line that starts a script of this project."""
    lines = "".join(blocks("bash", "bash run", "bash pictures")).replace("\\\n", " ").splitlines()
    scripts = [re.search(r"python -m (?P<module>nas201\.\w+)|(?P<script>\w+)\.(?:py|sh)\b", line) for line in lines]
    modules = [(script["module"] or script["script"], script.string[script.end() :]) for script in scripts if script]
    return [(module.replace("searchNAS201", "nas201.train_search"), arguments) for module, arguments in modules]


def of_this_folder(module):
    """Whether a module is a script of the root or of nas201, and not of benchmarks or tests."""
    return (ROOT / f"{module.replace('.', '/')}.py").exists()


def anchors(page):
    """What a link can name in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", PAGES[page]), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- commands


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("bash run"))
def test_block_runs(block, tmp_path):
    for path in ROOT.glob("[!.]*"):
        if not any(path.match(pattern) for pattern in OF_USERS):
            (tmp_path / path.name).symlink_to(path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_blocks_that_run_cover_every_kind_of_work():
    run = " ".join(blocks("bash run"))
    scripts = {"train_search.py", "train.py", "test_cifar.py", "searchNAS201.sh", "visualize.py"}
    assert scripts <= set(re.findall(r"\w+\.(?:py|sh)", run))


@pytest.mark.parametrize("block", blocks("bash run"))
def test_block_can_be_pasted_twice(block):
    """A named run is removed before it is made. Everything goes into runs/, which git ignores."""
    named = re.findall(r"--dir (\S+) --run_name (\S+)", block)
    named += re.findall(r"searchNAS201\.sh \S+ \S+ (\S+)", block)
    for place in named:
        folder = place if isinstance(place, str) else "/".join(place)
        assert folder.startswith("runs/")
        assert f"rm -rf {folder}\n" in block


@pytest.mark.parametrize(("module", "arguments"), [entry for entry in commands() if of_this_folder(entry[0])])
def test_flags_exist(module, arguments, capsys):
    command = re.findall(r"^ ([a-z]+) ", arguments) if module == "nas201.benchmark" else []
    with contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*command, "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(re.findall(r"(?<= )--\w+", arguments)) <= known


# ---- Python


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python_snippet_runs(snippet):
    names = {}
    exec(snippet, names)
    assert names["alphas"].shape[-3:] == (2, 14, 8)


@pytest.mark.slow
def test_search_of_your_own_runs(capsys):
    (snippet,) = blocks("python search")
    names = {}
    exec(snippet, names)
    assert names["fitness"].shape == (6,)
    assert capsys.readouterr().out.strip() == str(names["best"])


def test_decoding_example_is_what_encoding_computes():
    """The table of docs/method.md has a row for each operation and a column for each edge.

    What decoding chooses is bold.
    """
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGES[ROOT / "docs/method.md"], flags=re.MULTILINE)
    cells = {name: values.split(" | ") for name, values in rows if name in PRIMITIVES}
    assert list(cells) == list(PRIMITIVES)
    alphas = encoding.random_alphas(1, torch.Generator().manual_seed(5))[0]
    softmax = torch.softmax(alphas[0, 2:5], dim=-1)  # (3, 8)
    best = softmax[:, 1:].argmax(dim=-1) + 1
    for operation, values in enumerate(cells.values()):
        for edge, text in enumerate(values):
            bold = "**" if best[edge] == operation else ""
            assert text == f"{bold}{softmax[edge, operation]:.3f}{bold}"
    assert encoding.genotype(alphas).normal[2:4] == [("dil_conv_5x5", 2), ("skip_connect", 0)]
    assert encoding.decode(alphas)[0, 2:5].nonzero().tolist() == [[0, 3], [2, 7]]


# ---- links, names, widths


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCED.sub("", PAGES[page])
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(link).partition("#")
        if not re.match(r"\w+://", path):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            if anchor:
                assert anchor in anchors(target), link
    for name in re.findall(r"\]\[(\w+)\]", text):
        assert re.search(rf"^\[{name}\]: https://", text, flags=re.MULTILINE), name


def test_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)", README))
    assert {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md", "tests/README.md"} <= linked


def test_code_map_names_files_that_exist_and_every_module_of_the_root():
    (code_map,) = re.findall(r"^## Code map\n\n```text\n((?s:.*?))^```$", README, flags=re.MULTILINE)
    names = set(re.findall(r"^(?=\S)((?:[\w/.]+(?: {2}|$))+)", code_map, flags=re.MULTILINE))
    files = {name for line in names for name in line.split()}
    for name in files:
        assert (ROOT / name).exists(), name
    assert {path.name for path in ROOT.glob("*.py")} <= files


def test_recipes_name_what_the_code_has():
    code = "\n".join(path.read_text() for folder in ("", "*/") for path in ROOT.glob(f"{folder}*.py"))
    words = set(re.findall(r"\w+", code))
    for name in re.findall(r"`([\w/.]+)`", PAGES[ROOT / "docs/contributing.md"]):
        if name.endswith((".py", ".md")):
            assert (ROOT / name).exists(), name
        elif re.fullmatch(r"\w+(\.\w+)*", name) and not name.endswith("json"):
            assert set(name.split(".")) <= words, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_narrow(page):
    for line in FENCED.sub("", PAGES[page]).splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
            assert max(len(cell) for cell in cells) <= LONGEST_CELL, line
        elif " " in line.strip("- ") and not line.startswith("["):  # a word may be longer, such as an arch string
            assert len(line) <= LONGEST_LINE, line
