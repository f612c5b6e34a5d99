"""Image files are opened safely, upright and as 8-bit RGB, and decoded images are cached in a file."""

import contextlib
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.files import UserError, atomic_write, check_unpacked_size, open_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
# The formats of these suffixes. Pillow may try no others: EPS would start Ghostscript, and rare formats raise
# any exception.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")

Result = TypeVar("Result")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image upright and as 8-bit RGB.

    Grey is repeated, alpha is dropped, and 16-bit values are divided by 257. Raises ValueError for 32-bit and
    floating-point pixels, since nothing says which values are black and white.
    """
    image.load()
    image_format = image.format
    if image_format != "TIFF":  # Pillow turns those itself
        # A damaged EXIF block raises nearly any exception, and the pixels do not need it. In place, so that the image
        # is upright even if only rewriting the block fails.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
    # Pixels of Pillow's mode I have 32 bits, except those of a PGM and, in Pillow 10, of a PNG, which have 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # convert("RGB") would clip
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit or floating-point numbers; save it with 8 or 16 bits")
    return image.convert("RGB")


def to_size(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return an RGB image that is scaled to just cover width x height pixels, and cropped to them at its centre."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def refuse_bombs() -> None:
    """Turn Pillow's warning about more than 89 million pixels into an error. (Pillow refuses twice as many itself.)"""
    bomb = Image.DecompressionBombWarning
    if not any(action == "error" and category is bomb for action, _, category, *_ in warnings.filters):
        warnings.simplefilter("error", bomb)


def open_image(path: str | os.PathLike, use: Callable[[Image.Image], Result] = to_rgb) -> Result:
    """Open an image file and return `use` of it, by default the upright RGB image. Raises UserError."""
    refuse_bombs()
    try:
        # If Pillow opened the file itself, it would map a plain TIFF into memory, and then ignore its orientation.
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return use(image)
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: cannot read the image (not {', '.join(FORMATS)}). Remove or replace it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: the image is too large ({error}). Make it smaller or remove it") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot read the image ({error}). Remove or replace it") from error


def load_cache(path: str | os.PathLike, key: bytes, limit: int) -> dict[str, np.ndarray]:
    """Return the arrays {name: array} that `save_cache` wrote with the same key, or {}.

    A file that is damaged, or that unpacks to many more than `limit` bytes, is ignored.
    """
    with contextlib.suppress(Exception):  # a damaged file raises nearly any
        with open_regular(path) as file, np.load(file, allow_pickle=False) as content:
            check_unpacked_size(content.zip, limit + 2**16)
            if content["key"].tobytes() == key:
                return {name: content[name] for name in content.files if name != "key"}
    return {}


def save_cache(path: str | os.PathLike, key: bytes, **arrays: np.ndarray) -> None:
    """Write arrays, and the key that identifies their source. Does nothing if the file cannot be written."""
    with contextlib.suppress(UserError), atomic_write(path) as file:
        np.savez(file, key=np.frombuffer(key, np.uint8), **arrays)
