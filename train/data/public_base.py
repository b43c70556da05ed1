"""Load the components of a public base, Stable Diffusion 1.5 or XL in diffusers' layout, one at a time.

A step needs the denoiser and the noise schedule. The autoencoder and the text encoders are in memory only while the
caches are filled (`train.cache.latents`, `train.data.text_states`) and while sample pictures are generated.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.networks.encoders import TextEncoders, VisionEncoder, quoted
from imagine.networks.vision_conversion import from_transformers
from imagine.networks.weights import INDEX, dtype_argument, fetching, is_hub_id, load_model, quiet_libraries
from imagine.records import Tokens
from train.cache.shortening import shorten

Encode = Callable[[Sequence[str]], dict[str, Tokens]]
Shorten = Callable[[str], str]
_KINDS = {2048: "Stable Diffusion XL", 1024: "Stable Diffusion 2", 768: "Stable Diffusion 1.5"}  # by text width
_FINGERPRINT_SAMPLES, _FINGERPRINT_BYTES = 1024, 512  # number of samples of a weights file to hash, and their bytes
_FINGERPRINTED_SUFFIXES = (".json", ".model", ".safetensors", ".txt")  # files that are hashed


@dataclass(frozen=True)
class DiffusersBase:
    """The folder of a pipeline whose denoiser is a UNet2DConditionModel, and the content of its model_index.json."""

    folder: Path
    index: Mapping[str, Any]

    @property
    def xl(self) -> bool:
        """Whether it is conditioned on two text encoders and on picture sizes, as SDXL is."""
        return bool((self.index.get("text_encoder_2") or [None])[0])

    @property
    def empty_is_zeros(self) -> bool:
        """Whether an empty sentence is encoded as zeros instead of as the states of an empty sentence."""
        return self.xl and bool(self.index.get("force_zeros_for_empty_prompt", True))

    @property
    def kind(self) -> str:
        """The name of its model family."""
        return _KINDS.get(int(self.config("unet")["cross_attention_dim"]), str(self.index["_class_name"]))

    def config(self, part: str) -> dict[str, Any]:
        """Return the content of a part's config.json."""
        return read_config(self.folder / part)

    def denoiser(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Load its UNet2DConditionModel with its weights; on the meta device, build it without weights."""
        from diffusers import UNet2DConditionModel

        if self.config("unet")["in_channels"] != self.config("vae")["latent_channels"]:
            raise ConfigError(f"{self.folder} is an inpainting model; name a base for text-to-image generation.")
        if device.type == "meta":
            with quiet_libraries():
                return UNet2DConditionModel.from_config(self.config("unet")).to(dtype)
        folder = self.folder / "unet"
        return load_model(folder, "diffusers", "UNet2DConditionModel", dtype, variant=variant_of(folder))

    @cached_property
    def schedule(self) -> Any:
        """Its noise schedule as a DDPMScheduler; ConfigError for an unreadable file or another prediction type."""
        from diffusers import DDPMScheduler

        file = self.folder / "scheduler" / "scheduler_config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file} cannot be read. It holds the noise schedule of this base; download it with the other files "
                "(see docs/training.md)."
            ) from error
        schedule = DDPMScheduler.from_config(config, clip_sample=False)
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"The prediction type of {self.folder} is {schedule.config.prediction_type}; name a base that predicts "
                "epsilon or v_prediction."
            )
        return schedule


def open_base(name: str, shapes_only: bool = False) -> DiffusersBase:
    """Open the base in a folder or in the hub repository owner/name; with `shapes_only`, no weights are downloaded.

    Raises ConfigError, saying what is missing, if there is no base that can be trained on.
    """
    folder = base_folder(name, shapes_only)
    index = read_pipeline(folder)
    try:
        assert index["unet"][1] == "UNet2DConditionModel" and index["text_encoder"][0]
    except (KeyError, IndexError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"{folder} holds no Stable Diffusion 1.5 or XL pipeline in diffusers' layout ({INDEX} with a unet and a "
            "text_encoder). Set `base` to a folder that holds one."
        ) from error
    return DiffusersBase(folder, index)


def base_folder(name: str, shapes_only: bool) -> Path:
    """Return the folder of a base; a hub repository is downloaded. Raises ConfigError if there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not is_hub_id(name):
        raise ConfigError(
            f"There is no folder {name} with a base to train on. Download a base to it with the "
            "`hf download` command of docs/training.md, which fetches only the files that training needs, or set "
            "`base` to a folder with a Stable Diffusion 1.5 or XL pipeline."
        )
    return _fetched(name, shapes_only)


def read_pipeline(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's model_index.json; empty if it cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _fetched(name: str, shapes_only: bool) -> Path:
    """Download the hub repository and return its folder."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    with fetching(name), quiet_libraries():
        if shapes_only:
            return Path(snapshot_download(name, allow_patterns=["*.json"]))
        return Path(DiffusionPipeline.download(name, use_safetensors=True))


class BaseFiles(Protocol):
    """The folder of a base, and the configurations of its components."""

    @property
    def folder(self) -> Path: ...

    def config(self, part: str) -> dict[str, Any]:
        """Return the content of a part's config.json."""
        ...


class BaseCodec:
    """The base's autoencoder between pictures and latents. It is loaded on first use and released by `free`.

    patch: how many cells in each direction the denoiser joins to one token, which the sides must divide into.
    """

    autoencoder = "AutoencoderKL"

    def __init__(self, base: BaseFiles, device: torch.device, patch: int = 1) -> None:
        self.folder, self.device, self.config = base.folder / "vae", device, base.config("vae")
        self.patch = patch
        self._vae: Any = None

    @property
    def mark(self) -> str:
        return fingerprint_of(self.folder)

    @property
    def pixels(self) -> int:
        """Number of pixels per cell, in each direction."""
        return int(2 ** (len(self.config["block_out_channels"]) - 1))

    @property
    def channels(self) -> int:
        """Number of channels of the latents."""
        return int(self.config["latent_channels"])

    @property
    def scale(self) -> float:
        """The factor that normalises the latents."""
        return float(self.config["scaling_factor"])

    def shape(self, side: int) -> tuple[int, int, int]:
        cells, left = divmod(side, self.pixels)
        if left or cells % self.patch:
            raise ConfigError(
                f"resolution: the autoencoder in {self.folder} cannot divide {side} pixels evenly; choose another, for "
                "example a multiple of 64."
            )
        return self.channels, cells, cells

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        # float32, because SDXL's autoencoder overflows in half precision; mode(), because the latents are cached.
        with torch.autocast(self.device.type, enabled=False):
            return self.to_latents(self._loaded(), images.to(self.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            latents = latents.to(self.device).float()
            # one picture at a time, to save memory
            drawn = torch.cat([self.to_pictures(self._loaded(), one) for one in latents.split(1)])
        return (drawn / 2 + 0.5).clamp(0, 1)

    def to_latents(self, vae: Any, images: Tensor) -> Tensor:
        """Return the normalised latents of pictures, -1 to 1."""
        found: Tensor = vae.encode(images).latent_dist.mode()
        return (found - self._shift) * self.scale

    def to_pictures(self, vae: Any, latents: Tensor) -> Tensor:
        """Return the pictures, -1 to 1, of normalised latents."""
        decoded: Tensor = vae.decode(latents / self.scale + self._shift).sample
        return decoded

    def free(self) -> None:
        """Release the network."""
        self._vae = None

    @property
    def _shift(self) -> float:
        return float(self.config.get("shift_factor") or 0.0)

    def _loaded(self) -> Any:
        if self._vae is None:
            loaded = load_model(
                self.folder, "diffusers", self.autoencoder, torch.float32, variant=variant_of(self.folder)
            )  # fmt: skip
            self._vae = loaded.to(self.device).requires_grad_(False)
        return self._vae


@dataclass(frozen=True)
class LoadedEncoder:
    """Loaded text encoders: `encode` gives the tokens of texts by name, and `shorten` cuts a text to what they take."""

    encode: Encode
    shorten: Shorten


@dataclass(frozen=True)
class BaseTextEncoders:
    """The base's text encoders: states for cross-attention ("clip"), in SDXL also a vector ("pooled")."""

    precision: ClassVar[torch.dtype] = torch.float16  # of the cached states
    base: DiffusersBase
    device: torch.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name of each output -> the largest number of tokens per sentence, and their width."""
        window = int(self.base.config("text_encoder")["max_position_embeddings"])
        shapes = {"clip": (window, int(self.base.config("unet")["cross_attention_dim"]))}
        if self.base.xl:
            shapes["pooled"] = (1, int(self.base.config("text_encoder_2")["projection_dim"]))
        return shapes

    @property
    def mark(self) -> str:
        """A fingerprint of everything that the tokens depend on besides their sentence."""
        parts = ("text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if self.base.xl else ()))
        return fingerprint_of(*(self.base.folder / name for name in parts)) + (
            "-zeros" if self.base.empty_is_zeros else ""
        )

    def load(self) -> LoadedEncoder:
        """Load the encoders, which encode texts with the stock pipeline's `encode_prompt`."""
        import diffusers

        folder = self.base.folder
        kind = diffusers.StableDiffusionXLPipeline if self.base.xl else diffusers.StableDiffusionPipeline
        more: dict[str, Any] = {dtype_argument(kind): torch.float32}
        if not self.base.xl:
            more |= {"safety_checker": None, "requires_safety_checker": False}
        with quiet_libraries():
            pipe = kind.from_pretrained(
                folder, unet=None, vae=None, feature_extractor=None, image_encoder=None, use_safetensors=True,
                local_files_only=True, variant=variant_of(folder / "text_encoder"), **more,
            )  # fmt: skip
        pipe.to(self.device)

        def encode(texts: Sequence[str]) -> dict[str, Tokens]:
            with quiet_libraries():
                found = pipe.encode_prompt(
                    prompt=list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            states = {"clip": found[0], **({"pooled": found[2].unsqueeze(1)} if self.base.xl else {})}
            if self.base.empty_is_zeros:
                is_empty = torch.tensor([not text for text in texts], device=self.device)
                states = {name: values.masked_fill(is_empty.view(-1, 1, 1), 0) for name, values in states.items()}
            return {name: Tokens(values) for name, values in states.items()}

        tokenizers = [pipe.tokenizer, *([pipe.tokenizer_2] if self.base.xl else [])]
        window = self.shapes["clip"][0]

        def fits(text: str) -> bool:
            return all(len(tokenizer(text, verbose=False)["input_ids"]) <= window for tokenizer in tokenizers)

        return LoadedEncoder(encode, lambda text: shorten(text, fits))


@dataclass(frozen=True)
class T5TextEncoder:
    """T5 ("t5") or ByT5 ("byt5") from a folder with model and tokenizer, encoding texts as the pipeline does."""

    precision: ClassVar[torch.dtype] = torch.float16  # of the cached states
    name: str
    folder: Path
    tokens: int  # largest number of tokens per sentence
    device: torch.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {self.name: (self.tokens, self.width)}

    @property
    def width(self) -> int:
        return int(read_config(self.folder)["d_model"])

    @property
    def mark(self) -> str:
        return f"{fingerprint_of(self.folder)}-{self.tokens}"

    def load(self) -> LoadedEncoder:
        from transformers import AutoTokenizer

        # The largest models do not fit in memory in float32; half precision lacks the range that T5 needs.
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = load_model(self.folder, "transformers", "T5EncoderModel", dtype).to(self.device)
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        encoders = TextEncoders(None, None, model, tokenizer, model, tokenizer)
        read = encoders.encode_t5 if self.name == "t5" else encoders.encode_byt5

        def encode(texts: Sequence[str]) -> dict[str, Tokens]:
            return {self.name: read(texts)}

        def fits(text: str) -> bool:
            return encoders.fits(self.name, text)

        if self.name == "t5":
            return LoadedEncoder(encode, lambda text: shorten(text, fits))
        return LoadedEncoder(encode, lambda text: text if fits(text) else _quoting(text, fits))


def _quoting(text: str, fits: Callable[[str], bool]) -> str:
    """Return only the quoted text of a caption, in quotes and cut to what ByT5 takes, which reads nothing else."""
    cut = shorten(quoted(text), lambda some: fits(f'"{some}"'))
    return f'"{cut}"'


def load_vision(folder: Path, device: torch.device) -> VisionEncoder:
    """Load the vision encoder in a folder, ours or transformers', in float32; on the meta device, without weights."""
    config = read_config(folder)
    if config.get("_class_name") == "VisionEncoder":
        if device.type == "meta":
            return VisionEncoder.from_config(config)
        return load_model(folder, "imagine.networks.encoders", "VisionEncoder", torch.float32)
    if (config.get("architectures") or [""])[0] != "CLIPVisionModelWithProjection":
        raise ConfigError(
            f"{folder} holds no vision encoder that can be trained. Name the folder of a "
            "CLIPVisionModelWithProjection, such as an IP-Adapter's image_encoder, or of an encoder saved by imagine."
        )
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with quiet_libraries():
        if device.type == "meta":
            return from_transformers(CLIPVisionModelWithProjection(CLIPVisionConfig(**config)))
        return from_transformers(load_model(folder, "transformers", "CLIPVisionModelWithProjection", torch.float32))


def time_ids(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return SDXL's size conditioning (arXiv 2307.01952, section 2.2) for parts of `shape` pixels cut from pictures.

    `shape` is height and width after scaling; the part was the largest one of that shape. `frames` (B, 4) is as in
    `AnyPictures.frames`. The result (B, 6) is: height and width of the picture before scaling, the part's top and left
    after scaling, and its height and width.
    """
    width, height, left, top = frames.unbind(1)
    scale = torch.maximum(shape[0] / height, shape[1] / width)
    wanted = [torch.full_like(width, side) for side in shape]
    return torch.stack((height, width, top * scale, left * scale, *wanted), 1)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a component's config.json; ConfigError if it cannot be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no readable config.json. Save or download the model there, or name the folder that holds it "
            "(see docs/training.md)."
        ) from error
    assert isinstance(content, dict)
    return content


def variant_of(folder: Path) -> str | None:
    """Return "fp16" for a folder with weights in half precision only, otherwise None."""
    names = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def fingerprint_of(*folders: Path) -> str:
    """Return twelve hexadecimal digits that identify these components: weights, configuration and vocabulary.

    Weights are hashed at samples only. Of a config.json, the values of the network are hashed, without those about the
    saving library.
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
    """Return the values of a config.json that describe the network, as JSON."""
    network_values = {name: value for name, value in read_config(config.parent).items() if not name.startswith("_")}
    return json.dumps({**network_values, "transformers_version": None}, sort_keys=True).encode()
