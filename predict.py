"""Classify images with a retrained network: the five best classes of each, with their probabilities."""

from support.cli import Parser, command  # first: it ends Ctrl-C in one line

# isort: split

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import image_folder
import retrained
from support import devices, distributed
from support.files import UserError
from support.images import SUFFIXES


def images_in(path: str) -> tuple[list[Path], list[str]]:
    """Return the images that an argument names, in the order of their paths.

    These are the file itself, whatever its suffix, or the images in the folder and in all folders
    below it: see `image_folder.walk`. The second list has an error message for each folder or link
    that cannot be read. Raises UserError for a folder without images.
    """
    if not os.path.isdir(path):
        return [Path(path)], []
    listings = list(image_folder.walk(Path(path)))
    images = sorted(image for listing in listings for image in listing.images)
    unreadable = [message for listing in listings for message in listing.unreadable.values()]
    if not images:
        reason = f": {unreadable[0]}" if unreadable else f" ({', '.join(SUFFIXES)})"
        raise UserError(f"folder {path} has no images{reason}")
    return images, unreadable


@torch.no_grad()
def predict(network, transform, paths, classes, device, skip: Callable[[str], None] | None = None):
    """Yield the path of each image, and its five best (class, probability), best first.

    If an image cannot be read, `skip` is called with the error message, and the next image follows.
    Without `skip`, UserError is raised. So it is for an image whose logits are not finite.
    """
    for path in paths:
        try:
            x = transform(path)[None].to(device)
        except UserError as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        logits, _ = network(x)
        if not logits.isfinite().all():
            raise UserError(f"{path}: the network's logits are not finite, so there is no answer; retrain the network")
        probabilities, labels = logits[0].softmax(0).topk(min(5, len(classes)))
        yield path, [(classes[label], p) for label, p in zip(labels.tolist(), probabilities.tolist(), strict=True)]


@command
def main(argv=None):
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("run", metavar="RUN_DIR", help="a retraining's directory (its last weights), or a weights file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them, to any depth")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead")
    devices.add_device_arguments(parser)
    parser.set_defaults(amp=False, compile=False)
    args = parser.parse_args(argv)
    _, about = retrained.find_weights(args.run)
    network, transform = retrained.load(args.run)
    device = devices.choose_device(args)
    skipped = []

    def skip(message):
        skipped.append(message)
        distributed.say(" ".join(f"skipped: {message}".split()), file=sys.stderr)

    paths = []
    for name in args.images:
        images, unreadable = images_in(name)
        paths += images
        for message in unreadable:
            skip(message)
    for path, best in predict(network.to(device), transform, paths, about["classes"], device, skip):
        if args.json:
            distributed.say(json.dumps({"image": str(path), "classes": dict(best)}))
        else:
            for line in (str(path), *(f"  {100 * p:6.2f} %  {name}" for name, p in best)):
                distributed.say(line)
    if skipped:
        where = "the lines that begin with `skipped` name them"
        distributed.say(f"error: {len(skipped)} images or folders could not be read; {where}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
