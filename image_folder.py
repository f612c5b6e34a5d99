"""Which files of a folder are images, and which folders are classes.

Training, tests and predictions all use this one rule.
"""

import collections
import itertools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support import distributed
from support.files import UserError
from support.images import SUFFIXES

COUNTED = 1000  # folders in which unread images are counted; a link may lead to a whole disk
# Letters of other alphabets that look like Latin ones.
CYRILLIC = (
    "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u04cf\u043e\u0440\u051b\u0455\u051d\u0445\u0443"
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423",
    "acdehijlopqswxyABCEHIJKMOPSTXY",
)
GREEK = (
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf\u03bd\u03c1\u03b9",
    "ABEZHIKMNOPTYXovpi",
)
LOOKS_LIKE = str.maketrans(CYRILLIC[0] + GREEK[0], CYRILLIC[1] + GREEK[1])


class Listing(NamedTuple):
    """What is directly in a folder, without hidden names (`.name`), in the order of names."""

    images: list[Path]  # files, and links to files, with the suffix of an image
    folders: list[Path]  # folders, and links to folders
    others: list[Path]  # other files
    unreadable: dict[Path, str]  # links that lead nowhere and are not in `images`: error messages


class Nested(NamedTuple):
    """A folder inside a class folder, and how many images are in it and the folders below it."""

    folder: Path
    images: int
    complete: bool  # False if some of these folders were not read, so that there may be more


def list_folder(folder: Path) -> Listing:
    """Return what is directly in a folder: the rule that decides which of its files are images.

    Nothing is opened: a file is an image if its name says so. Raises UserError if the folder cannot
    be read.
    """
    listing = Listing([], [], [], {})
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise cannot_read(folder, error) from error
    for entry in visible:
        path = Path(folder) / entry.name
        is_folder = os.path.isdir(path) if entry.is_symlink() else entry.is_dir()
        if is_folder:
            listing.folders.append(path)
        elif path.suffix.lower() in SUFFIXES:
            listing.images.append(path)
        elif entry.is_symlink() and not os.path.exists(path):
            # It may be a folder of images on a disk that is not mounted.
            try:
                status(path)
            except UserError as error:
                listing.unreadable[path] = str(error)
        else:
            listing.others.append(path)
    return listing


def walk(folder: Path, visited: set | None = None) -> Iterator[Listing]:
    """Yield the Listing of a folder, and of each folder below it.

    Links to folders are followed. Each folder is listed once, however many links lead to it, so
    loops end. `visited` holds the (device, inode) of folders that are not to be listed; those that
    are listed are added. The Listing of a folder that cannot be read has only `unreadable` in it.
    """
    visited = set() if visited is None else visited
    waiting = collections.deque([Path(folder)])
    while waiting:
        folder = waiting.popleft()
        try:
            this = identity(folder)
            if this in visited:
                continue
            visited.add(this)
            listing = list_folder(folder)
        except UserError as error:
            listing = Listing([], [], [], {folder: str(error)})
        yield listing
        waiting += listing.folders


def status(path: Path) -> os.stat_result:
    """Return the status of a file or folder, links followed. Raises UserError if it has none."""
    try:
        return os.stat(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path, error):
    return UserError(f"cannot read {path}: {error.strerror}. Restore or remove it.")


def identity(folder):
    """Return what two paths have in common if, and only if, they lead to the same folder."""
    about = status(folder)
    return about.st_dev, about.st_ino


# ---- class folders


def read_classes(folder: Path) -> dict[str, list[Path]]:
    """Return {name: images} of the class folders in `folder`, both in the order of names.

    The images of a class are directly in its folder. Images next to the class folders, and in
    folders inside them, are not read: a line counts each kind. Raises UserError for a class without
    images, and for two classes that are the same folder or have the same name.
    """
    top = list_folder(folder)
    if top.unreadable:  # a class may be missing
        raise UserError(next(iter(top.unreadable.values())))
    if not top.folders:
        hint = f", only {counted(len(top.images), 'image')}: make a folder for each class" if top.images else ""
        raise UserError(f"{folder} has no class folders{hint}")
    check_class_folders(folder, top.folders)
    visited = {identity(path) for path in (folder, *top.folders)}
    classes = {}
    nested = []
    others = [*top.others]
    for class_folder in top.folders:
        listing = list_folder(class_folder)
        inside = [count_below(inner, visited) for inner in listing.folders if identity(inner) not in visited]
        if not listing.images:
            raise no_images(class_folder, inside)
        classes[class_folder.name] = listing.images
        nested += inside
        others += [*listing.others, *listing.unreadable]
    report_not_read(folder, top.images, nested, others)
    return classes


def count_below(folder, visited):
    """Return the Nested of a folder, of at most COUNTED folders in it. `visited`: see `walk`."""
    listings = list(itertools.islice(walk(folder, visited), COUNTED + 1))
    images = sum(len(listing.images) for listing in listings[:COUNTED])
    unreadable = any(listing.unreadable for listing in listings)
    return Nested(folder, images, complete=len(listings) <= COUNTED and not unreadable)


def no_images(class_folder, inside):
    """Return the error of a class without images; they may be in a folder inside its folder."""
    largest = max(inside, key=lambda nested: nested.images, default=None)
    if largest and largest.images:
        hint = f"; {largest.folder} has {counted(largest.images, 'image')}: move them up into the class folder"
    else:
        hint = ""
    return UserError(f"class folder {class_folder} has no images ({', '.join(SUFFIXES)}){hint}")


def report_not_read(folder, beside, nested, others):
    """Print a line on each kind of files that a folder of classes has and that are not read.

    These are files that are not images, images beside the class folders, and folders inside class
    folders (Nested).
    """
    start = f"note: not read in {folder}:"
    if others:
        files = f"{counted(len(others), 'file')} without the suffix of an image ({', '.join(SUFFIXES)})"
        distributed.say(f"{start} {files}, such as {others[0].relative_to(folder)}")
    if beside:
        images = f"{counted(len(beside), 'image')} beside the class folders, such as {beside[0].name}"
        distributed.say(f"{start} {images}. Move each into the folder of its class.")
    if nested:
        folders = f"{counted(len(nested), 'folder')} inside class folders"
        largest = max(nested, key=lambda nested: nested.images)
        least = "" if all(one.complete for one in nested) else "at least "
        images = f"{least}{counted(sum(one.images for one in nested), 'image')}"
        hint = ". Move them up into the class folder." if largest.images else ""
        distributed.say(f"{start} {folders}, with {images}, such as {largest.folder.relative_to(folder)}{hint}")


def counted(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_class_folders(folder, class_folders):
    """Raise UserError if two class folders are the same or differ only in Unicode form.

    Prints a note on other names that look alike.
    """
    by_identity = {}
    by_form = {}
    by_looks = {}
    place = Path(os.path.realpath(folder))
    for path in class_folders:
        if place.is_relative_to(os.path.realpath(path)):
            raise UserError(f"{path} is a link back to a folder that it is in: remove the link")
        other = by_identity.setdefault(identity(path), path)
        if other != path:
            raise UserError(f"{other} and {path} are the same folder, so its images have two classes: remove a link")
        other = by_form.setdefault(unicodedata.normalize("NFC", path.name), path)
        if other != path:
            names = f"{ascii(other.name)} and {ascii(path.name)}"
            raise UserError(
                f"{folder} has a class in two folders, whose names differ only in Unicode form, {names}: "
                "move the images into one of them and remove the other"
            )
        other = by_looks.setdefault(appearance(path.name), path)
        if other != path:
            distributed.say(f"note: two classes in {folder} look alike: {ascii(other.name)} and {ascii(path.name)}")


# ---- names of classes


def appearance(name: str) -> str:
    """Return the same text for all names that a reader would take for one another on a screen."""
    visible = [char for char in unicodedata.normalize("NFC", name) if unicodedata.category(char) != "Cf"]
    dashes = ("-" if unicodedata.category(char) == "Pd" else char for char in visible)
    return " ".join("".join(dashes).translate(LOOKS_LIKE).split())


def check_same_classes(name: str, classes: list[str], other_name: str, other_classes: list[str]) -> None:
    """Raise UserError if two data sets, called `name` and `other_name`, have different classes.

    The message says which. Names that look alike are in quotes, with all but ASCII escaped.
    """
    if classes == other_classes:
        return
    shared = set(classes) & set(other_classes)
    only = [one for one in classes if one not in shared]
    only_other = [other for other in other_classes if other not in shared]
    by_form = {unicodedata.normalize("NFC", one): one for one in only}
    for other in only_other:
        one = by_form.get(unicodedata.normalize("NFC", other))
        if one is not None:
            raise UserError(
                f"class {ascii(one)} of {name} and class {ascii(other)} of {other_name} differ only in the Unicode "
                "form of their names: rename the folder of one of them"
            )
    alike = {appearance(one) for one in only} & {appearance(other) for other in only_other}
    found = [f"only in {name}: {some_names(only, alike)}"] if only else []
    found += [f"only in {other_name}: {some_names(only_other, alike)}"] if only_other else []
    hint = ". Names in quotes look alike, but are not the same: rename the folders of one of the two" if alike else ""
    raise UserError(f"the classes of {name} and {other_name} differ: {'; '.join(found) or 'in their order'}{hint}")


def some_names(names, alike):
    """Return up to three names as text, first those whose appearance is in `alike`, escaped."""
    confusing = [ascii(name) for name in names if appearance(name) in alike]
    plain = [name for name in names if appearance(name) not in alike]
    shown = [*confusing, *plain]
    return ", ".join(shown[:3]) + (", .." if len(shown) > 3 else "")
