"""The reference's identity brought into a candidate: what the paper calls face refinement and does not describe.

Each refiner adds noise to a picture that has already been drawn and takes it away again while looking at the
reference (SDEdit, arXiv 2108.01073), so that composition, clothes and place stay and the person comes nearer.
`strength` says how much is redrawn: too little and nothing changes, too much and the pose is lost. A build repeats it
for several rounds, each with noise of its own.

    ImagineRefiner     our pipeline with a trained identity adapter redraws the whole picture
    InpaintRefiner     the same, only the face: everything outside an ellipse round it stays as it is, bit for bit
    IPAdapterRefiner   any diffusers pipeline with an IP-Adapter (image-to-image), the whole picture or only the face

One picture at a time, so that none depends on its neighbours.
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
from imagine.errors import FaceError, PictureError, PromptError, WeightsError
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

_CACHE_SIZE = 256  # references whose faces are remembered: the drafts of one follow each other


# --- where in a picture something is redrawn --------------------------------------------------------------------------
class Region(BaseModel):
    """How much of the picture a refiner of faces redraws, in units of the face box (brow to chin, ear to ear)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    around: float = Field(default=2.4, ge=1)  # side of the square that is redrawn, by the box's longer side
    reach: float = Field(default=1.4, gt=0)  # the ellipse that is put back, by the box's sides: with forehead and jaw
    edge: float = Field(default=0.3, gt=0, le=1)  # it fades over this part of its radius


@dataclass(frozen=True)
class Patch:
    """A part of a picture that is redrawn at another size and put back."""

    whole: Image.Image
    place: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the whole
    opacity: Tensor | None  # (height, width) of the place, 0 to 1: what of the new shows; None: everything

    @property
    def part(self) -> Image.Image:
        """What lies at the place now."""
        return self.whole.crop(self.place)

    def put_back(self, drawn: Image.Image) -> Image.Image:
        """The whole with `drawn`, of any size, at the place; a pixel where nothing of it shows is as before."""
        old = np.asarray(self.part, np.float32)
        height, width = old.shape[:2]
        new = np.asarray(drawn.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), np.float32)
        shown = np.float32(1) if self.opacity is None else self.opacity.numpy()[..., None]
        mixed = np.clip(np.rint(old + shown * (new - old)), 0, 255).astype(np.uint8)
        whole = self.whole.copy()
        whole.paste(Image.fromarray(mixed), self.place[:2])
        return whole


def whole_picture(image: Image.Image) -> Patch:
    """All of a picture."""
    return Patch(image, (0, 0, *image.size), None)


def face_patch(image: Image.Image, box: FaceBox, region: Region) -> Patch:
    """The square round a face, and the ellipse in it that is put back."""
    place = square_around(box, image.size, region.around)
    return Patch(image, place, ellipse_around(box, place, region.reach, region.edge))


def drawable_size(size: tuple[int, int], usual: int, step: int) -> tuple[int, int]:
    """Width and height of the same shape that a model can draw: about usual x usual pixels, multiples of step."""
    scale = usual / (size[0] * size[1]) ** 0.5
    width, height = (max(1, round(side * scale / step)) * step for side in size)
    return width, height


# --- what all refiners do ---------------------------------------------------------------------------------------------
Cut = Callable[[Image.Image], Patch | None]  # None: there is nothing to redraw
Draw = Callable[[Draft, Patch], Image.Image | Failed]


def refined(draft: Draft, cut: Cut, draw: Draw) -> Candidate | Failed:
    """The draft's next round: what `cut` takes of its picture, redrawn by `draw` and put back."""
    try:
        patch = cut(open_photo(draft.candidate.image))
        if patch is None:
            return Failed(NO_FACE, f"No face was found in {draft.candidate.key}.")
        drawn = draw(draft, patch)
    except (FaceError, PictureError, PromptError) as error:
        return failure(error)
    if isinstance(drawn, Failed):
        return drawn
    return candidate_of(draft.spec, draft.candidate.attempt, draft.candidate.round + 1, patch.put_back(drawn))


def largest_face(finder: FaceFinder, region: Region) -> Cut:
    """Cuts the largest face out of a picture."""

    def cut(image: Image.Image) -> Patch | None:
        found = finder.find(image)
        return face_patch(image, found[0], region) if found else None

    return cut


def _noise(draft: Draft) -> torch.Generator:
    return noise_of(draft.spec.seed, draft.candidate.attempt, draft.candidate.round + 1)


# --- our own pipeline -------------------------------------------------------------------------------------------------
class ImagineRefiner:
    """Our pipeline with a trained identity adapter redraws the whole picture."""

    class Settings(ModelSettings):
        """The weights, and how much they may change."""

        model: ModelSource = Field(default="", exclude=True)  # "": the shipped weights
        # an identity adapter in place of the weights' own: a folder or a file
        adapter: ModelSource = Field(default="", exclude=True)
        strength: float = Field(default=0.5, gt=0, le=1)  # the noise level that redrawing begins at
        steps: int = Field(default=10, ge=1)
        guidance_scale: float | None = None  # None: the weights' own
        identity_guidance_scale: float | None = None
        identity_scale: float = Field(default=1.0, ge=0)
        insightface: str = Field(default="", exclude=True)  # a model pack that finds faces; "": the weights' own finder

    def __init__(self, settings: "ImagineRefiner.Settings") -> None:
        self.settings = settings
        self.pipe: Any = None
        self._personas: dict[str, Persona] = {}

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, the weights and, where it is another, the adapter."""
        model = self.settings.model or str(default_folder())
        facts = source_identity(model, self.settings.revision, self.settings.licence)
        adapter = source_identity(self.settings.adapter)["weights"] if self.settings.adapter else ""
        return identity_of(self, VERSION, **facts, adapter=adapter, finder=Path(self.settings.insightface).name)

    def load(self) -> None:
        """Load pipeline and adapter; WeightsError if there are none."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        settings = self.settings
        self.pipe = load_imagine(settings)
        if settings.adapter:
            self.pipe.load_adapter(settings.adapter)
        if self.pipe.adapter is None:
            raise WeightsError(f"{settings.model} holds no identity adapter to refine with: name one as adapter.")
        if settings.insightface:
            self.pipe.finder = InsightFaceFinder(settings.insightface)
        # Plain noise levels: what `sigmas` says is what is used, whatever schedule the weights draw from nothing with.
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        self._personas.clear()

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """Each draft's picture redrawn as the reference's person."""
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
            refine_faces=False,  # this is one already
            callback_on_step_end=keep,
        )
        image: Image.Image = out.images[0]
        return image

    def _persona(self, reference: Reference) -> Persona:
        """Whoever the reference shows, looked at once; FaceError or PictureError if it cannot be used."""
        if reference.key not in self._personas:
            if len(self._personas) >= _CACHE_SIZE:
                self._personas.pop(next(iter(self._personas)))
            self._personas[reference.key] = self.pipe.enroll(open_photo(reference.image))
        return self._personas[reference.key]


class InpaintRefiner(ImagineRefiner):
    """Our pipeline redraws the face alone.

    A square round the face is enlarged to the pipeline's own size and redrawn; what lies outside the face's ellipse is
    put back after every step as it was, with that step's noise (RePaint, arXiv 2201.09865, without its jumps), so that
    the face grows into its surroundings. Then the ellipse is laid over the picture, and nothing else of it changes.
    """

    class Settings(ImagineRefiner.Settings):
        """The weights, how much they may change, and where."""

        region: Region = Region()

    settings: "InpaintRefiner.Settings"

    def __init__(self, settings: "InpaintRefiner.Settings") -> None:
        super().__init__(settings)

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """Each draft's face redrawn as the reference's."""
        cut = largest_face(self.pipe.finder, self.settings.region)
        return [refined(draft, cut, self._draw) for draft in drafts]


def encoded(pipe: ImaginePipeline, image: Image.Image) -> Tensor:
    """A picture as normalised latents (1, channels, height, width) in float32."""
    return pipe.encode_pictures(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255)


def _step(pipe: Any) -> int:
    """Pixels that every side must be a multiple of: each resolution of the denoiser halves the latent once."""
    unet = getattr(pipe, "unet", None)
    halvings = 1 if unet is None else len(unet.config.block_out_channels) - 1
    return int(pipe.vae_scale_factor) * 2**halvings


# --- other people's ---------------------------------------------------------------------------------------------------
class IPAdapterRefiner:
    """A diffusers image-to-image pipeline with an IP-Adapter: Stable Diffusion, SDXL, and what else loads one.

    Variants that look at pictures (base, Plus, Plus-Face, Full-Face) work; those that want an ArcFace embedding
    (FaceID) do not.
    """

    class Settings(ModelSettings):
        """The pipeline, its adapter, and how much they may change."""

        adapter: ModelSource = Field(min_length=1, exclude=True)  # a folder or hub repository, such as h94/IP-Adapter
        subfolder: str = ""  # in it, such as sdxl_models
        weight_name: str = Field(min_length=1)  # in that, such as ip-adapter-plus-face_sdxl_vit-h.safetensors
        image_encoder_folder: str = "image_encoder"  # with a slash in it: from the top of the repository
        adapter_revision: str | None = Field(default=None, exclude=True)
        strength: float = Field(default=0.4, gt=0, le=1)
        steps: int = Field(default=30, ge=1)  # of which the share `strength` is made
        guidance_scale: float | None = None
        negative_prompt: str = ""
        scale: float = Field(default=0.7, ge=0)  # of the adapter
        look_at: Literal["face", "picture"] = "face"  # what of the reference it sees
        redraw: Literal["face", "picture"] = "face"  # what of the candidate it changes
        # pixels a side the pipeline draws best at; None: as its U-Net says, or 1024
        usual: int | None = Field(None, ge=8)
        insightface: str = Field(default="", exclude=True)  # a model pack that finds faces; "": the built-in finders
        region: Region = Region()
        arguments: dict[str, Any] = Field(default_factory=dict)  # further arguments of the call

    def __init__(self, settings: "IPAdapterRefiner.Settings") -> None:
        self.settings = settings
        self.pipe: Any = None
        self.finder: FaceFinder  # after loading; may be exchanged
        self._adapter_images: dict[str, Image.Image] = {}

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, and the weights of pipeline and adapter."""
        adapter = source_identity(self.settings.adapter, self.settings.adapter_revision)
        facts = model_identity(self.settings)
        return identity_of(self, VERSION, **facts, adapter=adapter, finder=Path(self.settings.insightface).name)

    def load(self) -> None:
        """Load pipeline and adapter; WeightsError if they are not there or do not go together."""
        settings = self.settings
        self.pipe = load_pipeline(_image_to_image(settings), settings)
        source = {} if settings.adapter_revision is None else {"revision": settings.adapter_revision}
        with loading(settings.adapter):
            # The fast way of loading leaves out layers that it does not expect, without a word.
            self.pipe.load_ip_adapter(
                settings.adapter, subfolder=settings.subfolder, weight_name=settings.weight_name,
                image_encoder_folder=settings.image_encoder_folder, low_cpu_mem_usage=False, **source,
            )  # fmt: skip
            self.pipe.set_ip_adapter_scale(settings.scale)
            self.pipe.to(self.pipe.device, self.pipe.dtype)
        self.finder = make_finder(settings.insightface)
        self._adapter_images.clear()

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """Each draft's face, or all of its picture, redrawn after the reference."""
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
        """What the adapter sees of the reference; FaceError if it should be a face and there is none."""
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
    """The image-to-image class for a model, by its name: AutoPipelineForImage2Image would import all of diffusers."""
    import diffusers

    source = {} if settings.revision is None else {"revision": settings.revision}
    with loading(settings.model):
        name = str(diffusers.DiffusionPipeline.load_config(settings.model, **source)["_class_name"])
    kind = getattr(diffusers, name if "Img2Img" in name else name.replace("Pipeline", "Img2ImgPipeline"), None)
    if not hasattr(kind, "load_ip_adapter"):
        raise WeightsError(f"{settings.model} is a {name}, which takes no IP-Adapter: name a Stable Diffusion or SDXL.")
    return kind
