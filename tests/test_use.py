"""A retrained network in use: retrained.load, predict.py, export.py."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import datasets
import export
import genotype_files
import genotypes
import loaders
import predict
import retrained
import visualize
from augment import Augmentation
from support import weights
from support.files import UserError

from helpers import CLASSES, MEAN, RETRAINED_CELLS, STD, retrained_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pictures(make_images):
    """Test images of mixed sizes, every second one grey."""
    return make_images("test", 3, [(40, 30), (33, 60)], suffixes=[".png"])


@pytest.fixture
def run(tmp_path, pictures):
    """The directory of a retraining with the recipe cifar."""
    retrained_run(tmp_path / "run", "cifar", pictures)
    return tmp_path / "run"


def side_of(recipe):
    """Return the side of the images, in pixels, that `retrained_run` makes the network for."""
    return 32 if recipe == "imagenet" else 16


@pytest.mark.parametrize(
    "script, words",
    [(predict, ["run", "image.png"]), (export, ["run", "--format", "torch"]), (visualize, ["EvNASA"])],
)
def test_unknown_flag_is_refused_in_one_line(fails, script, words):
    assert "--bogus" in fails(script.main, [*words, "--bogus"])


# ---- retrained.load


@pytest.mark.parametrize("recipe", RETRAINED_CELLS)
def test_loaded_network_computes_the_same_logits(tmp_path, pictures, recipe):
    original = retrained_run(tmp_path / "run", recipe, pictures)
    network, _ = retrained.load(tmp_path / "run")
    x = torch.randn(2, 3, side_of(recipe), side_of(recipe))
    assert not network.training
    torch.testing.assert_close(network(x)[0], original(x)[0])


@pytest.mark.parametrize("recipe", RETRAINED_CELLS)
def test_loaded_transform_makes_the_images_of_a_test(tmp_path, pictures, recipe):
    retrained_run(tmp_path / "run", recipe, pictures)
    _, transform = retrained.load(tmp_path / "run")
    read = datasets.list_files if recipe == "imagenet" else datasets.load_images
    split = read("folder", pictures, "test", image_size=side_of(recipe))
    ((x, _),) = loaders.make_loader(split, 9, Augmentation(MEAN, STD), torch.device("cpu"))
    paths = sorted(pictures.glob("test/*/*"))
    torch.testing.assert_close(torch.stack([transform(path) for path in paths]), x)
    torch.testing.assert_close(transform(Image.open(paths[0])), x[0])


def test_auxiliary_head_is_not_loaded(tmp_path):
    sizes = {"init_channels": 4, "layers": 3, "auxiliary": True}
    settings = retrained.NetworkSettings(genotypes.EvNASB, "cifar", 3, [32, 32], **sizes)
    original = retrained.make_network(settings)
    about = {
        "family": "cifar",
        "genotype": genotype_files.to_json(genotypes.EvNASB),
        "classes": CLASSES,
        "image_size": [32, 32],
        "mean": MEAN,
        "std": STD,
        **sizes,
    }
    weights.save_weights(original, tmp_path / "w.pt", about)
    network, _ = retrained.load(tmp_path / "w.pt")
    x = torch.randn(2, 3, 32, 32)
    assert network.auxiliary_head is None
    assert torch.equal(network(x)[0], original.eval()(x)[0])


# ---- predict.py


def predict_json(capsys, *argv):
    """Run predict.py --json, and return the objects that it prints."""
    capsys.readouterr()
    predict.main(["--json", "--device", "cpu", *map(str, argv)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predictions_are_the_networks_probabilities(run, pictures, capsys):
    network, transform = retrained.load(run)
    for line in predict_json(capsys, run, pictures):
        with torch.no_grad():
            probabilities = network(transform(line["image"])[None])[0].softmax(1)[0]
        assert line["classes"] == pytest.approx(dict(zip(CLASSES, probabilities.tolist(), strict=True)))


def test_predictions_are_sorted(run, pictures, capsys):
    for line in predict_json(capsys, run, pictures):
        probabilities = list(line["classes"].values())
        assert probabilities == sorted(probabilities, reverse=True)


def test_images_are_predicted_in_the_order_of_the_arguments(run, pictures, capsys):
    single = pictures / "test/cat/1.png"
    lines = predict_json(capsys, run, single, pictures)
    assert [line["image"] for line in lines] == [str(single), *map(str, sorted(pictures.glob("test/*/*")))]


def test_text_shows_the_best_class_first(run, pictures, capsys):
    single = pictures / "test/cat/1.png"
    (line,) = predict_json(capsys, run, single)
    best, probability = next(iter(line["classes"].items()))
    predict.main([str(run / "weights/weights.pt"), str(single), "--device", "cpu"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == str(single)
    assert second.split() == [f"{100 * probability:.2f}", "%", best]


def test_table_has_the_asked_for_number_of_classes(run, pictures, capsys):
    single = pictures / "test/cat/1.png"
    (expected,) = predict_json(capsys, run, single)
    predict.main([str(run), str(single), "--device", "cpu", "--csv", "--topk", "2"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert {row["class"]: float(row["probability"]) for row in rows}.items() <= expected["classes"].items()
    assert {row["image"] for row in rows} == {str(single)}


def test_at_most_five_classes_are_predicted():
    def network(x):
        return torch.tensor([[0.0, 6, 5, 4, 3, 2, 1]]), None

    ((_, best),) = predict.predict(network, lambda path: torch.zeros(3, 4, 4), ["x"], list("abcdefg"), "cpu")
    assert [name for name, _ in best] == list("bcdef")


def test_logits_that_are_not_finite_are_an_error(tmp_path, run, pictures, fails):
    network, _ = retrained.load(run)
    with torch.no_grad():
        network.classifier.weight.fill_(3e38)
    about = json.loads((run / "weights/weights.json").read_text())
    (tmp_path / "ruined").mkdir()
    weights.save_weights(network, tmp_path / "ruined/weights.pt", about)
    single = pictures / "test/cat/1.png"
    assert str(single) in fails(predict.main, [tmp_path / "ruined/weights.pt", single])


def test_folder_without_images_is_an_error(tmp_path, run, fails):
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(predict.main, [run, tmp_path / "empty"])


def test_run_without_weights_is_an_error(tmp_path, pictures, fails):
    assert "nothing" in fails(predict.main, [tmp_path / "nothing", pictures])


def test_weights_without_a_description_are_an_error(run, pictures, fails):
    (run / "weights/weights.json").unlink()
    assert "weights.json" in fails(predict.main, [run, pictures])


@pytest.fixture
def unreadable(run, pictures):
    """Three paths that cannot be read: an argument, a file and a link in the folder of pictures."""
    (pictures / "test/bee/1.png").write_bytes(b"no image")
    (pictures / "test/lost").symlink_to("nowhere")
    return [run / "args.json", pictures / "test/bee/1.png", pictures / "test/lost"]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_unreadable_images_are_named_and_counted(run, pictures, unreadable, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        predict.main([str(word) for word in (run, *flags, unreadable[0], pictures, "--device", "cpu")])
    *skipped, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert len(skipped) == len(unreadable)
    for line in skipped:
        assert line.startswith("skipped: ")
    for path in unreadable:
        assert len([line for line in skipped if str(path) in line]) == 1
    assert last.startswith("error: 3 ")


def test_readable_images_are_predicted_next_to_unreadable_ones(run, pictures, unreadable, capsys):
    with pytest.raises(SystemExit):
        predict_json(capsys, run, unreadable[0], pictures)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    readable = [path for path in sorted(pictures.glob("test/*/*")) if path not in unreadable]
    assert [line["image"] for line in lines] == [str(path) for path in readable]
    for line in lines:
        assert line["classes"].keys() == set(CLASSES)


def test_unreadable_image_raises_from_python(run, unreadable):
    with pytest.raises(UserError):
        list(predict.predict(*retrained.load(run), [unreadable[1]], CLASSES, "cpu"))


# ---- export.py

# Runs in another folder, without this project: makes `run`, which computes logits as the file does.
READ = {
    "torch": "import torch; f = torch.export.load('F').module(); run = lambda x: f(torch.from_numpy(x)).numpy()",
    "onnx": "import onnxruntime; f = onnxruntime.InferenceSession('F'); run = lambda x: f.run(None, {'images': x})[0]",
}
# Logits of the images in x.npy, all at once and of the first alone, because files take any batch.
COMPUTE = "; import numpy as np; x = np.load('x.npy'); np.save('y.npy', np.concatenate([run(x), run(x[:1])]))"

EXPORTS = [  # recipe, format, --normalize
    ("nas201", "torch", True),
    ("nas201", "onnx", False),
    ("cifar", "torch", False),
    ("cifar", "onnx", True),
    ("imagenet", "torch", True),
    ("imagenet", "onnx", False),
]


class Exported(NamedTuple):
    """An exported retraining."""

    recipe: str
    format: str
    normalize: bool
    network: nn.Module  # of the retraining
    file: Path


@pytest.fixture(scope="module", params=[pytest.param(case, marks=pytest.mark.slow) for case in EXPORTS])
def exported(request, write_images, tmp_path_factory):
    recipe, format, normalize = request.param
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("exported")
    write_images(folder / "images", "test", 3, [(40, 30), (33, 60)], suffixes=[".png"])
    network = retrained_run(folder / "run", recipe, folder / "images")
    if normalize:
        export.main([str(folder / "run"), "--format", format, "--normalize"])
        file = folder / "run" / export.FORMATS[format].file
    else:
        file = folder / "my.file"
        export.main([str(folder / "run/weights/weights.pt"), "--format", format, "--output", str(file)])
    return Exported(recipe, format, normalize, network, file)


def random_pixels(recipe):
    """Five images of such a network, with pixels in [0, 1]."""
    return np.random.RandomState(0).rand(5, 3, side_of(recipe), side_of(recipe)).astype(np.float32)


def expected_logits(network, pixels, normalize):
    """The network's logits of these pixels, normalised as in the retraining if asked for."""
    x = torch.from_numpy(pixels)
    if normalize:
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return network(x)[0].numpy()


def assert_close(logits, expected):
    assert logits == pytest.approx(expected, abs=1e-5 * float(np.abs(expected).max()))


def compute_elsewhere(folder, program, pixels):
    """Run `program` where it cannot import this project; return the logits that it saves."""
    folder.mkdir()
    np.save(folder / "x.npy", pixels)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder, env=environment)
    return np.load(folder / "y.npy")


@pytest.mark.slow
def test_exported_file_computes_without_this_project(exported, tmp_path):
    pixels = random_pixels(exported.recipe)
    program = READ[exported.format].replace("F", str(exported.file)) + COMPUTE
    found = compute_elsewhere(tmp_path / "elsewhere", program, pixels)
    expected = expected_logits(exported.network, pixels, exported.normalize)
    assert_close(found, np.concatenate([expected, expected[:1]]))


@pytest.mark.slow
@pytest.mark.parametrize("exported", [EXPORTS[0]], indirect=True, scope="module")
def test_exported_file_computes_the_networks_logits(exported):
    pixels = random_pixels(exported.recipe)
    found = export.run_torch(exported.file, torch.from_numpy(pixels)).detach().numpy()
    assert_close(found, expected_logits(exported.network, pixels, exported.normalize))


def read_metadata(file, format):
    if format == "onnx":
        onnx = pytest.importorskip("onnx")
        return {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    content = {"metadata.json": ""}
    torch.export.load(file, extra_files=content)
    return json.loads(content["metadata.json"])


def test_exported_file_describes_itself(exported):
    metadata = read_metadata(exported.file, exported.format)
    side = side_of(exported.recipe)
    assert metadata["classes"] == CLASSES
    assert metadata["mean"] == list(MEAN)
    assert metadata["genotype"] == genotype_files.to_json(RETRAINED_CELLS[exported.recipe])
    assert "torch" in metadata["versions"]
    assert f"(batch, 3, {side}, {side})" in metadata["input"]
    assert ("[0, 1]" in metadata["input"]) == exported.normalize


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("recipe", RETRAINED_CELLS)
def test_module_to_export_computes_the_networks_logits(tmp_path, pictures, recipe, normalize):
    network = retrained_run(tmp_path / "run", recipe, pictures)
    module = export.Logits(network, MEAN, STD) if normalize else export.Logits(network)
    pixels = random_pixels(recipe)
    found = module(torch.from_numpy(pixels)).detach().numpy()
    assert_close(found, expected_logits(network, pixels, normalize))


def test_file_with_other_logits_is_not_written(tmp_path, pictures, fails, monkeypatch):
    retrained_run(tmp_path / "run", "nas201", pictures)
    broken = export.Format("network.pt2", lambda *_: b"", lambda path, x: torch.zeros(len(x), 3))
    monkeypatch.setitem(export.FORMATS, "torch", broken)
    assert "network.pt2" in fails(export.main, [tmp_path / "run", "--format", "torch"])


def test_unknown_folder_of_the_test_images_is_asked_for(run, fails):
    (run / "args.json").write_text("[]")
    assert "--data" in fails(export.main, [run, "--format", "torch"])


def test_missing_packages_of_onnx_are_named(run, pictures, fails, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    line = fails(export.main, [run, "--format", "onnx", "--data", pictures])
    assert "pip install onnx onnxscript onnxruntime" in line


def test_onnx_file_is_run_from_any_path(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    shape = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [2])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["images"], ["logits"])], "g", [shape], [logits])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    path = tmp_path / os.fsdecode(b"\xff.onnx")
    path.write_bytes(model.SerializeToString())
    assert export.run_onnx(path, torch.ones(2)).tolist() == [-1, -1]


# ---- docs/your-data.md and docs/deploy.md


@pytest.mark.slow
def test_commands_of_the_docs_lead_from_pictures_to_a_file(tmp_path, make_images):
    """The pictures have mixed sizes; some are grey, and two have 16 bits."""
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
    (onnx_code,) = re.findall(r"^```python onnx\n((?s:.*?))^```$", pages, re.M)
    blocks = re.findall(r"^```(bash|python) pictures\n((?s:.*?))^```$", pages, re.M)
    walk = "".join(block for language, block in blocks if language == "bash")
    (code,) = (block for language, block in blocks if language == "python")
    assert len(re.findall(r"^python ", walk, re.M)) == 6
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    settings = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run(["bash", "-euc", walk], **settings)
    assert done.returncode == 0, done.stderr
    assert "bee/0.png" in done.stdout
    assert "network.onnx" in done.stdout.splitlines()[-1]
    (run,) = tmp_path.glob("runs/pictures/search-*/eval-own-*")
    names = {"run_dir": run}
    code = code.replace("picture.png", str(tmp_path / "pictures/test/bee/0.png"))
    exec(code, names)
    assert names["logits"].shape == (1, 3)
    picture = tmp_path / "pictures/test/ant/1.png"
    onnx_code = onnx_code.replace("network.onnx", str(run / "network.onnx")).replace("picture.png", str(picture))
    exec(onnx_code, onnx_names := {})
    with torch.no_grad():
        expected = names["network"](names["transform"](picture)[None])[0].numpy()
    assert onnx_names["logits"] == pytest.approx(expected, abs=1e-4 * float(np.abs(expected).max()))
