"""Export a retrained network to a file that needs none of this code: a torch.export or an ONNX file.

The exported file takes a batch of any size and returns logits. Before the file is kept, it is
loaded again, and its logits are compared with the network's on test images.

Example: python export.py runs/eval-EXP-20260101-120000 --format onnx --normalize
"""

from support.cli import Parser, command

import copy
import importlib.util
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import datasets
import loaders
import retrained
from augment import Augmentation
from retrained import SavedWeights
from splits import subsample
from support import distributed, provenance
from support.files import UserError, atomic_write, read_bytes, read_json

ANY_BATCH = {"images": {0: torch.export.Dim("batch", max=2**31 - 1)}}  # some versions of torch need a maximum
TOLERANCE = 1e-5  # largest difference of logits that is allowed, as a share of the largest logit, in float32
SAMPLES = 16  # test images on which the file is compared with the network


class Logits(nn.Module):
    """A network for inference, without the parts that only training needs.

    It computes logits (B, num_classes) from images (B, 3, H, W). With the `mean` and `std` of the
    three channels, it takes pixels in [0, 1] and normalises them. Without `mean` and `std`, it
    takes normalised images.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        self.network = copy.deepcopy(network)
        # Our Classifier switches autocast off. Exporting would write the switch into the file, and
        # some versions of torch and ONNX cannot read it. A plain Linear computes the same logits in
        # float32.
        classifier = network.classifier
        self.network.classifier = nn.Linear(classifier.in_features, classifier.out_features)
        self.network.classifier.load_state_dict(classifier.state_dict())
        self.normalize = mean is not None
        if self.normalize:
            self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
            self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.normalize:
            images = (images - self.pixel_mean) / self.pixel_std
        logits, _ = self.network(images)
        return logits


# ---- file formats


def to_torch(module: Logits, x: Tensor, metadata: dict) -> bytes:
    """Return the bytes of a torch.export file.

    `metadata` becomes the file's metadata.json. `x` is an example batch of images (B, 3, H, W).
    """
    program = torch.export.export(module, (x,), dynamic_shapes=ANY_BATCH, strict=False)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
    return content.getvalue()


def run_torch(path: str | Path, x: Tensor) -> Tensor:
    """Return the logits that a torch.export file computes for images (B, 3, H, W)."""
    with open(path, "rb") as file:
        return torch.export.load(file).module()(x)


def to_onnx(module: Logits, x: Tensor, metadata: dict) -> bytes:
    """Return the bytes of an ONNX file. Each value of `metadata` becomes a property of the model, as JSON.

    `x` is an example batch of images (B, 3, H, W). Raises UserError if a package is not installed.
    """
    packages = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(packages)}")
    import onnx

    program = torch.onnx.export(
        module,
        (x,),
        dynamo=True,
        dynamic_shapes=ANY_BATCH,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    return model.SerializeToString()


def run_onnx(path: str | Path, x: Tensor) -> Tensor:
    """Return the logits that an ONNX file computes for images (B, 3, H, W)."""
    import onnxruntime

    # onnxruntime does not accept a path that is not UTF-8, so we pass the content of the file.
    session = onnxruntime.InferenceSession(read_bytes(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


class Format(NamedTuple):
    """A file format: how to write a file and how to run it."""

    file: str  # default name of the file
    write: Callable[[Logits, Tensor, dict], bytes]
    run: Callable[[str | Path, Tensor], Tensor]


FORMATS = {"torch": Format("network.pt2", to_torch, run_torch), "onnx": Format("network.onnx", to_onnx, run_onnx)}


# ---- comparison


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference between logits, as a share of the largest expected logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def sample_images(root: str | None, saved: SavedWeights) -> Tensor:
    """Return up to 16 normalised test images (B, 3, H, W) of the data set that the network was retrained on.

    `root` is the folder of the data set. If it is None, the folder is taken from the run's
    args.json. Raises UserError if args.json does not name the folder.
    """
    path, about = saved
    if root is None and about.get("dataset") != "digits":
        root = saved_data_folder(path)
    recipe = retrained.saved_recipe(about, about["genotype"], path)
    size = about["image_size"][0] if about.get("resized") else None
    read = datasets.list_files if recipe == "imagenet" else datasets.load_images
    images = read(about.get("dataset"), root, "test", image_size=size)
    images = subsample(images, min(SAMPLES, len(images)), torch.Generator().manual_seed(0))
    augmentation = Augmentation(about["mean"], about["std"])
    x, _ = next(iter(loaders.make_loader(images, SAMPLES, augmentation, torch.device("cpu"))))
    return x.contiguous()


def saved_data_folder(weights: Path) -> str:
    """Return the value of --data in the run that these weights belong to. Raises UserError if it was not saved."""
    file = weights.parent.parent / "args.json"
    content = read_json(file) if file.is_file() else None
    args = content.get("args") if isinstance(content, dict) else None
    folder = args.get("data") if isinstance(args, dict) else None
    if not isinstance(folder, str):
        raise UserError(
            f"{file} does not say where the data set is, and the data set's test images are needed to check the "
            "exported file: give --data DIR"
        )
    return folder


# ---- command line


def make_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__)
    text = "directory of a retraining (its last weights are exported), or a weights file in this directory"
    parser.add_argument("run", metavar="RUN_DIR", help=text)
    text = "torch: a file for torch.export.load; onnx: a file for ONNX Runtime and other engines"
    parser.add_argument("--format", required=True, choices=FORMATS, help=text)
    text = "put the normalisation into the file, so that it takes pixels in [0, 1] instead of normalised images"
    parser.add_argument("--normalize", action="store_true", help=text)
    text = "file to write (default: network.pt2 or network.onnx in RUN_DIR)"
    parser.add_argument("--output", metavar="FILE", help=text)
    text = "folder of the data set; the file is checked on its test images (default: the folder used in training)"
    parser.add_argument("--data", metavar="DIR", help=text)
    return parser


@command
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    saved = retrained.find_weights(args.run)
    about = saved.about
    network, _ = retrained.load(args.run)
    images = sample_images(args.data, saved)
    expected, _ = network(images)
    if args.normalize:
        module = Logits(network, about["mean"], about["std"])
        x = images * module.pixel_std + module.pixel_mean  # pixels in [0, 1]
        input_values = "in [0, 1]"
    else:
        module = Logits(network)
        x = images
        input_values = "normalised"
    module = module.eval().requires_grad_(False)
    height, width = about["image_size"]
    metadata = {
        "classes": about["classes"],
        "genotype": about["genotype"],
        "mean": about["mean"],
        "std": about["std"],
        "image_size": [height, width],
        "recipe": about["family"],
        "input": f"RGB, {input_values}, (batch, 3, {height}, {width})",
        "versions": provenance.versions() | {"git": provenance.git_revision()},
    }

    chosen = FORMATS[args.format]
    folder = args.run if os.path.isdir(args.run) else saved.path.parent
    path = Path(args.output or os.path.join(folder, chosen.file))
    example = x[:1].repeat(2, 1, 1, 1)  # a batch of 1 would be exported as a fixed size
    content = chosen.write(module, example, metadata)
    with atomic_write(path) as file:
        file.write(content)
        file.flush()
        errors = [relative_error(chosen.run(file.name, x[:n]), expected[:n]) for n in (len(x), 1)]
        if not all(error <= TOLERANCE for error in errors):  # written so that NaN fails too
            raise UserError(
                f"{path} is not written: its logits differ from the network's by {max(errors):.0e} of the largest "
                f"logit, and at most {TOLERANCE:.0e} is allowed. Try another version of torch or the other --format"
            )
    distributed.say(
        f"{path}: {len(content) / 1e6:.1f} MB; on {len(x)} test images its logits differ from the network's "
        f"by at most {max(errors):.0e} of the largest logit"
    )


if __name__ == "__main__":
    main()
