"""Write a retrained network to a file that needs none of this code: torch.export or ONNX, any batch, logits out.

The file is loaded again and compared on test images before it takes its place.
"""

from support.cli import Parser, command  # first: it ends Ctrl-C in one line

# isort: split

import copy
import importlib.util
import io
import json
import os
from pathlib import Path

import torch
from torch import nn

import datasets
import loaders
import retrained
import splits
from augment import Augmentation
from support import distributed, runs
from support.files import UserError, atomic_write, read_bytes, read_json

ANY_BATCH = {"images": {0: torch.export.Dim("batch", max=2**31 - 1)}}  # older versions of torch need an end
TOLERANCE = 1e-5  # of the largest logit, in float32


class Logits(nn.Module):
    """A network without what only training needs: images (B, 3, H, W) to logits (B, num_classes).

    With `mean` and `std`, of three channels, it takes pixels in [0, 1] and normalises them, else normalised images.
    """

    def __init__(self, network, mean=None, std=None):
        super().__init__()
        self.network = copy.deepcopy(network)
        # A plain Linear: a Classifier leaves autocast, which would be part of the file, and older versions cannot read.
        linear, self.network.classifier = network.classifier, nn.Linear(*network.classifier.weight.shape[::-1])
        self.network.classifier.load_state_dict(linear.state_dict())
        self.normalize = mean is not None
        if self.normalize:
            self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
            self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):
        return self.network((images - self.pixel_mean) / self.pixel_std if self.normalize else images)[0]


def to_torch(module, x, metadata):
    """Return the bytes of a file of torch.export with `metadata` in its metadata.json; x (B, 3, H, W) is an example."""
    program = torch.export.export(module, (x,), dynamic_shapes=ANY_BATCH, strict=False)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
    return content.getvalue()


def run_torch(path, x):
    with open(path, "rb") as file:
        return torch.export.load(file).module()(x)


def to_onnx(module, x, metadata):
    """Return the bytes of an ONNX file with `metadata`, each value as JSON, among its properties. Raises UserError."""
    packages = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(packages)}")
    import onnx

    names = dict(input_names=["images"], output_names=["logits"])
    program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=ANY_BATCH, verbose=False, **names)
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    return model.SerializeToString()


def run_onnx(path, x):
    import onnxruntime

    # As bytes: it takes no path that is not UTF-8.
    session = onnxruntime.InferenceSession(read_bytes(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def difference(logits, expected):
    return ((logits - expected).abs().max() / expected.abs().max()).item()


FORMATS = {"torch": ("network.pt2", to_torch, run_torch), "onnx": ("network.onnx", to_onnx, run_onnx)}


def sample_images(root, path, about):
    """Return up to 16 test images, (B, 3, H, W), normalised, of the retraining that left the weights at `path`.

    Its data lie at `root`, or if that is None where its args.json says. Raises UserError where they do not.
    """
    if root is None and about.get("dataset") != "digits":
        file = path.parent.parent / "args.json"
        saved = read_json(file) if file.is_file() else None
        saved = saved.get("args") if isinstance(saved, dict) else None
        root = saved.get("data") if isinstance(saved, dict) else None
        if not isinstance(root, str):
            raise UserError("nothing says where the test images lie, with which the file is compared: give --data")
    recipe = retrained.saved_recipe(about, about["genotype"], path)
    size = about["image_size"][0] if about.get("resized") else None
    read = datasets.list_files if recipe == "imagenet" else datasets.load_images
    images = read(about.get("dataset"), root, "test", image_size=size)
    images = splits.subsample(images, min(16, len(images)), torch.Generator().manual_seed(0))
    augmentation = Augmentation(about["mean"], about["std"])
    return next(iter(loaders.make_loader(images, 16, augmentation, torch.device("cpu"))))[0].contiguous()


@command
@torch.no_grad()
def main(argv=None):
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument("run", metavar="RUN_DIR", help="a retraining's directory (its last weights), or a weights file")
    parser.add_argument("--format", required=True, choices=FORMATS, help="torch.export's, or ONNX")
    parser.add_argument("--normalize", action="store_true", help="take pixels in [0, 1], and normalise them inside")
    parser.add_argument("--output", metavar="FILE", help="(default: network.pt2 or network.onnx in RUN_DIR)")
    parser.add_argument("--data", help="where the test images for the comparison lie (default: where they did)")
    args = parser.parse_args(argv)
    weights, about = retrained.find_weights(args.run)
    network, _ = retrained.load(args.run)
    inputs = sample_images(args.data, weights, about)
    expected, _ = network(inputs)
    normalisation = [about["mean"], about["std"]] if args.normalize else []
    module = Logits(network, *normalisation).eval().requires_grad_(False)
    x = inputs * module.pixel_std + module.pixel_mean if args.normalize else inputs
    height, width = about["image_size"]
    metadata = {name: about[name] for name in ("classes", "genotype", "mean", "std")}
    metadata["input"] = f"RGB, {'in [0, 1]' if args.normalize else 'normalised'}, (batch, 3, {height}, {width})"
    metadata["versions"] = runs.versions() | {"git": runs.git_revision()}

    name, write, read = FORMATS[args.format]
    path = Path(args.output or os.path.join(args.run if os.path.isdir(args.run) else weights.parent, name))
    content = write(module, x[:1].repeat(2, 1, 1, 1), metadata)  # of a batch of 1 the size would be fixed
    with atomic_write(path) as file:
        file.write(content)
        file.flush()
        worst = max(difference(read(file.name, x[:n]), expected[:n]) for n in (len(x), 1))
        if not worst <= TOLERANCE:
            raise UserError(f"{path} is not written: its logits differ by {worst:.0e} of the largest")
    size, images = len(content) / 1e6, f"{len(x)} test images"
    distributed.say(f"{path}: {size:.1f} MB; logits of {images} equal the network's to {worst:.0e} of the largest")


if __name__ == "__main__":
    main()
