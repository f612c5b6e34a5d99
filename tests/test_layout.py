"""Imports point one way: scripts, then the method, then support; only scripts use reporting."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "train_search",
    "train",
    "test_cifar",
    "test_cifar100",
    "test_imagenet",
    "visualize",
    "predict",
    "export",
    "summary",
}
SHARED = {"retrained", "views"}  # of scripts: they know both spaces
METHOD = {
    "model_search",
    "model",
    "operations",
    "genotypes",
    "genotype_files",
    "encoding",
    "evolution",
    "training",
    "fitness",
    "fast_search",
    "fast_ops",
    "cell_tensors",
    "fused_search",
    "triton_kernels",
    "costs",
    "datasets",
    "image_folder",
    "imagenet16",
    "class_names",
    "class_results",
    "splits",
    "augment",
    "loaders",
    "memory",
    "recipes",
    "utils",
    "run_settings",
    "populations",
    "remembered",
    "seed_roles",
    "shared_flags",
}
SEARCHES = {
    "search_cli",
    "search_space",
    "search_state",
    "baselines",
    "individuals",
}  # a space has its view, and a search ends with its report
S2_SCRIPTS = {
    "nas201.train_search",
    "nas201.benchmark",
    "nas201.simulate",
    "nas201.summary",
    "nas201.report",
    "nas201.rank_all",
}


@functools.cache
def imports_of_modules():
    """The modules of this project that each module imports, at the top or within a function."""
    imports = {}
    paths = [path for folder in ("", "support/", "reporting/", "nas201/") for path in ROOT.glob(f"{folder}*.py")]
    for path in paths:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name for name in inside if (ROOT / f"{name.replace('.', '/')}.py").exists()] or [node.module]
            own = {name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists()}
            imports.setdefault(module, set()).update(own)
    return imports


# Words of EvNAS and its data, also as parts of names: `support` serves any program.
FOREIGN = re.compile(
    r"evnas|darts|nas_?201|imagenet|cifar|genotype|fitness|generations?(?![a-z])|alphas|auxiliary|recipe|population"
    r"|archit|(?<![a-z])arch(?![a-z])|baseline|supernet|individual|mutat|crossover|elite|retrain"
    r"|(?<![a-z])cells?(?![a-z])",
    re.IGNORECASE,
)


def test_support_contains_no_word_of_evnas():
    """Neither in names nor in strings, comments and docstrings."""
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted((ROOT / "support").glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if FOREIGN.search(line)
    ]
    assert found == []


def test_every_root_module_has_a_place_in_the_layout():
    root = {module for module in imports_of_modules() if "." not in module}
    assert METHOD | SCRIPTS | SHARED | SEARCHES >= root, root - METHOD - SCRIPTS - SHARED - SEARCHES


def test_imports_point_one_way():
    for module, imports in imports_of_modules().items():
        packages = {name.split(".")[0] for name in imports}
        if module.startswith("support."):
            assert packages <= {"support"}, module
        elif module in METHOD:
            assert packages <= METHOD | {"support"}, module
        elif module.startswith("reporting."):
            assert packages <= METHOD | {"support", "reporting"}, module
        if "reporting" in packages and not module.startswith("reporting."):
            assert module in SCRIPTS | S2_SCRIPTS | SEARCHES | {"views"}, module
        if "nas201" in packages and not module.startswith("nas201."):
            assert module in SCRIPTS | SHARED, module


@pytest.mark.slow
def test_help_imports_no_more_than_it_needs():
    """torch is needed for the flags. What draws, logs and reads data sets is imported later."""
    scripts = "import sys, train_search, train, nas201.train_search, test_cifar\n"
    scripts += "for script in (train_search, train, nas201.train_search, test_cifar):\n"
    scripts += "    try: script.main(['--help'])\n    except SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", scripts + "print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert done.stdout.count("usage:") == 4, done.stderr
    assert "torch" in loaded
    assert not loaded & {"matplotlib", "torchvision", "sklearn", "scipy", "tensorboard"}


def test_there_is_no_circle():
    done = set()
    while ready := {module for module, imports in imports_of_modules().items() if imports <= done} - done:
        done |= ready
    assert done == set(imports_of_modules())
