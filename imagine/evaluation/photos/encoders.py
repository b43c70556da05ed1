"""Networks that compare photographs: a face recogniser, CLIP and DINO. Nothing is downloaded.

An encoder turns pictures into vectors of length 1. Any object with `name` and `images` is one (`ImageEncoder`), so a
user may bring a recogniser of their own.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagine.errors import ConfigError
from imagine.paths import as_path, kind_of, shorten_path
from imagine.people.faces import FaceFinder, default_finder
from imagine.people.photo_recogniser import PhotoRecogniser
from imagine.records import FaceBox

CLIP = ("ViT-B-32-quickgelu", "openai")  # of the practice in DreamBench's reproductions
_DINO_MEAN, _DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageEncoder(Protocol):
    """Pictures to vectors of length 1; a row of zeros stands for a picture that the encoder cannot compare."""

    name: str

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (N, D)."""
        ...


class FaceEncoder:
    """The largest face of each picture, by a face finder and any function from picture and face to a vector."""

    def __init__(
        self, name: str, finder: FaceFinder, embed: Callable[[Image.Image, FaceBox], NDArray[Any]], width: int = 128
    ) -> None:
        self.name, self.finder, self.embed, self.width = name, finder, embed, width

    @classmethod
    def for_photographs(cls) -> "FaceEncoder":
        """Return dlib's recogniser with YuNet, from the extra `photos`. Raises ImagineError without it."""
        return cls("dlib", default_finder(), PhotoRecogniser().embed)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (N, width): unit vectors, and zeros for pictures without a face."""
        out = torch.zeros(len(pictures), self.width)
        for row, picture in enumerate(pictures):
            if faces := self.finder.find(picture):
                out[row] = F.normalize(torch.from_numpy(np.asarray(self.embed(picture, faces[0]), np.float32)), dim=0)
        return out


class ClipEncoder:
    """A CLIP model of open_clip, for CLIP-I (pictures) and CLIP-T (pictures and prompts)."""

    def __init__(self, name: str, model: Any, preprocess: Callable[[Image.Image], Tensor], tokenizer: Any) -> None:
        self.name, self.model, self.preprocess, self.tokenizer = name, model.eval(), preprocess, tokenizer

    @classmethod
    def from_disk(cls, source: str | None = None) -> "ClipEncoder":
        """Load a model that is on this disk: a folder of open_clip, MODEL=FILE, or the default from its cache.

        Raises ConfigError if it is not there.
        """
        open_clip: Any = importlib.import_module("open_clip")
        name, pretrained = CLIP if source is None else _clip_source(source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, preprocess = open_clip.create_model_from_pretrained(name, pretrained)
                tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # the hub, the file and the model raise errors of many kinds
            wanted = source or f"{CLIP[0]} of {CLIP[1]}"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"CLIP {wanted} is not on this disk ({reason}): name a folder or MODEL=FILE.") from error
        shown = name if pretrained is None else f"{name} {Path(pretrained).name}"
        return cls(shown.removeprefix("local-dir:").rsplit("/", 1)[-1], model, preprocess, tokenizer)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (N, D)."""
        batch = torch.stack([self.preprocess(picture.convert("RGB")) for picture in pictures])
        return F.normalize(self.model.encode_image(batch).float(), dim=-1)

    @torch.inference_mode()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Return (N, D)."""
        return F.normalize(self.model.encode_text(self.tokenizer(list(sentences))).float(), dim=-1)


class DinoEncoder:
    """A DINO vision transformer in the format of transformers: its class token, as DreamBench uses it.

    Pictures are resized to 256 pixels (bicubic) and cropped to 224 in the middle.
    """

    def __init__(self, name: str, model: Any, side: int = 224) -> None:
        self.name, self.model, self.side = name, model.eval(), side

    @classmethod
    def from_disk(cls, folder: str) -> "DinoEncoder":
        """Load a folder, or a model of the local cache by its id. Raises ConfigError if it is not there."""
        transformers: Any = importlib.import_module("transformers")
        try:
            model = transformers.AutoModel.from_pretrained(str(as_path(folder)), local_files_only=True)
        except Exception as error:  # transformers raises errors of many kinds
            reason = str(error).splitlines()[0]
            raise ConfigError(f"DINO {folder} is not on this disk ({reason}): name a folder that holds it.") from error
        side = int(getattr(model.config, "image_size", 224))
        return cls(Path(folder).name, model, side)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (N, D)."""
        batch = torch.stack([self._prepared(picture) for picture in pictures])
        return F.normalize(self.model(pixel_values=batch).last_hidden_state[:, 0].float(), dim=-1)

    def _prepared(self, picture: Image.Image) -> Tensor:
        scale = round(self.side * 256 / 224) / min(picture.size)
        size = (max(self.side, round(picture.width * scale)), max(self.side, round(picture.height * scale)))
        resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        cut = np.asarray(resized.crop((left, top, left + self.side, top + self.side)), np.float32) / 255
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_DINO_MEAN, _DINO_STD))
        return (torch.from_numpy(cut).permute(2, 0, 1) - mean) / std


def _clip_source(source: str) -> tuple[str, str | None]:
    model, _, file = source.partition("=")
    if file:
        if kind_of(as_path(file), ConfigError) != "file":
            raise ConfigError(f"There is no file {shorten_path(file)} with weights of CLIP {model}: check the path.")
        return model, str(as_path(file))
    if kind_of(as_path(source), ConfigError) != "folder":
        raise ConfigError(f"There is no folder {shorten_path(source)} of a CLIP model: name a folder, or MODEL=FILE.")
    return f"local-dir:{as_path(source).absolute()}", None
