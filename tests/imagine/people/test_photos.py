"""Every unusual picture opens as a viewer shows it, or is refused with one sentence that says what to do."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import ExifTags, Image

from imagine.errors import PictureError
from imagine.people import colours
from imagine.people.photos import BACKGROUND, MAX_SIDE, open_photo, read_photo
from tests import pictures
from tests.photographs import astronaut


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


def png_without_pixels(folder: Path) -> Path:
    """Return a PNG whose data are damaged from the beginning, which reading its EXIF must not hide."""
    path = save(pictures.gradient(300, 200), folder / "broken.png")
    data = path.read_bytes()
    place = data.index(b"IDAT") + 4
    path.write_bytes(data[:place] + b"no zlib" + data[place + 7 :])
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
    (png_without_pixels, "is incomplete or damaged"),
    (one_pixel, "1 x 1 pixels, too small"),
    (bomb, "more than 128 million pixels"),
    (between_the_limits, "13,000 x 13,000 pixels, more than 128 million"),
    (disk_image, "larger than 512 MB"),
    (strip, "too narrow a strip"),
    (unreadable_heic, "is not a picture that can be read"),
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


def test_a_heic_photo_of_a_phone_on_its_side_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the phone was turned: show it turned by 90 degrees clockwise
    path = tmp_path / "phone.heic"
    pillow_heif.from_pillow(astronaut().rotate(90)).save(path, exif=exif.tobytes(), quality=90)
    photo = read_photo(path)
    assert (photo.format, photo.orientation, photo.size) == ("HEIF", 6, (512, 512))
    assert np.abs(np.array(photo.image, np.float64) - np.array(astronaut(), np.float64)).mean() < 3


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
TURNED = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "TIFF:tiff_lzw", "TIFF:tiff_adobe_deflate", "TIFF:jpeg")


@pytest.mark.parametrize("given", ["bytes", "opened", "loaded"])
@pytest.mark.parametrize("kind", TURNED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_equals_upright(orientation: int, kind: str, given: str) -> None:
    upright = pictures.gradient()
    content = pictures.turned(upright, orientation, kind)
    source: Any = content if given == "bytes" else Image.open(io.BytesIO(content))
    if given == "loaded":
        source.load()
    photo = read_photo(source)
    assert photo.image.size == upright.size and difference(photo.image, upright) < 3
    if given != "loaded":  # then Pillow may have forgotten how it was stored
        stored = upright.size if orientation < 5 else upright.size[::-1]
        assert (photo.orientation, photo.size) == (orientation, stored)


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


def swapped() -> Image.Image:
    red, green, blue = pictures.gradient().split()
    return Image.merge("RGB", (blue, green, red))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_colour_profile_is_applied_in_every_format(kind: str) -> None:
    file = io.BytesIO()
    pictures.gradient().save(file, kind, quality=95, icc_profile=pictures.swapped_profile())
    assert difference(open_photo(file.getvalue()), swapped()) < 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P with key", "PA", "RGB with key"])
def test_colour_profile_is_applied_in_every_mode(mode: str) -> None:
    image, kind = pictures.gradient(), "TIFF" if mode == "PA" else "PNG"
    image.putpixel((0, 0), (1, 2, 3))
    image = image.quantize(255).convert("PA") if mode == "PA" else image.quantize(255) if mode[0] == "P" else image
    image = image.convert("RGBA") if mode == "RGBA" else image
    image.info["icc_profile"] = pictures.swapped_profile()
    if mode == "PA":  # no format holds it, but Pillow images do
        assert difference(open_photo(image), swapped()) < 6
        return
    key = {"RGB with key": (1, 2, 3), "P with key": image.getpixel((0, 0)) if mode[0] == "P" else None}.get(mode)
    file = io.BytesIO()
    image.save(file, kind, icc_profile=pictures.swapped_profile(), **({} if key is None else {"transparency": key}))
    opened = open_photo(file.getvalue())
    assert difference(opened, swapped()) < 6
    assert (opened.getpixel((0, 0)) == BACKGROUND) == (key is not None)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_colour_profile_is_applied_to_grey(mode: str, tmp_path: Path) -> None:
    profile = colours._profile(colours._SRGB, colours._D65, lambda values: values)  # linear, so all greys get brighter
    grey = pictures.gradient().convert("L")
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    assert picture.mode == mode
    opened = open_photo(save(picture, tmp_path / "grey.png", icc_profile=profile))
    linear = pixels(grey.convert("RGB")) / 255
    assert np.abs(pixels(opened) - 255 * encoded(linear)).max() < 3


# Matrices from linear light to XYZ under D65, as published: AdobeRGB (1998), Display P3 and ITU-R BT.2020
TO_XYZ = {
    "adobe": [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]],
    "p3": [[0.48657, 0.26567, 0.19822], [0.22898, 0.69174, 0.07929], [0.0, 0.04511, 1.04394]],
    "2020": [[0.63696, 0.14462, 0.16888], [0.2627, 0.678, 0.0593], [0.0, 0.02807, 1.06099]],
    "srgb": [[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07217], [0.01933, 0.11919, 0.9503]],
}


def encoded(linear: Any) -> Any:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def decoded(values: Any) -> Any:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def shown(stored: Image.Image, space: str, curve: Callable[[Any], Any]) -> Any:
    """Return the sRGB pixels that a viewer shows for numbers stored in another space."""
    linear = curve(pixels(stored) / 255) @ np.array(TO_XYZ[space]).T @ np.linalg.inv(np.array(TO_XYZ["srgb"])).T
    return 255 * encoded(np.clip(linear, 0, 1))


def soft() -> Image.Image:
    """Return a picture of muted colours, which all spaces can show."""
    return Image.fromarray((pixels(pictures.gradient()) * 0.4 + 80).astype(np.uint8))


def chunks(*each: tuple[bytes, bytes]) -> Callable[[Image.Image], bytes]:
    return lambda image: pictures.png_with(image, *each)


def saved_as(kind: str, exif: bytes) -> Callable[[Image.Image], bytes]:
    def write(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, exif=exif, quality=100, **({"subsampling": 0} if kind == "JPEG" else {}))
        return file.getvalue()

    return write


def coded_avif(image: Image.Image) -> bytes:
    return pictures.with_codes(saved_as("AVIF", b"")(image), 12, 13)


def ints(*values: float) -> bytes:
    return struct.pack(f">{len(values)}I", *(round(each * 100_000) for each in values))


GAMMA = (b"gAMA", ints(1.0))
P3 = (b"cHRM", ints(0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
STATED: list[tuple[str, Callable[[Image.Image], bytes], str, Callable[[Any], Any]]] = [
    ("cICP of Display P3", chunks((b"cICP", bytes([12, 13, 0, 1]))), "p3", decoded),
    ("cICP of BT.2020, gamma 2.2", chunks((b"cICP", bytes([9, 4, 0, 1]))), "2020", lambda values: values**2.2),
    ("cICP before gAMA", chunks((b"cICP", bytes([12, 13, 0, 1])), GAMMA), "p3", decoded),
    ("cICP of sRGB", chunks((b"cICP", bytes([1, 13, 0, 1])), GAMMA), "srgb", decoded),
    ("cICP without a meaning", chunks((b"cICP", bytes([77, 99, 0, 1]))), "srgb", decoded),
    ("gAMA, linear", chunks(GAMMA), "srgb", lambda values: values),
    ("gAMA and cHRM", chunks((b"gAMA", ints(1 / 2.2)), P3), "p3", lambda values: values**2.2),
    ("gAMA of sRGB", chunks((b"gAMA", ints(0.45455))), "srgb", decoded),
    ("sRGB before gAMA", chunks((b"sRGB", b"\0"), GAMMA), "srgb", decoded),
    ("EXIF of AdobeRGB, JPEG", saved_as("JPEG", pictures.adobe_exif()), "adobe", lambda values: values ** (563 / 256)),
    ("EXIF of AdobeRGB, WebP", saved_as("WEBP", pictures.adobe_exif()), "adobe", lambda values: values ** (563 / 256)),
    ("EXIF, not standard", saved_as("JPEG", pictures.adobe_exif(2, b"R98")), "adobe", lambda v: v ** (563 / 256)),
    ("EXIF of sRGB", saved_as("JPEG", pictures.adobe_exif(1, b"R98")), "srgb", decoded),
    ("nclx of Display P3 in AVIF", coded_avif, "p3", decoded),
]  # fmt: skip


@pytest.mark.parametrize(("write", "space", "curve"), [each[1:] for each in STATED], ids=[each[0] for each in STATED])
def test_colours_are_shown_as_the_file_states(
    write: Callable[[Image.Image], bytes], space: str, curve: Callable[[Any], Any]
) -> None:
    opened = pixels(open_photo(write(soft())))
    assert np.abs(opened - shown(soft(), space, curve)).mean() < 1.2


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.58), (18, 0.75)])
def test_paper_white_of_high_dynamic_range_is_white(transfer: int, white: float) -> None:
    flat = Image.new("RGB", (64, 64), (round(white * 255),) * 3)
    opened = open_photo(pictures.png_with(flat, (b"cICP", bytes([1, transfer, 0, 1]))))
    assert pixels(opened).min() > 250
    darker = open_photo(pictures.png_with(flat.point(lambda value: value // 2), (b"cICP", bytes([1, transfer, 0, 1]))))
    assert pixels(darker).max() < 200


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_an_icon_smaller_than_its_header_states_is_refused(tmp_path: Path) -> None:
    content = save(pictures.gradient(64, 64), tmp_path / "x.ico", sizes=[(16, 16)]).read_bytes()
    with pytest.raises(PictureError, match="16 x 16 pixels, too small"):
        open_photo(content[:6] + b"\x40\x40" + content[8:])


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
