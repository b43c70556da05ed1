"""Every unusual picture opens as a viewer shows it, or is refused with one sentence that says what to do."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import PictureError
from imagine.people.photos import BACKGROUND, MAX_SIDE, open_photo, read_photo
from tests import pictures


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).astype(int)


def difference(image: Image.Image, expected: Image.Image) -> float:
    return float(np.abs(pixels(image) - pixels(expected)).mean())


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


# --- refused ----------------------------------------------------------------------------------------------------------
def missing(folder: Path) -> Path:
    return folder / "nobody.jpg"


def directory(folder: Path) -> Path:
    return folder


def empty(folder: Path) -> Path:
    (folder / "empty.png").touch()
    return folder / "empty.png"


def text_named_png(folder: Path) -> Path:
    (folder / "notes.png").write_text("this is not a picture\n" * 20)
    return folder / "notes.png"


def truncated_jpeg(folder: Path) -> Path:
    path = save(pictures.gradient(300, 200), folder / "cut.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    return path


def truncated_png(folder: Path) -> Path:
    path = save(pictures.gradient(300, 200), folder / "cut.png")
    path.write_bytes(path.read_bytes()[:-200])
    return path


def one_pixel(folder: Path) -> Path:
    return save(Image.new("RGB", (1, 1)), folder / "dot.png")


def bomb(folder: Path) -> Path:
    return pictures.png_header_only(folder / "bomb.png", 20_000, 20_000)


def between_the_limits(folder: Path) -> Path:
    """Write a picture of a size about which Pillow only warns, and which we refuse."""
    return pictures.png_header_only(folder / "large.png", 13_000, 13_000)


def disk_image(folder: Path) -> Path:
    with (folder / "disk.jpg").open("wb") as file:
        file.truncate((512 << 20) + 1)  # sparse, so it takes no disk space
    return folder / "disk.jpg"


def strip(folder: Path) -> Path:
    return save(Image.new("RGB", (8000, 40)), folder / "strip.png")


def unreadable_heic(folder: Path) -> Path:
    return pictures.heic(folder / "phone.heic")


def address(folder: Path) -> str:
    return "https://example.org/me.jpg"


REFUSED = [
    (missing, "There is no file"),
    (directory, "is a folder"),
    (empty, "is empty"),
    (text_named_png, "is not a picture that can be read"),
    (truncated_jpeg, "is incomplete or damaged"),
    (truncated_png, "is incomplete or damaged"),
    (one_pixel, "1 x 1 pixels, too small"),
    (bomb, "more than 128 million pixels"),
    (between_the_limits, "13,000 x 13,000 pixels, more than 128 million"),
    (disk_image, "larger than 512 MB"),
    (strip, "too narrow a strip"),
    (unreadable_heic, "HEIC|incomplete or damaged"),
    (address, "nothing is downloaded"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_refused_with_one_sentence(make: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    source = make(tmp_path)
    with pytest.raises(PictureError, match=words) as caught:
        open_photo(source)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert str(source) in sentence  # the user must know which of several pictures it is


def test_a_real_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="million pixels"):
        open_photo(save(Image.new("1", (20_000, 20_000)), tmp_path / "real.png"))


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((64, 64, 2), np.uint8),
        np.full((64, 64, 3), 200.0),
        np.full((64, 64, 3), np.nan),
        torch.zeros(2, 3, 64, 64),
        torch.zeros(64, 64),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((64, 64, 3), complex),
        b"no picture at all",
        7,
    ],
)
def test_refused_values(value: Any) -> None:
    with pytest.raises(PictureError):
        open_photo(value)


# --- opened -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotated_equals_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = pictures.gradient()
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),  # the viewer turns it clockwise
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(-90, expand=True),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    photo = read_photo(save(stored, tmp_path / f"turned.{suffix}", exif=exif, **options))
    assert photo.image.size == upright.size and photo.orientation == orientation and photo.size == stored.size
    assert difference(photo.image, upright) < (2 if suffix == "jpg" else 1e-9)


def test_opening_twice_rotates_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    once = open_photo(save(pictures.gradient(), tmp_path / "turned.png", exif=exif))
    assert difference(open_photo(once), once) == 0


def test_cmyk_as_printers_store_it(tmp_path: Path) -> None:
    # Pillow writes CMYK inverted, as Adobe does. A reader that ignores this shows the negative.
    path = save(pictures.gradient().convert("CMYK"), tmp_path / "print.jpg", quality=95)
    assert difference(open_photo(path), pictures.gradient()) < 4
    path = save(pictures.gradient().convert("CMYK"), tmp_path / "print.tif")
    assert difference(open_photo(path), pictures.gradient()) < 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profile_is_applied(mode: str, tmp_path: Path) -> None:
    path = save(pictures.gradient().convert(mode), tmp_path / "p.png", icc_profile=pictures.swapped_profile())
    red, green, blue = pictures.gradient().split()
    assert difference(open_photo(path), Image.merge("RGB", (blue, green, red))) < 3


def test_useless_profile_changes_nothing(tmp_path: Path) -> None:
    path = save(pictures.gradient(), tmp_path / "p.png", icc_profile=b"not a profile")
    assert difference(open_photo(path), pictures.gradient()) == 0


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.tile(np.linspace(0, 65535, 64).round(), (48, 1))
    expected = Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    assert difference(open_photo(pictures.deep_png(tmp_path / "grey.png", grey)), expected) < 1
    tiff = save(Image.fromarray(grey.astype(np.uint16)), tmp_path / "grey.tif")
    assert difference(open_photo(tiff), expected) < 1
    colour = np.stack([grey, grey[:, ::-1], np.full_like(grey, 30_000)], axis=-1)
    expected = Image.fromarray((colour / 257).round().astype(np.uint8))
    assert difference(open_photo(pictures.deep_png(tmp_path / "colour.png", colour)), expected) < 1


def test_float_picture_is_scaled(tmp_path: Path) -> None:
    grey = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))
    opened = pixels(open_photo(save(Image.fromarray(grey), tmp_path / "float.tif")))
    assert opened.min() == 0 and opened.max() == 255 and np.all(np.diff(opened[0, :, 0]) > 0)


def test_transparency_becomes_grey(tmp_path: Path) -> None:
    image = pictures.gradient().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((255, 0, 0, 0), (0, 0, 20, 20))
    soft = image.copy()
    soft.putpixel((30, 30), (255, 255, 255, 128))
    for name, picture in {"rgba.png": soft, "la.png": image.convert("LA"), "palette.png": image.quantize(64)}.items():
        opened = open_photo(save(picture, tmp_path / name))
        assert opened.getpixel((5, 5)) == BACKGROUND, name
        assert difference(opened, pictures.gradient()) < 60
    blended = open_photo(tmp_path / "rgba.png").getpixel((30, 30))
    assert isinstance(blended, tuple) and all(abs(value - 191) <= 2 for value in blended)


def test_palette_with_alpha_keeps_its_colours(tmp_path: Path) -> None:
    palette = pictures.gradient().quantize(128)
    expected = palette.convert("RGB")
    palette.putpixel((0, 0), 5)
    path = save(palette, tmp_path / "p.png", transparency=5)
    opened = open_photo(path)
    assert opened.getpixel((0, 0)) == BACKGROUND
    solid = pixels(palette) != 5
    assert np.array_equal(pixels(opened)[solid], pixels(expected)[solid])


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    path = save(frames[0], tmp_path / "wave.gif", save_all=True, append_images=frames[1:], duration=100)
    opened = pixels(open_photo(path))
    assert opened[..., 0].min() > 250 and opened[..., 1:].max() < 5


def test_large_pictures_are_shrunk_early(tmp_path: Path) -> None:
    for name in ("large.jpg", "large.bmp"):
        photo = read_photo(save(pictures.gradient(8400, 600), tmp_path / name))
        opened = photo.image
        assert photo.size == (8400, 600) and opened.size == (MAX_SIDE, 146)
        assert difference(opened.resize((96, 64)), pictures.gradient()) < 4


def test_every_form_of_one_picture_is_equal(tmp_path: Path) -> None:
    image = pictures.gradient()
    array = np.asarray(image)
    path = save(image, tmp_path / "p.png")
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    forms: list[Any] = [
        path,
        str(path),
        buffer.getvalue(),
        image,
        array,
        array / 255.0,
        tensor,
        tensor.float() / 255,
        tensor[None],
    ]
    for form in forms:
        opened = open_photo(form)
        assert opened.mode == "RGB" and opened.info == {}
        assert difference(opened, image) == 0


def test_the_given_picture_is_left_alone(tmp_path: Path) -> None:
    with Image.open(save(pictures.gradient(), tmp_path / "p.jpg")) as lazy:
        open_photo(lazy)
        assert lazy.size == pictures.gradient().size and lazy.mode == "RGB"
    image = pictures.gradient()
    image.info["note"] = "mine"
    opened = open_photo(image)
    opened.putpixel((0, 0), (9, 9, 9))
    assert image.info == {"note": "mine"} and image.getpixel((0, 0)) != (9, 9, 9)


def test_grey_array() -> None:
    opened = pixels(open_photo(np.tile(np.arange(64, dtype=np.uint8), (40, 1))))
    assert opened.shape == (40, 64, 3) and np.array_equal(opened[0, :, 1], np.arange(64))
