"""Folders of images: find the class folders and their images, and read the images into memory.

Training, tests and predictions all use the same rule for which files are images: see `list_folder`.
"""

import collections
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import memory
from class_names import appearance, unicode_form
from splits import Files, Images, Split, check_sides
from support import distributed
from support.files import UserError
from support.images import SUFFIXES, load_cache, open_image, save_cache, to_rgb, to_size

SMALL = 64  # pixels a side; images up to this size are kept in memory and get the CIFAR recipe
COUNTED = 1000  # most folders that are searched for images to count; a link may lead to a whole disk
CACHED = 5_000  # splits of at least this many images are cached after they have been decoded
CACHE = ".evnas-images.npz"  # the cache file, next to the class folders
SAMPLED = 100  # image headers read to tell small images from large ones
# If at least this share of a folder's images has one small size, an image of another size is an
# error.
SAME_SIZE = 0.9


FolderId = tuple[int, int]  # device and inode


class Listing(NamedTuple):
    """The entries directly in a folder, sorted by name, without hidden names (`.name`)."""

    images: list[Path]  # files, and links to files, with the suffix of an image
    folders: list[Path]  # folders, and links to folders
    others: list[Path]  # other files
    unreadable: dict[Path, str]  # {broken link: error message}, for links that are not in `images`


class Nested(NamedTuple):
    """A folder inside a class folder, with the number of images in this folder and in all folders below it."""

    folder: Path
    images: int
    complete: bool  # False if some of these folders were not read, so there may be more images


def list_folder(folder: Path) -> Listing:
    """Return the content of a folder. This function decides which files are images.

    A file is an image if its name has the suffix of an image. No file is opened. Raises UserError
    if the folder cannot be read.
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
            # The link may lead to a folder of images on a disk that is not mounted.
            try:
                status(path)
            except UserError as error:
                listing.unreadable[path] = str(error)
        else:
            listing.others.append(path)
    return listing


def walk(folder: Path, visited: set[FolderId] | None = None) -> Iterator[Listing]:
    """Yield the Listing of a folder, and of each folder below it.

    Links to folders are followed. Each folder is listed once, however many links lead to it, so
    loops end. Folders in `visited` are skipped, and every folder that is listed is added to
    `visited`. If a folder cannot be read, its Listing is empty except for `unreadable`.
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
    """Return the os.stat of a file or folder, following links. Raises UserError if the system gives none."""
    try:
        return os.stat(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> UserError:
    """Return the error for a file or folder that the system cannot read."""
    return UserError(f"cannot read {path}: {error.strerror}. Restore or remove it.")


def identity(folder: Path) -> FolderId:
    """Return the identity of a folder, which is the same for all paths to this folder. Raises UserError."""
    about = status(folder)
    return about.st_dev, about.st_ino


# ---- class folders


def read_classes(folder: Path) -> dict[str, list[Path]]:
    """Return {name: images} of the class folders in `folder`, both in the order of names.

    The images of a class are directly in its folder. Images next to the class folders, and images
    in folders inside class folders, are not read. A note is printed for each kind. Raises UserError
    for a class without images, and for two classes that are the same folder or have the same name.
    """
    top = list_folder(folder)
    if top.unreadable:  # an unreadable link may be a class folder
        raise UserError(next(iter(top.unreadable.values())))
    if not top.folders:
        found = f", only {counted(len(top.images), 'image')}" if top.images else ""
        raise UserError(f"{folder} has no class folders{found}: make a folder of images for each class")
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


def count_below(folder: Path, visited: set[FolderId]) -> Nested:
    """Count the images in a folder and in the folders below it, up to COUNTED folders. For `visited` see `walk`."""
    listings = list(itertools.islice(walk(folder, visited), COUNTED + 1))
    images = sum(len(listing.images) for listing in listings[:COUNTED])
    unreadable = any(listing.unreadable for listing in listings)
    return Nested(folder, images, complete=len(listings) <= COUNTED and not unreadable)


def no_images(class_folder: Path, inside: list[Nested]) -> UserError:
    """Return the error for a class without images. The message names the folder in `inside` with the most images."""
    largest = max(inside, key=lambda nested: nested.images, default=None)
    if largest and largest.images:
        hint = f"; {largest.folder} has {counted(largest.images, 'image')}: move them up into the class folder"
    else:
        hint = ": add some, or remove the folder"
    return UserError(f"class folder {class_folder} has no images ({', '.join(SUFFIXES)}){hint}")


def report_not_read(folder: Path, stray: list[Path], nested: list[Nested], others: list[Path]) -> None:
    """Print a note for each kind of file in a split's folder that is not read.

    The kinds are files that are not images (`others`), images next to the class folders (`stray`),
    and images in folders inside class folders (`nested`).
    """
    start = f"note: not read in {folder}:"
    if others:
        files = f"{counted(len(others), 'file')} without the suffix of an image ({', '.join(SUFFIXES)})"
        distributed.say(f"{start} {files}, such as {others[0].relative_to(folder)}")
    if stray:
        images = f"{counted(len(stray), 'image')} next to the class folders, such as {stray[0].name}"
        distributed.say(f"{start} {images}. Move each into the folder of its class.")
    if nested:
        folders = f"{counted(len(nested), 'folder')} inside class folders"
        largest = max(nested, key=lambda nested: nested.images)
        least = "" if all(one.complete for one in nested) else "at least "
        images = f"{least}{counted(sum(one.images for one in nested), 'image')}"
        hint = ". Move them up into the class folder." if largest.images else ""
        distributed.say(f"{start} {folders}, with {images}, such as {largest.folder.relative_to(folder)}{hint}")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural, such as "1 image" or "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_class_folders(folder: Path, class_folders: list[Path]) -> None:
    """Raise UserError if two class folders are the same folder, or have names that differ only in Unicode form.

    For other names that look alike, a note is printed.
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
        other = by_form.setdefault(unicode_form(path.name), path)
        if other != path:
            names = f"{ascii(other.name)} and {ascii(path.name)}"
            raise UserError(
                f"{folder} has a class in two folders, whose names differ only in Unicode form, {names}: "
                "move the images into one of them and remove the other"
            )
        other = by_looks.setdefault(appearance(path.name), path)
        if other != path:
            distributed.say(f"note: two classes in {folder} look alike: {ascii(other.name)} and {ascii(path.name)}")


# ---- a split on disk


def list_files(root: str | os.PathLike, folders: Sequence[str]) -> Files:
    """List the images in ROOT/FOLDER/CLASS/, where FOLDER is the first of `folders` that exists.

    Classes are sorted by name. No image is decoded. Raises UserError.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data directory {root} does not exist: give the right one with --data")
    folder = next((root / name for name in folders if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(
            f"data directory {root} has no folder {' or '.join(folders)}: make one, with a folder of images per class"
        )
    images = read_classes(folder)
    classes = list(images)
    paths = []
    labels = []
    digest = hashlib.sha256()
    for label, name in enumerate(classes):
        found = images[name]
        for path in found:
            digest.update(os.fsencode(f"{name}/{path.name} {status(path).st_size}\n"))
        paths += found
        labels += [label] * len(found)
    files = Files(paths, torch.tensor(labels), classes, digest.hexdigest())
    if len(classes) == 1:
        distributed.say(f"note: {folder} has only one class, {classes[0]}: accuracy will be 100 %")
    single = [name for name, count in zip(classes, torch.bincount(files.labels), strict=True) if count == 1]
    if single:
        distributed.say(f"note: {len(single)} of the classes in {folder} have a single image, such as {single[0]}")
    return files


# ---- a split in memory


def read_images(files: Files, *, resize: bool, workers: int | None = None, cache: bool = True) -> Split:
    """Read a folder's images into memory.

    With `resize`, the images are scaled and cropped to `files.image_size`. Without `resize`, they
    keep their size; if they are large or of different sizes, `files` is returned unchanged.
    `workers` threads decode the images (default: one per core). With `cache`, splits of CACHED
    images or more are decoded only once: see `read_cached`. Raises UserError for an unreadable
    image.
    """
    read = read_resized if resize else read_small
    if cache and len(files) >= CACHED:
        return read_cached(files, read, workers)
    return read(files, workers)


def read_small(files: Files, workers: int | None = None) -> Split:
    """Read the images into memory if all are small and of one size, else return `files` unchanged.

    If nearly all images have one small size, an image of another size is an error: raises
    UserError.
    """
    sizes = sample_sizes(files)
    if mostly_large(sizes):
        return files
    width, height = min(sizes, key=math.prod)
    check_fits(len(files), height, width)
    arrays = read_all(files.paths, pixels_if_small, workers)
    shape = common_shape(arrays)
    if shape is None:
        return files
    same = sum(array is not None and array.shape == shape for array in arrays)
    for path, array in zip(files.paths, arrays, strict=True):
        if array is None or array.shape != shape:
            height, width, _ = shape
            raise UserError(
                f"{path} is {size_on_disk(path)} pixels, but {same} of {len(files)} images in {path.parents[1]} are "
                f"{width}x{height}: resize or remove it"
            )
    return to_images(files, arrays)


def sample_sizes(files: Files) -> list[tuple[int, int]]:
    """Return (width, height) of up to SAMPLED images. They are drawn at random, but always the same.

    Only the headers of the files are read. So a million photographs need not be decoded to find out
    that they are large.
    """
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    return [open_image(files.paths[i], lambda image: image.size) for i in order[:SAMPLED].tolist()]


def mostly_large(sizes: list[tuple[int, int]]) -> bool:
    """Return whether more than half of these images have a side of more than SMALL pixels."""
    return sum(max(size) <= SMALL for size in sizes) < len(sizes) / 2


def pixels_if_small(image: Image.Image) -> np.ndarray | None:
    """Return the pixels of an opened image, uint8 (H, W, 3). If the image is large, return None without decoding it."""
    return np.asarray(to_rgb(image)) if max(image.size) <= SMALL else None


def common_shape(arrays: list[np.ndarray | None]) -> tuple[int, int, int] | None:
    """Return the shape (H, W, 3) that at least a share SAME_SIZE of the arrays has, or None without such a shape."""
    shapes = collections.Counter(None if array is None else array.shape for array in arrays)
    ((shape, count),) = shapes.most_common(1)
    return shape if count >= SAME_SIZE * len(arrays) else None


def read_resized(files: Files, workers: int | None = None) -> Images:
    """Return the images in memory, scaled and cropped to `files.image_size`."""
    height, width = files.image_size
    check_fits(len(files), height, width)

    def pixels(image: Image.Image) -> np.ndarray:
        return np.asarray(to_size(to_rgb(image), width, height))

    return to_images(files, read_all(files.paths, pixels, workers))


def check_fits(count: int, height: int, width: int) -> None:
    """Raise UserError if `count` images of this size do not fit into the machine's memory."""
    images = {f"{count:,} images of {width}x{height} pixels": 3 * count * height * width}
    memory.check(images, torch.device("cpu"), "take fewer images, or smaller ones (--image_size)")


def read_all(paths: list[Path], use: Callable[[Image.Image], Any], workers: int | None) -> list:
    """Open each image and return the results of use(image), in order.

    `workers` threads decode the images (default: one per core).
    """
    with ThreadPool(workers) as pool:  # threads run in parallel, because decoding releases the interpreter lock
        return pool.map(lambda path: open_image(path, use), paths, chunksize=256)


def to_images(files: Files, arrays: list[np.ndarray]) -> Images:
    """Make the Images of `files`. `arrays` has the pixels of each file, uint8 (H, W, 3)."""
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # (N, 3, H, W)
    return Images(images, files.labels, files.classes, files.source)


def check_in_memory(split: Split, hint: str = "give --image_size") -> None:
    """Raise UserError for images that a network of the CIFAR recipe cannot take."""
    if isinstance(split, Files):
        first = split.paths[0]
        shown = [first]
        first_size = open_image(first).size
        if max(first_size) <= SMALL:
            other = next((path for path in split.paths if open_image(path).size != first_size), None)
            shown += [other] if other else []
        sizes = " and ".join(f"{path} is {size_on_disk(path)}" for path in shown)
        raise UserError(f"the images must all have one size of at most {SMALL} pixels a side, but {sizes}: {hint}")
    check_sides(split.image_size, 4)


def size_on_disk(path: Path) -> str:
    """Return the size of an image file as text."""
    width, height = open_image(path).size
    return f"{width}x{height}"


# ---- the cache of decoded images


def read_cached(files: Files, read: Callable[[Files, int | None], Split], workers: int | None) -> Split:
    """Return read(files, workers), or take the images from the cache file next to the class folders.

    `read` is `read_small` or `read_resized`. If `read` returns Images, they are cached. A cache
    file that is damaged or made from other files is ignored. If the folder cannot be written,
    nothing is cached.
    """
    path = files.paths[0].parents[1] / CACHE
    key = fingerprint(files, read)
    limit = len(files) * 3 * max(SMALL, *files.image_size) ** 2
    images = load_cache(path, key, limit).get("images")
    if images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.shape[:2] == (len(files), 3):
        return Images(torch.from_numpy(images), files.labels, files.classes, files.source)
    split = read(files, workers)
    if isinstance(split, Images):
        save_cache(path, key, images=split.images.numpy())
    return split


def fingerprint(files: Files, read: Callable) -> bytes:
    """Return a digest of the names, sizes and times of a split's files, and of how the files are read."""
    digest = hashlib.sha256(f"{read.__name__} {files.image_size}\n".encode())
    for path in files.paths:
        about = status(path)
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {about.st_size} {about.st_mtime_ns}\n"))
    return digest.digest()
