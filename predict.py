"""Classify images with a retrained network: the five best classes of each, with their probabilities."""

from support.cli import Parser, command  # first: it ends Ctrl-C in one line

# isort: split

import json
import os
from pathlib import Path

import torch

import testing
from support import devices, distributed
from support.files import UserError
from support.images import SUFFIXES


def images_in(path):
    """Return the image files at or below `path`, in the order of their names. Raises UserError if there is none."""
    if not os.path.isdir(path):
        return [Path(path)]
    found = sorted(file for file in Path(path).rglob("[!.]*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"folder {path} has no images ({', '.join(SUFFIXES)})")
    return found


@torch.no_grad()
def predict(network, transform, paths, classes, device):
    """Yield the path of each image, and its five best (class, probability), best first."""
    for path in paths:
        logits, _ = network(transform(path)[None].to(device))
        probabilities, labels = logits[0].softmax(0).topk(min(5, len(classes)))
        yield path, [(classes[label], p) for label, p in zip(labels.tolist(), probabilities.tolist(), strict=True)]


@command
def main(argv=None):
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("run", metavar="RUN_DIR", help="a retraining's directory (its last weights), or a weights file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead")
    devices.add_device_arguments(parser)
    parser.set_defaults(amp=False, compile=False)
    args = parser.parse_args(argv)
    _, about = testing.read_about(args.run)
    network, transform = testing.load(args.run)
    device = devices.choose_device(args)
    paths = [path for name in args.images for path in images_in(name)]
    for path, best in predict(network.to(device), transform, paths, about["classes"], device):
        if args.json:
            distributed.say(json.dumps({"image": str(path), "classes": dict(best)}))
        else:
            for line in (str(path), *(f"  {100 * p:6.2f} %  {name}" for name, p in best)):
                distributed.say(line)


if __name__ == "__main__":
    main()
