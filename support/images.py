"""Opening image files of strangers: known formats alone, upright, in RGB of 8 bits; keeping what was decoded."""

import contextlib
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.files import UserError, atomic_write, check_unpacked_size, open_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
# What they stand for. Pillow may try no other: its EPS starts Ghostscript, its rare formats raise any exception.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
# EXIF's orientation -> how to turn the stored pixels (https://exiftool.org/TagNames/EXIF.html)
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip


def to_rgb(image):
    """Return an opened image in RGB of 8 bits, upright: grey is repeated, alpha dropped, 16 bits divided by 257.

    Raises ValueError for 32 bits and floating point, where nothing says which values are black and white.
    """
    image.load()
    orientation = None
    if image.format != "TIFF":  # Pillow turns those itself
        with contextlib.suppress(Exception):  # a damaged EXIF block raises nearly any; the pixels do not need it
            orientation = image.getexif().get(0x0112)
    # Pillow's mode I is of 32 bits, but for the 16 of a PGM and, in Pillow 10, of a PNG.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # convert("RGB") would clip
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits or are floating-point numbers; save it with 8 or 16 bits")
    image = image.convert("RGB")
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def to_size(image, width, height):
    """Return an RGB image scaled so that it just covers width x height, and cropped to that at its centre."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def refuse_bombs():
    """Make an error of Pillow's warning of more than 89 million pixels; it raises one itself beyond twice as many."""
    bomb = Image.DecompressionBombWarning
    if not any(action == "error" and kind is bomb for action, _, kind, *_ in warnings.filters):
        warnings.simplefilter("error", bomb)


def open_image(path, use=to_rgb):
    """Open an image file and return `use` of it, by default its upright RGB form. Raises UserError."""
    refuse_bombs()
    try:
        # Of a file that Pillow opens itself it maps a plain TIFF into memory, and then ignores its orientation.
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return use(image)
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read image {path}: it is not {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"image {path} is too large: {error}; make it smaller or remove it") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error


def load_cache(path, key, limit):
    """Return the arrays {name: array} that `save_cache` left with the same key, {} if it did not.

    A file that is damaged, or unpacks to many more than `limit` bytes, does not count.
    """
    with contextlib.suppress(Exception):  # a damaged file raises nearly any
        with open_regular(path) as file, np.load(file, allow_pickle=False) as content:
            check_unpacked_size(content.zip, limit + 2**16)
            if content["key"].tobytes() == key:
                return {name: content[name] for name in content.files if name != "key"}
    return {}


def save_cache(path, key, **arrays):
    """Write arrays and the key, bytes that say of what they are; nothing where that cannot be written."""
    with contextlib.suppress(UserError), atomic_write(path) as file:
        np.savez(file, key=np.frombuffer(key, np.uint8), **arrays)
