"""A public base as diffusers saves one, Stable Diffusion 1.5 or XL, read piece by piece.

A step needs the denoiser and the noise schedule. Autoencoder and text encoders are in memory only while what they make
is written to disk (`train.cache.latents`, `train.data.text_states`), or while pictures are drawn to be looked at.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagine.errors import ConfigError, PromptError
from imagine.networks.encoders import TextEncoders, VisionEncoder
from imagine.networks.vision_conversion import from_transformers
from imagine.networks.weights import INDEX, dtype_argument, fetching, is_hub_id, load_model, quiet_libraries
from imagine.records import Tokens

Encode = Callable[[Sequence[str]], dict[str, Tokens]]
_KINDS = {2048: "Stable Diffusion XL", 1024: "Stable Diffusion 2", 768: "Stable Diffusion 1.5"}  # by text width
_FINGERPRINT_SAMPLES, _FINGERPRINT_BYTES = 1024, 512  # parts of a weights file that are hashed, and their bytes
_FINGERPRINTED_SUFFIXES = (".json", ".model", ".safetensors", ".txt")  # files that are hashed
_SHORTENING_FACTOR = 0.75


@dataclass(frozen=True)
class DiffusersBase:
    """The folder of a pipeline whose denoiser is a UNet2DConditionModel, and what its model_index.json says."""

    folder: Path
    index: Mapping[str, Any]

    @property
    def xl(self) -> bool:
        """Whether it hears two text encoders, and sizes beside the time, as SDXL does."""
        return bool((self.index.get("text_encoder_2") or [None])[0])

    @property
    def empty_is_zeros(self) -> bool:
        """Whether zeros stand for no sentence, rather than the states of an empty one."""
        return self.xl and bool(self.index.get("force_zeros_for_empty_prompt", True))

    @property
    def kind(self) -> str:
        """What family it is of, in words."""
        return _KINDS.get(int(self.config("unet")["cross_attention_dim"]), str(self.index["_class_name"]))

    def config(self, part: str) -> dict[str, Any]:
        """What a part's config.json says."""
        return read_config(self.folder / part)

    def denoiser(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Its UNet2DConditionModel, weights and all; on the meta device its shapes alone."""
        from diffusers import UNet2DConditionModel

        if self.config("unet")["in_channels"] != self.config("vae")["latent_channels"]:
            raise ConfigError(f"{self.folder} paints into given pictures: name a base that draws from noise alone.")
        if device.type == "meta":
            with quiet_libraries():
                return UNet2DConditionModel.from_config(self.config("unet")).to(dtype)
        folder = self.folder / "unet"
        return load_model(folder, "diffusers", "UNet2DConditionModel", dtype, variant=_variant(folder))

    @cached_property
    def schedule(self) -> Any:
        """The noise it was trained with, as a DDPMScheduler. Raises ConfigError for a kind that is not."""
        from diffusers import DDPMScheduler

        file = self.folder / "scheduler" / "scheduler_config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file} cannot be read, and without it nobody knows the noise of this base: download it with the "
                "rest (docs/training.md says how)."
            ) from error
        schedule = DDPMScheduler.from_config(config, clip_sample=False)
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"{self.folder} predicts {schedule.config.prediction_type}; name a base that predicts epsilon or "
                "v_prediction."
            )
        return schedule


def open_base(name: str, shapes_only: bool = False) -> DiffusersBase:
    """The base in a folder, or in the hub repository owner/name, of which `shapes_only` fetches no weights.

    Raises ConfigError, in a sentence that says what is missing, if there is none that can be trained on.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(name):
            raise ConfigError(
                f"There is no folder {name} with the base to train on: save one there, as by the `hf download` of "
                "docs/training.md, which takes what training needs alone, or set `base` to a folder that holds a "
                "Stable Diffusion 1.5 or XL pipeline."
            )
        folder = _fetched(name, shapes_only)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        assert index["unet"][1] == "UNet2DConditionModel" and index["text_encoder"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"{folder} holds no Stable Diffusion 1.5 or XL pipeline in diffusers' layout ({INDEX} with a unet and a "
            "text_encoder): set `base` to one that does."
        ) from error
    return DiffusersBase(folder, index)


def _fetched(name: str, shapes_only: bool) -> Path:
    """Where the hub repository lies once it is fetched."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    with fetching(name), quiet_libraries():
        if shapes_only:
            return Path(snapshot_download(name, allow_patterns=["*.json"]))
        return Path(DiffusionPipeline.download(name, use_safetensors=True))


class BaseCodec:
    """The base's own autoencoder between pictures and latents, loaded when it is needed, gone after `free`."""

    def __init__(self, base: DiffusersBase, device: torch.device) -> None:
        self.folder, self.device, self.config = base.folder / "vae", device, base.config("vae")
        self._vae: Any = None

    @property
    def mark(self) -> str:
        return _fingerprint(self.folder)

    def shape(self, side: int) -> tuple[int, int, int]:
        cells, left = divmod(side, 2 ** (len(self.config["block_out_channels"]) - 1))
        if left:
            raise ConfigError(f"resolution: the autoencoder in {self.folder} cannot divide {side} pixels evenly.")
        return int(self.config["latent_channels"]), cells, cells

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        # In float32, as the one of SDXL overflows in half; and the middle of what it finds, as latents are kept.
        with torch.autocast(self.device.type, enabled=False):
            found = self._loaded().encode(images.to(self.device)).latent_dist.mode()
        return (found - self._shift) * float(self.config["scaling_factor"])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            latents = latents.to(self.device).float() / float(self.config["scaling_factor"]) + self._shift
            drawn = torch.cat([self._loaded().decode(one).sample for one in latents.split(1)])  # one, for memory's sake
        return (drawn / 2 + 0.5).clamp(0, 1)

    def free(self) -> None:
        """Let go of the network."""
        self._vae = None

    @property
    def _shift(self) -> float:
        return float(self.config.get("shift_factor") or 0.0)

    def _loaded(self) -> Any:
        if self._vae is None:
            loaded = load_model(
                self.folder, "diffusers", "AutoencoderKL", torch.float32, variant=_variant(self.folder)
            )  # fmt: skip
            self._vae = loaded.to(self.device).requires_grad_(False)
        return self._vae


@dataclass(frozen=True)
class BaseTextEncoders:
    """The base's own text encoders: the states that its denoiser reads ("clip"), and in SDXL one vector ("pooled")."""

    base: DiffusersBase
    device: torch.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of what each sentence becomes: how many tokens at most, and how wide."""
        window = int(self.base.config("text_encoder")["max_position_embeddings"])
        shapes = {"clip": (window, int(self.base.config("unet")["cross_attention_dim"]))}
        if self.base.xl:
            shapes["pooled"] = (1, int(self.base.config("text_encoder_2")["projection_dim"]))
        return shapes

    @property
    def mark(self) -> str:
        """Digits for what tokens depend on besides their sentence."""
        parts = ("text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if self.base.xl else ()))
        return _fingerprint(*(self.base.folder / name for name in parts)) + (
            "-zeros" if self.base.empty_is_zeros else ""
        )

    def load(self) -> Encode:
        """The encoders in memory, behind a function, by the stock pipeline's own reading of prompts."""
        import diffusers

        folder = self.base.folder
        kind = diffusers.StableDiffusionXLPipeline if self.base.xl else diffusers.StableDiffusionPipeline
        more: dict[str, Any] = {dtype_argument(kind): torch.float32}
        if not self.base.xl:
            more |= {"safety_checker": None, "requires_safety_checker": False}
        with quiet_libraries():
            pipe = kind.from_pretrained(
                folder, unet=None, vae=None, feature_extractor=None, image_encoder=None, use_safetensors=True,
                local_files_only=True, variant=_variant(folder / "text_encoder"), **more,
            )  # fmt: skip
        pipe.to(self.device)

        def encode(texts: Sequence[str]) -> dict[str, Tokens]:
            with quiet_libraries():  # a caption beyond the window loses its end, as a prompt does
                found = pipe.encode_prompt(
                    prompt=list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            states = {"clip": found[0], **({"pooled": found[2].unsqueeze(1)} if self.base.xl else {})}
            if self.base.empty_is_zeros:
                is_empty = torch.tensor([not text for text in texts], device=self.device)
                states = {name: values.masked_fill(is_empty.view(-1, 1, 1), 0) for name, values in states.items()}
            return {name: Tokens(values) for name, values in states.items()}

        return encode


@dataclass(frozen=True)
class T5TextEncoder:
    """T5 ("t5") or ByT5 ("byt5") from a folder with the model and its tokenizer, read as the pipeline reads them."""

    name: str
    folder: Path
    tokens: int  # kept of a sentence
    device: torch.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {self.name: (self.tokens, self.width)}

    @property
    def width(self) -> int:
        return int(read_config(self.folder)["d_model"])

    @property
    def mark(self) -> str:
        return f"{_fingerprint(self.folder)}-{self.tokens}"

    def load(self) -> Encode:
        from transformers import AutoTokenizer

        # The largest of them do not fit in float32; bfloat16 has T5's range, which half precision lacks.
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = load_model(self.folder, "transformers", "T5EncoderModel", dtype).to(self.device)
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        encoders = TextEncoders(None, None, model, tokenizer, model, tokenizer)
        read = encoders.encode_t5 if self.name == "t5" else encoders.encode_byt5

        def encode(texts: Sequence[str]) -> dict[str, Tokens]:
            with suppress(PromptError):
                return {self.name: read(texts)}
            return {self.name: read([_truncated(read, text) for text in texts])}

        return encode


def _truncated(read: Callable[[Sequence[str]], Tokens], text: str) -> str:
    """The text, or as much of its beginning as can be read."""
    while True:
        try:
            read([text])
        except PromptError:
            text = text[: int(len(text) * _SHORTENING_FACTOR)]
        else:
            return text


def load_vision(folder: Path, device: torch.device) -> VisionEncoder:
    """The vision encoder in a folder, ours or transformers', in float32; on the meta device its shapes alone."""
    config = read_config(folder)
    if config.get("_class_name") == "VisionEncoder":
        if device.type == "meta":
            return VisionEncoder.from_config(config)
        return load_model(folder, "imagine.networks.encoders", "VisionEncoder", torch.float32)
    if (config.get("architectures") or [""])[0] != "CLIPVisionModelWithProjection":
        raise ConfigError(
            f"{folder} holds no vision encoder that can be trained: name the folder of a "
            "CLIPVisionModelWithProjection, such as an IP-Adapter's image_encoder, or one that imagine saved."
        )
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with quiet_libraries():
        if device.type == "meta":
            return from_transformers(CLIPVisionModelWithProjection(CLIPVisionConfig(**config)))
        return from_transformers(load_model(folder, "transformers", "CLIPVisionModelWithProjection", torch.float32))


def time_ids(frames: Tensor, side: int) -> Tensor:
    """What SDXL is told of pictures that squares of `side` pixels were cut from (arXiv 2307.01952, section 2.2).

    `frames` (B, 4) as `AnyPictures.frames`; (B, 6) height and width before scaling, top and left cut off after it, and
    height and width of the square.
    """
    width, height, left, top = frames.unbind(1)
    scale = side / torch.minimum(width, height)
    wanted = torch.full_like(width, side)
    return torch.stack((height, width, top * scale, left * scale, wanted, wanted), 1)


def read_config(folder: Path) -> dict[str, Any]:
    """A component's config.json; ConfigError if there is none."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no config.json that can be read: save or download the model there, or name the folder that "
            "holds it (docs/training.md says how)."
        ) from error
    assert isinstance(content, dict)
    return content


def _variant(folder: Path) -> str | None:
    """ "fp16" for a folder that holds its weights in half precision only."""
    names = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _fingerprint(*folders: Path) -> str:
    """Twelve hexadecimal digits that tell these components from others: weights, configuration and vocabulary.

    Weights are looked into here and there. Of a config.json counts what it says of the network, not who saved it.
    """
    digest = hashlib.sha256()
    for file in (
        file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in _FINGERPRINTED_SUFFIXES
    ):
        size = file.stat().st_size
        if file.suffix != ".safetensors":
            content = _network_config(file) if file.name == "config.json" else file.read_bytes()
            digest.update(f"{file.name} {len(content)}".encode() + content)
            continue
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for place in range(0, size, max(_FINGERPRINT_BYTES, size // _FINGERPRINT_SAMPLES)):
                opened.seek(place)
                digest.update(opened.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:12]


def _network_config(config: Path) -> bytes:
    """What a config.json says of its network."""
    network_values = {name: value for name, value in read_config(config.parent).items() if not name.startswith("_")}
    return json.dumps({**network_values, "transformers_version": None}, sort_keys=True).encode()
