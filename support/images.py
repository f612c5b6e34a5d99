"""Open untrusted image files as upright 8-bit RGB images, and cache decoded images."""

import contextlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.files import UserError, atomic_write, check_unpacked_size, open_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
# The image formats of SUFFIXES. Pillow must not try any other format: it opens EPS files with
# Ghostscript, and its readers of rare formats raise nearly any exception.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as a new, upright RGB image with 8 bits per channel.

    Grey values are repeated in the three channels, alpha is dropped, and 16-bit values are divided
    by 257. Raises ValueError for 32-bit and floating-point pixels, because the file does not say
    which values are black and white.
    """
    image.load()
    is_tiff = image.format == "TIFF"
    about = image.info  # the image's metadata, with the EXIF block
    # Pillow's mode I is for 32-bit pixels. But a 16-bit PGM file, and in Pillow 10 a 16-bit PNG
    # file, has this mode too.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # convert("RGB") would clip the values to 255.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("the pixels have 32 bits or are floating-point numbers; save the image with 8 or 16 bits")
    image = image.convert("RGB")
    if not is_tiff:  # Pillow turns TIFF images upright when it loads them
        image.info = dict(about)
        # A damaged EXIF block raises nearly any exception. Pillow rotates the pixels first, so they
        # are upright even if Pillow cannot write the block again.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
    return image


def to_size(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return an RGB image, scaled to just cover width x height and cropped around its centre."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def refuse_bombs() -> None:
    """Make Pillow raise an error for images of more than 89 million pixels.

    By default Pillow only warns of such images, and raises an error above twice as many pixels.
    """
    bomb = Image.DecompressionBombWarning
    if not any(action == "error" and kind is bomb for action, _, kind, *_ in warnings.filters):
        warnings.simplefilter("error", bomb)


def open_image(path: str | os.PathLike, use: Callable[[Image.Image], Any] = to_rgb) -> Any:
    """Open an image file and return `use(image)`, by default the upright RGB image.

    Raises UserError, which names the file.
    """
    refuse_bombs()
    try:
        # Pillow gets an open file, not a path. Given the path of a plain TIFF file, Pillow would
        # map the file into memory and ignore the image's orientation.
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return use(image)
    except UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise UserError(
            f"cannot read image {path}: the format is not one of {formats}. Convert or remove it."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"image {path} is too large: {error}; make it smaller or remove it") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read image {path}: {error}. Replace or remove it.") from error


def load_cache(path: str | os.PathLike, key: bytes, limit: int) -> dict[str, np.ndarray]:
    """Return the arrays {name: array} that `save_cache` wrote with the same key, or {}.

    A file that is damaged, or that unpacks to many more than `limit` bytes, is ignored.
    """
    with contextlib.suppress(Exception):  # a damaged file raises nearly any exception
        with open_regular(path) as file, np.load(file, allow_pickle=False) as content:
            check_unpacked_size(content.zip, limit + 2**16)
            if content["key"].tobytes() == key:
                return {name: content[name] for name in content.files if name != "key"}
    return {}


def save_cache(path: str | os.PathLike, key: bytes, **arrays: np.ndarray) -> None:
    """Write arrays to a cache file, if that file can be written.

    The key identifies the data from which the arrays were made.
    """
    with contextlib.suppress(UserError), atomic_write(path) as file:
        np.savez(file, key=np.frombuffer(key, np.uint8), **arrays)
