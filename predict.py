"""Classify images with a retrained network: print the best classes of each image and their probabilities.

Example: python predict.py runs/eval-EXP-20260101-120000 picture.png folder/
"""

from support.cli import Parser, command, number

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import image_folder
import retrained
from support import devices, distributed
from support.files import UserError
from support.images import SUFFIXES

BEST = 5  # number of classes that are printed for each image, if the command line does not say


def images_in(path: str) -> tuple[list[Path], list[str]]:
    """Return the images in `path`, sorted, and an error message for each folder that cannot be read.

    `path` is an image file with any suffix, or a folder, which is searched to any depth: see
    `image_folder.walk`. Raises UserError for a folder without images.
    """
    if not os.path.isdir(path):
        return [Path(path)], []
    listings = list(image_folder.walk(Path(path)))
    images = sorted(image for listing in listings for image in listing.images)
    unreadable = [message for listing in listings for message in listing.unreadable.values()]
    if not images:
        reason = unreadable[0] if unreadable else f"the name of an image ends in {', '.join(SUFFIXES)}"
        raise UserError(f"folder {path} has no images: {reason}")
    return images, unreadable


@torch.no_grad()
def predict(
    network: nn.Module,
    transform: Callable,
    paths: Iterable[str | Path],
    classes: Sequence[str],
    device: torch.device | str,
    skip: Callable[[str], None] | None = None,
    topk: int = BEST,
) -> Iterator[tuple[str | Path, list[tuple[str, float]]]]:
    """Yield the path of each image and its `topk` best classes, as (class, probability), the most probable first.

    `network` and `transform` are what `retrained.load` returns. The network must be on `device`. If
    an image cannot be read, `skip` is called with the error message, and the next image follows.
    Without `skip`, UserError is raised. Raises UserError if the logits of an image are not finite.
    """
    for path in paths:
        try:
            x = transform(path).unsqueeze(0).to(device)  # (1, 3, H, W)
        except UserError as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        logits, _ = network(x)  # (1, classes)
        if not logits.isfinite().all():
            raise UserError(f"{path}: the network's logits are not finite, so it has no answer. Retrain the network")
        probabilities, labels = logits[0].softmax(0).topk(min(topk, len(classes)))
        names = [classes[label] for label in labels.tolist()]
        yield path, list(zip(names, probabilities.tolist(), strict=True))


def make_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__)
    text = "directory of a retraining (its last weights are used), or a weights file in this directory"
    parser.add_argument("run", metavar="RUN_DIR", help=text)
    text = "image files, or folders that are searched for images to any depth"
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=text)
    text = "number of classes to print for each image, the most probable first"
    parser.add_argument("--topk", type=number(int, 1), default=BEST, metavar="N", help=text)
    group = parser.add_mutually_exclusive_group()
    text = "print one JSON object for each image, for other programs to read"
    group.add_argument("--json", action="store_true", help=text)
    text = "print a table with the columns image, rank, class, probability"
    group.add_argument("--csv", action="store_true", help=text)
    devices.add_device_arguments(parser)
    parser.set_defaults(amp=False, compile=False)
    return parser


def as_text(path: str | Path, best: list[tuple[str, float]]) -> list[str]:
    """Return the lines that are printed for an image: its path, then its best classes."""
    return [str(path), *(f"  {100 * probability:6.2f} %  {name}" for name, probability in best)]


def as_csv(rows: Iterable[Sequence]) -> list[str]:
    """Return rows as lines of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().splitlines()


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    classes = retrained.find_weights(args.run).about["classes"]
    network, transform = retrained.load(args.run)
    device = devices.choose_device(args)
    network = network.to(device)
    skipped = []

    def skip(message: str) -> None:
        skipped.append(message)
        line = " ".join(f"skipped: {message}".split())
        distributed.say(line, file=sys.stderr)

    paths = []
    for name in args.images:
        images, unreadable = images_in(name)
        paths += images
        for message in unreadable:
            skip(message)
    if args.csv:
        distributed.say("image,rank,class,probability")
    for path, best in predict(network, transform, paths, classes, device, skip, args.topk):
        if args.json:
            lines = [json.dumps({"image": str(path), "classes": dict(best)})]
        elif args.csv:
            lines = as_csv([str(path), rank, *answer] for rank, answer in enumerate(best, start=1))
        else:
            lines = as_text(path, best)
        for line in lines:
            distributed.say(line)
    if skipped:
        distributed.say(
            f"error: {len(skipped)} images or folders could not be read. "
            "See the lines that begin with `skipped`, and fix or remove them",
            file=sys.stderr,
        )
        raise SystemExit(1)


if __name__ == "__main__":
    main()
