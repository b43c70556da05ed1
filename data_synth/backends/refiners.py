"""Make candidates more similar to their references: the paper's face refinement, which it does not describe.

Each refiner adds noise to a candidate and denoises it again, conditioned on the reference (SDEdit, arXiv 2108.01073).
Composition, clothes and place are preserved, and the person becomes more similar. `strength` is the noise level at
which redrawing starts: too low a value changes nothing, too high a value loses the pose. A build can refine for several
rounds, each with different noise.

    ImagineRefiner     our pipeline with a trained identity adapter, for the whole picture
    InpaintRefiner     the same for the face only: outside an ellipse around the face, the picture is bit-identical
    IPAdapterRefiner   any diffusers image-to-image pipeline with an IP-Adapter, for the whole picture or the face only

Refiners process one picture at a time, so that a picture does not depend on others in a batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from data_synth.backends.contracts import Draft, Failed
from data_synth.backends.generators import BLOCKED, candidate_of, load_imagine, load_pipeline, noise_of
from data_synth.backends.local_models import (
    ModelSettings,
    ModelSource,
    failure,
    identity_of,
    loading,
    model_identity,
    source_identity,
)
from data_synth.backends.recognisers import make_finder
from data_synth.records import Candidate, Reference
from imagine.errors import ConfigError, FaceError, ImagineError, WeightsError
from imagine.networks.diffusion import add_noise
from imagine.networks.weights import default_folder
from imagine.people.faces import CROP_SIDE, FaceFinder, InsightFaceFinder
from imagine.people.persona import Persona
from imagine.people.photos import open_photo
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.pipeline.second_pass import covered_latents, ellipse_around, keep_outside, square_around
from imagine.records import FaceBox

NO_FACE = "no face to refine"
VERSION = 1

_CACHE_SIZE = 256  # references in the cache; few are enough, because the drafts of a reference are consecutive


# --- the redrawn part of a picture ------------------------------------------------------------------------------------
class Region(BaseModel):
    """The region of a face that is redrawn, in sides of the face box (brow to chin, ear to ear)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    around: float = Field(default=2.4, ge=1)  # side of the redrawn square, in the box's longer sides
    reach: float = Field(default=1.4, gt=0)  # ellipse to blend back, in the box's sides; 1.4 includes forehead and jaw
    edge: float = Field(default=0.3, gt=0, le=1)  # the share of its radius over which the ellipse fades


@dataclass(frozen=True)
class Patch:
    """A part of a picture that is redrawn, possibly at another size, and blended back."""

    whole: Image.Image
    place: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the whole picture
    opacity: Tensor | None  # (height, width) of the part, 0 to 1: weight of the new pixels; None: 1 everywhere

    @property
    def part(self) -> Image.Image:
        """The part of the picture before redrawing."""
        return self.whole.crop(self.place)

    def put_back(self, drawn: Image.Image) -> Image.Image:
        """Return the whole picture with `drawn`, of any size, blended in; pixels with opacity 0 do not change."""
        old = np.asarray(self.part, np.float32)
        height, width = old.shape[:2]
        new = np.asarray(drawn.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), np.float32)
        weight = np.float32(1) if self.opacity is None else self.opacity.numpy()[..., None]
        mixed = np.clip(np.rint(old + weight * (new - old)), 0, 255).astype(np.uint8)
        whole = self.whole.copy()
        whole.paste(Image.fromarray(mixed), self.place[:2])
        return whole


def whole_picture(image: Image.Image) -> Patch:
    """Return a patch that covers the whole picture."""
    return Patch(image, (0, 0, *image.size), None)


def face_patch(image: Image.Image, box: FaceBox, region: Region) -> Patch:
    """Return the patch of a face: the square around it, with the ellipse that is blended back."""
    place = square_around(box, image.size, region.around)
    return Patch(image, place, ellipse_around(box, place, region.reach, region.edge))


def drawable_size(size: tuple[int, int], usual: int, step: int) -> tuple[int, int]:
    """Return width and height with the aspect ratio of `size`, about usual x usual pixels, in multiples of `step`."""
    scale = usual / (size[0] * size[1]) ** 0.5
    width, height = (max(1, round(side * scale / step)) * step for side in size)
    return width, height


# --- shared by all refiners -------------------------------------------------------------------------------------------
Cut = Callable[[Image.Image], Patch | None]  # None: no face was found
Draw = Callable[[Draft, Patch], Image.Image | Failed]


def refined(draft: Draft, cut: Cut, draw: Draw) -> Candidate | Failed:
    """Return the draft's candidate of the next round: the patch from `cut`, redrawn by `draw` and blended back.

    Every error about the draft is its failure, so that it costs the other drafts of its batch nothing. Errors of
    settings and weights, and those that say nothing about the draft, are raised.
    """
    try:
        patch = cut(open_photo(draft.candidate.image))
        if patch is None:
            return Failed(NO_FACE, f"No face was found in the candidate {draft.candidate.key}.")
        drawn = draw(draft, patch)
    except (ConfigError, WeightsError):
        raise
    except ImagineError as error:
        return failure(error)
    if isinstance(drawn, Failed):
        return drawn
    return candidate_of(draft.spec, draft.candidate.attempt, draft.candidate.round + 1, patch.put_back(drawn))


def largest_face(finder: FaceFinder, region: Region) -> Cut:
    """Return a function that cuts the largest face out of a picture."""

    def cut(image: Image.Image) -> Patch | None:
        found = finder.find(image)
        return face_patch(image, found[0], region) if found else None

    return cut


def _noise(draft: Draft) -> torch.Generator:
    return noise_of(draft.spec.seed, draft.candidate.attempt, draft.candidate.round + 1)


# --- our own pipeline -------------------------------------------------------------------------------------------------
class ImagineRefiner:
    """A refiner that redraws the whole picture with our pipeline and a trained identity adapter."""

    class Settings(ModelSettings):
        """The weights, and how much they redraw."""

        model: ModelSource = Field(default="", exclude=True)  # "": the shipped weights
        # an identity adapter that replaces the one in the weights: a folder or a file
        adapter: ModelSource = Field(default="", exclude=True)
        strength: float = Field(default=0.5, gt=0, le=1)  # the noise level at which redrawing starts
        steps: int = Field(default=10, ge=1)
        guidance_scale: float | None = None  # None: the value of the weights
        identity_guidance_scale: float | None = None
        identity_scale: float = Field(default=1.0, ge=0)
        # a model pack that finds faces; "": the finder of the weights
        insightface: str = Field(default="", exclude=True)

    def __init__(self, settings: "ImagineRefiner.Settings") -> None:
        self.settings = settings
        self.pipe: Any = None
        self._personas: dict[str, Persona] = {}

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, the weights, the finder and, if the settings name one, the adapter."""
        model = self.settings.model or str(default_folder())
        facts = source_identity(model, self.settings.revision, self.settings.licence)
        adapter = source_identity(self.settings.adapter)["weights"] if self.settings.adapter else ""
        return identity_of(self, VERSION, **facts, adapter=adapter, finder=Path(self.settings.insightface).name)

    def load(self) -> None:
        """Load pipeline and adapter. Raises WeightsError if one cannot be loaded."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        settings = self.settings
        self.pipe = load_imagine(settings)
        if settings.adapter:
            self.pipe.load_adapter(settings.adapter)
        if self.pipe.adapter is None:
            raise WeightsError(
                f"{settings.model} holds no identity adapter, which this refiner needs. Name one with `adapter`."
            )
        if settings.insightface:
            self.pipe.finder = InsightFaceFinder(settings.insightface)
        # The scheduler of the weights may shift the noise levels; this one uses `sigmas` unchanged.
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        self._personas.clear()

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """Return each draft's picture, redrawn with the reference's identity."""
        return [refined(draft, whole_picture, self._draw) for draft in drafts]

    @torch.no_grad()
    def _draw(self, draft: Draft, patch: Patch) -> Image.Image:
        settings, pipe = self.settings, self.pipe
        persona = self._persona(draft.reference)
        size = drawable_size(patch.part.size, int(pipe.unet.config.sample_size) * pipe.vae_scale_factor, _step(pipe))
        clean = encoded(pipe, patch.part.resize(size, Image.Resampling.LANCZOS))
        noise = torch.randn(clean.shape, generator=_noise(draft)).to(clean.device)
        levels = [settings.strength * (settings.steps - number) / settings.steps for number in range(settings.steps)]
        keep = None
        if patch.opacity is not None:
            keep = keep_outside(clean, noise, levels, covered_latents(patch.opacity, clean))
        out = pipe(
            draft.spec.prompt,
            persona,
            width=size[0],
            height=size[1],
            sigmas=levels,
            latents=add_noise(clean, noise, torch.tensor([levels[0]], device=clean.device)),
            guidance_scale=settings.guidance_scale,
            identity_guidance_scale=settings.identity_guidance_scale,
            identity_scale=settings.identity_scale,
            refine_faces=False,  # this call is itself a refinement
            callback_on_step_end=keep,
        )
        image: Image.Image = out.images[0]
        return image

    def _persona(self, reference: Reference) -> Persona:
        """Return the reference's persona, from the cache if possible.

        Raises FaceError or PictureError if the reference cannot be used.
        """
        if reference.key not in self._personas:
            if len(self._personas) >= _CACHE_SIZE:
                self._personas.pop(next(iter(self._personas)))
            self._personas[reference.key] = self.pipe.enroll(open_photo(reference.image))
        return self._personas[reference.key]


class InpaintRefiner(ImagineRefiner):
    """A refiner that redraws only the face with our pipeline.

    A square around the face is scaled to the pipeline's size and redrawn. After every step, the latents outside the
    face's ellipse are replaced by the original ones with that step's noise (RePaint, arXiv 2201.09865, without its
    resampling), so that the face matches its surroundings. Then the ellipse is blended into the picture; the rest of
    the picture does not change.
    """

    class Settings(ImagineRefiner.Settings):
        """The weights, and how much and which region they redraw."""

        region: Region = Region()

    settings: "InpaintRefiner.Settings"

    def __init__(self, settings: "InpaintRefiner.Settings") -> None:
        super().__init__(settings)

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """Return each draft's picture, with its face redrawn with the reference's identity."""
        cut = largest_face(self.pipe.finder, self.settings.region)
        return [refined(draft, cut, self._draw) for draft in drafts]


def encoded(pipe: ImaginePipeline, image: Image.Image) -> Tensor:
    """Return a picture as normalised latents (1, channels, height, width) in float32."""
    return pipe.encode_pictures(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255)


def _step(pipe: Any) -> int:
    """Return the number of pixels that every side must be a multiple of.

    Each resolution of the denoiser after the first halves the latent once.
    """
    unet = getattr(pipe, "unet", None)
    halvings = 1 if unet is None else len(unet.config.block_out_channels) - 1
    return int(pipe.vae_scale_factor) * 2**halvings


# --- diffusers pipelines ----------------------------------------------------------------------------------------------
class IPAdapterRefiner:
    """A refiner with a diffusers image-to-image pipeline that loads IP-Adapters: Stable Diffusion, SDXL and others.

    Variants with an image encoder work (base, Plus, Plus-Face, Full-Face). FaceID variants do not, because they need an
    ArcFace embedding.
    """

    class Settings(ModelSettings):
        """The pipeline, its adapter, and how much and which region they redraw."""

        adapter: ModelSource = Field(min_length=1, exclude=True)  # a folder or hub repository, such as h94/IP-Adapter
        subfolder: str = ""  # in `adapter`, such as sdxl_models
        weight_name: str = Field(min_length=1)  # in the subfolder, such as ip-adapter-plus-face_sdxl_vit-h.safetensors
        image_encoder_folder: str = "image_encoder"  # in `subfolder`; a value with a slash is in `adapter`
        adapter_revision: str | None = Field(default=None, exclude=True)
        strength: float = Field(default=0.4, gt=0, le=1)
        steps: int = Field(default=30, ge=1)  # of which the share `strength` runs
        guidance_scale: float | None = None
        negative_prompt: str = ""
        scale: float = Field(default=0.7, ge=0)  # strength of the adapter
        look_at: Literal["face", "picture"] = "face"  # the part of the reference that the adapter reads
        redraw: Literal["face", "picture"] = "face"  # the part of the candidate that is redrawn
        # the side in pixels at which the pipeline draws best; None: from its U-Net's config, or 1024
        usual: int | None = Field(None, ge=8)
        insightface: str = Field(default="", exclude=True)  # a model pack that finds faces; "": the built-in finders
        region: Region = Region()
        arguments: dict[str, Any] = Field(default_factory=dict)  # further arguments of the call

    def __init__(self, settings: "IPAdapterRefiner.Settings") -> None:
        self.settings = settings
        self.pipe: Any = None
        self.finder: FaceFinder  # set by load(); may be replaced
        self._adapter_images: dict[str, Image.Image] = {}

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, the weights of pipeline and adapter, and the finder."""
        adapter = source_identity(self.settings.adapter, self.settings.adapter_revision)
        facts = model_identity(self.settings)
        return identity_of(self, VERSION, **facts, adapter=adapter, finder=Path(self.settings.insightface).name)

    def load(self) -> None:
        """Load pipeline and adapter. Raises WeightsError if one cannot be loaded or they do not fit each other."""
        settings = self.settings
        self.pipe = load_pipeline(_image_to_image(settings), settings)
        source = {} if settings.adapter_revision is None else {"revision": settings.adapter_revision}
        with loading(settings.adapter):
            # With low_cpu_mem_usage, diffusers skips unexpected layers without an error.
            self.pipe.load_ip_adapter(
                settings.adapter, subfolder=settings.subfolder, weight_name=settings.weight_name,
                image_encoder_folder=settings.image_encoder_folder, low_cpu_mem_usage=False, **source,
            )  # fmt: skip
            self.pipe.set_ip_adapter_scale(settings.scale)
            self.pipe.to(self.pipe.device, self.pipe.dtype)
        self.finder = make_finder(settings.insightface)
        self._adapter_images.clear()

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """Return each draft's picture, with its face or all of it redrawn with the reference's identity."""
        face = self.settings.redraw == "face"
        cut = largest_face(self.finder, self.settings.region) if face else whole_picture
        return [refined(draft, cut, self._draw) for draft in drafts]

    def _draw(self, draft: Draft, patch: Patch) -> Image.Image | Failed:
        settings, pipe = self.settings, self.pipe
        adapter_image = self._adapter_image(draft.reference)
        unet = getattr(pipe, "unet", None)
        usual = settings.usual or (1024 if unet is None else int(unet.config.sample_size) * pipe.vae_scale_factor)
        size = drawable_size(patch.part.size, usual, _step(pipe))
        call_options = {"guidance_scale": settings.guidance_scale, "negative_prompt": settings.negative_prompt or None}
        out = pipe(
            prompt=draft.spec.prompt,
            image=patch.part.resize(size, Image.Resampling.LANCZOS),
            ip_adapter_image=adapter_image,
            strength=settings.strength,
            num_inference_steps=settings.steps,
            generator=_noise(draft),
            **{name: value for name, value in call_options.items() if value is not None},
            **settings.arguments,
        )
        if (getattr(out, "nsfw_content_detected", None) or [False])[0]:
            return Failed(BLOCKED)
        image: Image.Image = out.images[0]
        return image

    def _adapter_image(self, reference: Reference) -> Image.Image:
        """Return the adapter's input from the reference: the square around the face, or the whole picture.

        Raises FaceError if the settings need a face and none is found.
        """
        if reference.key not in self._adapter_images:
            image = open_photo(reference.image)
            if self.settings.look_at == "face":
                found = self.finder.find(image)
                if not found:
                    raise FaceError(f"No face was found in the reference {reference.key}.")
                image = image.crop(square_around(found[0], image.size, CROP_SIDE))
            if len(self._adapter_images) >= _CACHE_SIZE:
                self._adapter_images.pop(next(iter(self._adapter_images)))
            self._adapter_images[reference.key] = image
        return self._adapter_images[reference.key]


def _image_to_image(settings: ModelSettings) -> Any:
    """Return the image-to-image class for a model, found by the name of its pipeline.

    AutoPipelineForImage2Image would import all of diffusers. Raises WeightsError if the class takes no IP-Adapter.
    """
    import diffusers

    source = {} if settings.revision is None else {"revision": settings.revision}
    with loading(settings.model):
        name = str(diffusers.DiffusionPipeline.load_config(settings.model, **source)["_class_name"])
    kind = getattr(diffusers, name if "Img2Img" in name else name.replace("Pipeline", "Img2ImgPipeline"), None)
    if not hasattr(kind, "load_ip_adapter"):
        raise WeightsError(
            f"{settings.model} is a {name}, which takes no IP-Adapter. Name a Stable Diffusion or SDXL model."
        )
    return kind
