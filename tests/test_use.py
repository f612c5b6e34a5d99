"""A retrained network in use: retrained.load, predict.py, export.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import export
import genotype_files
import genotypes
import loaders
import predict
import retrained
from augment import Augmentation
from support import weights
from support.files import UserError

from helpers import CLASSES, MEAN, RETRAINED_CELLS, STD, retrained_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pictures(make_images):
    """Test images of mixed sizes, every second one grey."""
    return make_images("test", 3, [(40, 30), (33, 60)], suffixes=[".png"])


@pytest.mark.parametrize("family", RETRAINED_CELLS)
def test_a_run_is_loaded_with_its_transform(tmp_path, pictures, family):
    original = retrained_run(tmp_path / "run", family, pictures)
    network, transform = retrained.load(tmp_path / "run")
    assert not network.training
    side = 32 if family == "imagenet" else 16
    read = datasets.list_files if family == "imagenet" else datasets.load_images
    split = read("folder", pictures, "test", image_size=side)
    loader = loaders.make_loader(split, 9, Augmentation(MEAN, STD), torch.device("cpu"))
    ((x, _),) = list(loader)
    paths = sorted(pictures.glob("test/*/*"))
    made = torch.stack([transform(path) for path in paths])
    torch.testing.assert_close(made, x)  # as in a test
    torch.testing.assert_close(transform(Image.open(paths[0])), x[0])
    torch.testing.assert_close(network(made)[0], original(x)[0])


def test_an_auxiliary_head_is_not_loaded(tmp_path, pictures):
    sizes = {"init_channels": 4, "layers": 3, "auxiliary": True}
    original = retrained.make_network(retrained.NetworkSettings(genotypes.EvNASB, "cifar", 3, [32, 32], **sizes))
    about = {
        "genotype": genotype_files.to_json(genotypes.EvNASB),
        "classes": CLASSES,
        "mean": MEAN,
        "std": STD,
        **sizes,
    }
    weights.save_weights(original, tmp_path / "w.pt", about | {"image_size": [32, 32], "family": "cifar"})
    network, _ = retrained.load(tmp_path / "w.pt")
    x = torch.randn(2, 3, 32, 32)
    assert network.auxiliary_head is None and torch.equal(network(x)[0], original.eval()(x)[0])


def test_onnx_is_read_from_any_path(tmp_path):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    shape = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [2])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["images"], ["logits"])], "g", [shape], [logits])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    path = tmp_path / os.fsdecode(b"\xff.onnx")
    path.write_bytes(model.SerializeToString())
    assert export.run_onnx(path, torch.ones(2)).tolist() == [-1, -1]


def test_predictions_are_the_networks_probabilities(tmp_path, pictures, capsys, fails):
    network = retrained_run(tmp_path / "run", "cifar", pictures)
    _, transform = retrained.load(tmp_path / "run")
    capsys.readouterr()
    single = pictures / "test/cat/1.png"
    predict.main([str(tmp_path / "run"), "--json", str(single), str(pictures), "--device", "cpu"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(single), *map(str, sorted(pictures.glob("test/*/*")))]
    for line in lines:
        with torch.no_grad():
            probabilities = network(transform(line["image"])[None])[0].softmax(1)[0]
        assert line["classes"] == pytest.approx(dict(zip(CLASSES, probabilities.tolist(), strict=True)))
        assert list(line["classes"].values()) == sorted(line["classes"].values(), reverse=True)
    predict.main([str(tmp_path / "run/weights/weights.pt"), str(single)])
    text = capsys.readouterr().out
    best, percent = next(iter(lines[0]["classes"].items()))
    assert text.splitlines()[:2] == [str(single), f"  {100 * percent:6.2f} %  {best}"]

    (tmp_path / "ruined").mkdir()
    with torch.no_grad():
        network.classifier.weight.fill_(3e38)
    about = json.loads((tmp_path / "run/weights/weights.json").read_text())
    weights.save_weights(network, tmp_path / "ruined/weights.pt", about)
    line = fails(predict.main, [tmp_path / "ruined/weights.pt", single])
    assert f"{single}: the network's logits are not finite" in line
    (tmp_path / "empty").mkdir()
    assert "has no images" in fails(predict.main, [tmp_path / "run", tmp_path / "empty"])
    assert "nothing holds no weights" in fails(predict.main, [tmp_path / "nothing", single])
    (tmp_path / "run/weights/weights.json").unlink()
    assert "weights.json" in fails(predict.main, [tmp_path / "run", single])


def test_an_image_that_cannot_be_read_is_skipped(tmp_path, pictures, capsys):
    """What can be read is classified all the same; the exit code says that something was lost."""
    retrained_run(tmp_path / "run", "cifar", pictures)
    (pictures / "test/bee/1.png").write_bytes(b"no image")
    (pictures / "test/lost").symlink_to("nowhere")
    for flags in ([], ["--json"]):
        argv = [tmp_path / "run", *flags, tmp_path / "run/args.json", pictures, "--device", "cpu"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            predict.main([str(word) for word in argv])
        output, errors = capsys.readouterr()
        assert stopped.value.code == 1
        *skipped, last = errors.splitlines()
        assert all(line.startswith("skipped: cannot read ") for line in skipped) and len(skipped) == 3
        for name in ("test/lost", "run/args.json", "test/bee/1.png"):
            assert sum(f"{tmp_path}/" in line and name in line for line in skipped) == 1
        assert last.startswith("error: 3 ")
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["image"] for line in lines] == [
        str(path) for path in sorted(pictures.glob("test/*/*")) if path.name != "1.png" or path.parent.name != "bee"
    ]
    assert all(line["classes"].keys() == set(CLASSES) for line in lines)

    with pytest.raises(UserError, match="cannot read image"):  # from Python, unless asked to skip
        list(predict.predict(*retrained.load(tmp_path / "run"), [pictures / "test/bee/1.png"], CLASSES, "cpu"))


def test_at_most_five_classes(capsys):
    network = lambda x: (torch.tensor([[0.0, 6, 5, 4, 3, 2, 1]]), None)  # noqa: E731
    ((_, best),) = predict.predict(network, lambda path: torch.zeros(3, 4, 4), ["x"], list("abcdefg"), "cpu")
    assert [name for name, _ in best] == list("bcdef")


# ---- export

# Runs in another folder, without this project: prints the logits of the images in x.npy, as the file computes them.
READ = {
    "torch": "import torch; f = torch.export.load('F').module(); run = lambda x: f(torch.from_numpy(x)).numpy()",
    "onnx": "import onnxruntime; f = onnxruntime.InferenceSession('F'); run = lambda x: f.run(None, {'images': x})[0]",
}


CASES = [("nas201", "torch", True), ("nas201", "onnx", False), ("cifar", "torch", False), ("cifar", "onnx", True)]
CASES += [("imagenet", "torch", True), ("imagenet", "onnx", False)]


@pytest.mark.parametrize(
    ("family", "format", "normalize", "alone"),
    [("nas201", "torch", True, False), *[pytest.param(*case, True, marks=pytest.mark.slow) for case in CASES]],
)
def test_an_exported_file_needs_no_code_of_ours(
    tmp_path, pictures, capsys, monkeypatch, family, format, normalize, alone
):
    if format == "onnx":
        pytest.importorskip("onnxscript")
        onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network, side = retrained_run(tmp_path / "run", family, pictures), 32 if family == "imagenet" else 16
    file = tmp_path / "run" / export.FORMATS[format].file
    flags, source = ["--normalize"], tmp_path / "run"
    if not normalize:
        file, source = tmp_path / "own.file", tmp_path / "run/weights/weights.pt"
        flags = ["--output", str(file)]
    export.main([str(source), "--format", format, *flags])
    assert "9 test images" in capsys.readouterr().out.splitlines()[-1]
    pixels = np.random.RandomState(0).rand(5, 3, side, side).astype(np.float32)
    (tmp_path / "elsewhere").mkdir()
    np.save(tmp_path / "elsewhere/x.npy", pixels)
    program = READ[format].replace("F", str(file)) + "; import numpy as np; x = np.load('x.npy')"
    program += "; np.save('y.npy', np.concatenate([run(x), run(x[:1])]))"
    monkeypatch.chdir(tmp_path / "elsewhere")
    if alone:
        monkeypatch.delenv("PYTHONPATH", raising=False)
        subprocess.run([sys.executable, "-c", program], check=True)
    else:
        exec(program, {})
    x = torch.from_numpy(pixels)
    if normalize:
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = network(x)[0].numpy()
    expected = np.concatenate([expected, expected[:1]])
    assert np.load(tmp_path / "elsewhere/y.npy") == pytest.approx(expected, abs=1e-5 * float(np.abs(expected).max()))

    if format == "onnx":
        metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    else:
        extra = {"metadata.json": ""}
        torch.export.load(file, extra_files=extra)
        metadata = json.loads(extra["metadata.json"])
    assert metadata["classes"] == CLASSES and metadata["mean"] == list(MEAN)
    assert metadata["genotype"] == genotype_files.to_json(RETRAINED_CELLS[family]) and "torch" in metadata["versions"]
    assert f"(batch, 3, {side}, {side})" in metadata["input"] and ("[0, 1]" in metadata["input"]) == normalize


def test_a_file_that_computes_something_else_is_not_written(tmp_path, pictures, fails, monkeypatch):
    retrained_run(tmp_path / "run", "nas201", pictures)
    broken = export.Format("network.pt2", lambda *_: b"", lambda path, x: torch.zeros(len(x), 3))
    monkeypatch.setitem(export.FORMATS, "torch", broken)
    assert "is not written" in fails(export.main, [tmp_path / "run", "--format", "torch"])
    (tmp_path / "run/args.json").write_text("[]")
    assert "give --data" in fails(export.main, [tmp_path / "run", "--format", "torch"])
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    line = fails(export.main, [tmp_path / "run", "--format", "onnx", "--data", pictures])
    assert "pip install onnx onnxscript onnxruntime" in line


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("family", RETRAINED_CELLS)
def test_the_logits_alone_can_be_traced(tmp_path, pictures, family):
    network, side = retrained_run(tmp_path / "run", family, pictures), 32 if family == "imagenet" else 16
    module, x = export.Logits(network, MEAN, STD), torch.rand(3, 3, side, side)
    traced = torch.jit.trace(module, x[:2])
    torch.testing.assert_close(traced(x), module(x))


# ---- docs/your-data.md and docs/deploy.md


@pytest.mark.slow
def test_the_walk_from_pictures_to_a_file(tmp_path, make_images):
    """On pictures of mixed sizes, grey and 16-bit ones among them; the Python lines of the page on its run."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    make_images("train", 12, [(40, 30), (33, 60), (80, 80)], suffixes=[".png", ".jpg"])
    folder = make_images("test", 4, [(90, 31)], suffixes=[".png"])
    for split in ("train", "test"):
        deep = np.random.RandomState(0).randint(0, 65536, (50, 41)).astype(np.uint16)
        Image.fromarray(deep).save(folder / split / "bee/0.png")
    for path in set(ROOT.glob("[!.]*")) - {ROOT / "runs"}:  # there the examples write
        (tmp_path / path.name).symlink_to(path)
    folder.rename(tmp_path / "pictures")
    pages = (ROOT / "docs/your-data.md").read_text() + (ROOT / "docs/deploy.md").read_text()
    blocks = re.findall(r"^```(bash|python) pictures\n((?s:.*?))^```$", pages, re.M)
    walk = "".join(block for language, block in blocks if language == "bash")
    (code,) = (block for language, block in blocks if language == "python")
    assert len(re.findall(r"^python ", walk, re.M)) == 6
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    settings = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run(["bash", "-euc", walk], **settings)
    assert done.returncode == 0, done.stderr
    assert "bee/0.png" in done.stdout and "network.onnx" in done.stdout.splitlines()[-1]
    (run,) = tmp_path.glob("runs/pictures/search-*/eval-own-*")
    names = {"run_dir": run}
    code = code.replace("picture.png", str(tmp_path / "pictures/test/bee/0.png"))
    exec(code, names)
    assert names["logits"].shape == (1, 3)
