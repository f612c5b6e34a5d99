"""What a test says besides its accuracy: accuracy by class, and the confusion matrix, in test.json."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from support import distributed
from support.files import UserError, atomic_write

NAME = "test.json"
MOST_LINES = 20  # classes that are printed one by one; of more classes, the worst are
WORST = 5


def accuracy_by_class(confusion: torch.Tensor) -> list[float | None]:
    """Return the accuracy in percent of each class, None for a class without images.

    `confusion` (classes, classes) counts images by true class (row) and predicted class (column).
    """
    images = confusion.sum(1)
    correct = confusion.diagonal()
    return [100 * c / n if n else None for c, n in zip(correct.tolist(), images.tolist(), strict=True)]


def lines(classes: Sequence[str], confusion: torch.Tensor) -> list[str]:
    """Return lines that say how good a network is by class, and what it takes each class for most often."""
    accuracy = accuracy_by_class(confusion)
    order = [i for i, value in enumerate(accuracy) if value is not None]
    head = "accuracy by class:"
    if len(order) > MOST_LINES:
        order = sorted(order, key=lambda i: accuracy[i])[:WORST]
        head = f"the {WORST} classes with the lowest accuracy:"
    width = max((len(classes[i]) for i in order), default=0)
    texts = [head]
    for i in order:
        mistakes = confusion[i].clone()
        mistakes[i] = 0
        text = f"  {classes[i].ljust(width)}  {accuracy[i]:6.2f} % of {int(confusion[i].sum())}"
        if mistakes.any():
            other = int(mistakes.argmax())
            text += f"; {int(mistakes[other])} taken for {classes[other]}"
        texts.append(text)
    return texts


def save(
    run_dir: str | os.PathLike,
    result: dict[str, float],
    classes: Sequence[str],
    confusion: torch.Tensor,
    *,
    weights: str | os.PathLike,
    dataset: str,
) -> None:
    """Write test.json into a run directory. Only rank 0 writes. A file that cannot be written is noted."""
    if distributed.rank() > 0:
        return
    content = {
        "weights": os.fspath(weights),
        "dataset": dataset,
        **result,
        "images": int(confusion.sum()),
        "classes": list(classes),
        "accuracy_by_class": accuracy_by_class(confusion),
    }
    # The rows of the matrix are lines of the file; `write_json` would write each number into a line.
    rows = ",\n".join(f"    {json.dumps(row)}" for row in confusion.tolist())
    text = json.dumps(content, indent=2).removesuffix("\n}") + f',\n  "confusion": [\n{rows}\n  ]\n}}\n'
    try:
        with atomic_write(Path(run_dir) / NAME, "w") as file:
            file.write(text)
    except UserError as error:
        distributed.say(f"note: the results are not saved ({error})")
