"""Opening image files: bits, alpha, orientation, formats that are refused."""

import itertools
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from support.files import UserError
from support.images import open_image


def pixels_of(path):
    return np.asarray(open_image(path)).tolist()


@pytest.mark.parametrize("suffix, kind", [(".png", "<u2"), (".tif", "<u2"), (".tif", ">u2"), (".pgm", "i4")])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix, kind):
    values = np.array([[0, 128, 129, 257], [385, 386, 32896, 65535]], np.uint16)
    Image.fromarray(values.astype(kind)).save(tmp_path / f"x{suffix}")
    grey = [[0, 0, 1, 1], [1, 2, 128, 255]]
    assert pixels_of(tmp_path / f"x{suffix}") == [[[value] * 3 for value in row] for row in grey]


@pytest.mark.parametrize("kind", ["f4", "i4"])
def test_pixels_of_unknown_range_are_refused(tmp_path, kind):
    path = tmp_path / "x.tif"
    Image.fromarray(np.ones((4, 4), kind)).save(path)
    with pytest.raises(UserError, match=f"{path}: .*32 bits"):
        open_image(path)


def test_alpha_is_dropped(tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    image.save(tmp_path / "x.png")
    assert pixels_of(tmp_path / "x.png")[0][0] == [200, 100, 50]


def test_transparent_palette_color_is_kept(tmp_path):
    image = Image.new("RGB", (4, 4), (200, 100, 50)).convert("P")
    image.save(tmp_path / "y.png", transparency=image.getpixel((0, 0)))
    assert pixels_of(tmp_path / "y.png") == np.asarray(image.convert("RGB")).tolist()


# How an upright array is stored under each EXIF orientation.
# https://exiftool.org/TagNames/EXIF.html
STORED = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.T,
    6: np.rot90,
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: lambda pixels: np.rot90(pixels, 3),
}


@pytest.mark.parametrize(
    "suffix, mode",
    [*itertools.product([".jpg", ".png", ".webp", ".tif"], ["RGB", "L"]), (".png", "I;16"), (".tif", "I;16")],
)
def test_images_are_turned_upright(tmp_path, suffix, mode):
    """The image has a bright corner, at the top left when it is upright."""
    pixels = np.zeros((16, 24), np.uint16 if mode == "I;16" else np.uint8)
    pixels[:8, :8] = 65535 if mode == "I;16" else 255
    for orientation, turn in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(turn(pixels)))
        image = image.convert("RGB") if mode == "RGB" else image
        image.save(tmp_path / f"x{suffix}", exif=exif)
        upright = np.asarray(open_image(tmp_path / f"x{suffix}"))
        assert upright.shape == (16, 24, 3), orientation
        assert upright[:7, :7].min() > 200, orientation
        assert upright[9:, 9:].max() < 50, orientation


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "block", [b"", b"XX\0*", b"MM\0*\0\0\0\10\0\11\1\22\0\3", b"II*\0\10\0\0\0\1\0\22\1\2" + b"\xff" * 9]
)
def test_image_with_damaged_exif_block_is_read(tmp_path, block):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "x.jpg", exif=b"Exif\0\0" + block)
    assert pixels_of(tmp_path / "x.jpg")[0][0] == [255, 255, 255]


def test_image_is_turned_although_its_exif_block_cannot_be_written_anew(tmp_path, monkeypatch):
    """Pillow removes the orientation once it has turned the image; with some cameras that fails."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda self, offset=8: 1 / 0)
    assert open_image(tmp_path / "x.jpg").size == (4, 8)


@pytest.mark.parametrize("format", ["EPS", "PSD", "TGA", "PCX", "SGI", "DDS", "ICNS", "MSP"])
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_other_formats_are_refused_without_starting_a_program(tmp_path, monkeypatch, format, name):
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    if format == "PSD":  # Pillow cannot write it
        header = b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\4" * 2 + b"\0\10\0\3" + bytes(80)
        (tmp_path / name).write_bytes(header)
    else:
        image = Image.new("1" if format == "MSP" else "RGB", (16, 16))
        with open(tmp_path / name, "wb") as file:
            image.save(file, format)
    with pytest.raises(UserError, match=name):
        open_image(tmp_path / name)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_refused(tmp_path, make):
    make(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="x.jpg"):
        open_image(tmp_path / "x.jpg")
