"""Fixtures that several test files use."""

import gc
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before torch is imported: small networks are fastest so, and processes that are compared have to agree on it.
os.environ["OMP_NUM_THREADS"] = "1"
# A script that runs the tests in the background, or nohup, has them ignore signals that tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Python's collector would look through the many objects of torch and pytest again and again: a tenth of all the time.
gc.set_threshold(100_000)


def pytest_collection_finish():
    """Leave out of all later collections what there is before the first test."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data():
    """Path of a file or folder that is no part of the project (large or third-party data); skips where it is absent.

    EVNAS_TEST_DATA names the folder they are in; without it, `shared/data` beside the project is looked at.
    """
    folder = Path(os.environ.get("EVNAS_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared/data")

    def find(name):
        if not (folder / name).exists():
            pytest.skip(f"needs {name}, which is not in {folder} (EVNAS_TEST_DATA names the folder)")
        return folder / name

    return find


@pytest.fixture(params=["cpu", "gpu", pytest.param("gpu-nchw", marks=pytest.mark.slow)])
def kernels(request, monkeypatch):
    """The fast paths as they are on the CPU; with the kernels that GPUs run; with these and the other layout."""
    import fast_ops
    import fast_search
    import nas201.fast_search
    import operations
    from support import devices

    if request.param != "cpu":
        for module in (operations, fast_ops, fast_search, nas201.fast_search):
            monkeypatch.setattr(module, "on_cpu", lambda x: False)
    if request.param == "gpu-nchw":
        monkeypatch.setattr(devices, "CHANNELS_LAST", ())


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """`fails(main, argv, *named)`: main must end with exit code 2 and one line, and write no file.

    The line must have all of `named`. Returns the line.
    """
    monkeypatch.chdir(tmp_path)

    def run(main, argv, *named, new_files=False):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in argv])
        stderr = capsys.readouterr().err
        assert stopped.value.code == 2, stderr
        assert stderr.startswith("error: ") and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
        for name in named:
            assert str(name) in stderr, stderr
        assert new_files or sorted(tmp_path.rglob("*")) == before
        return stderr

    return run


@pytest.fixture(scope="session")
def write_images():
    """`write_images(root, "train", per_class, sizes)`: writes random images to ROOT/train/CLASS/.

    `sizes` (width, height) and `suffixes` are taken in turn; every second image is grey. Classes differ in brightness.
    """

    def write(root, split, per_class, sizes, suffixes=(".jpg",), classes=("ant", "bee", "cat")):
        random = np.random.RandomState(len(split))
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                width, height = sizes[i % len(sizes)]
                pixels = random.randint(70 * label, 70 * label + 90, (height, width, 3)).astype(np.uint8)
                image = Image.fromarray(pixels)
                (image.convert("L") if i % 2 else image).save(folder / f"{i}{suffixes[i % len(suffixes)]}")

    return write


@pytest.fixture
def make_images(tmp_path, write_images):
    """`make_images("train", per_class, sizes)`: as `write_images`, below tmp_path/images; returns that folder."""

    def make(split, per_class, sizes, suffixes=(".jpg",), **settings):
        write_images(tmp_path / "images", split, per_class, sizes, suffixes, **settings)
        return tmp_path / "images"

    return make


def draw_no_charts(patch=setattr):
    """Have reports with only the titles of charts and cells: drawing takes longer than a tiny run."""
    import nas201.report
    from reporting import report, results

    for module in (report, nas201.report):
        patch(module, "chart", lambda rows, title, *_, **__: title)
    for module in (results, nas201.report):
        patch(module, "scatter", lambda title, *_: title)
    for module in (results, report):
        patch(module, "cell_svg", lambda drawing: drawing.title)
    patch(report, "write_cell", write_titles)


def write_titles(folder, cell, views):
    """Write the files of `reporting.cells.write_cell`, with a title in place of each drawing."""
    from reporting.views import drawings_of

    for name, drawing in drawings_of(cell, views, "").items():
        (folder / f"{name}.svg").write_text(drawing.title)


def describe_cells(patch=setattr):
    """Have every drawing of a cell hold only the title and the description in words, for runs that are only compared.

    Drawing the cells of a tiny run takes as long as training its networks.
    """
    from reporting import cells

    patch(cells, "cell_figure", lambda drawing: None)
    patch(cells, "svg_of", lambda figure, title, description: f"<svg><title>{title}</title>{description}</svg>")


@pytest.fixture
def quick_report(monkeypatch):
    draw_no_charts(monkeypatch.setattr)


@pytest.fixture(scope="module")
def quick_reports():
    """As `quick_report`, for the runs of a module's fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        draw_no_charts(patch.setattr)
        yield


@pytest.fixture
def quick_drawing(quick_report, monkeypatch):
    """As `quick_report`, and the cells are described in words."""
    describe_cells(monkeypatch.setattr)


@pytest.fixture(scope="module")
def quick_drawings(quick_reports):
    """As `quick_drawing`, for the runs of a module's fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        describe_cells(patch.setattr)
        yield


@pytest.fixture(scope="module")
def tiny_supernet():
    """Searches of the DARTS space with --plain use `helpers.TinySupernet`, for tests of what is around the supernet."""
    import train_search

    from helpers import TinySupernet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_search, "Network", TinySupernet)
        yield
