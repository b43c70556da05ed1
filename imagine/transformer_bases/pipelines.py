"""Add personalisation to diffusers' pipelines with a diffusion transformer.

    from imagine import ImaginePipeline
    pipe = ImaginePipeline.from_pipe(stock_pipe, vision_encoder=encoder)
    pipe.load_adapter("path/to/adapter")
    pipe("smiling, on a beach", reference="photo.jpg")

A stock class gains the base class `TransformerPersonalisationMixin`. Its `__call__` takes a reference in addition to
all stock arguments, among them `image=`, the native reference images of FLUX.2 and Qwen-Image-Edit. It adds the
conditioning to the attention arguments of the call, and calls the stock `__call__` to draw.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError, WeightsError
from imagine.ip_adapter.loading import IPAdapterLoaderMixin
from imagine.networks.device import device_found_once, execution_device
from imagine.networks.weights import adapter_path, quiet_libraries
from imagine.people.faces import FaceChoice
from imagine.people.persona import Persona
from imagine.people.readings import Reader
from imagine.people.reference_encoder import OnNoFace, check_encoder, identity_spec
from imagine.pipeline.call import checked_attempts
from imagine.pipeline.controls import ALL, Blocks, Factors, Window
from imagine.pipeline.layout import LEFT_TO_RIGHT, Layout, call_regions
from imagine.pipeline.picture_check import naming_the_part
from imagine.pipeline.second_pass import RefineFaces
from imagine.pipeline.stock_recording import StockRecord
from imagine.records import VISION, Tokens
from imagine.request import Request, word_notes
from imagine.stock.call import Batch, bind_arguments, read_prompts
from imagine.stock.files import load_parts
from imagine.stock.people import PER_PROMPT_PICTURES, PLACED_NOTE, StockAttempts
from imagine.stock.pipelines import PersonalisationMixin, class_with
from imagine.transformer_bases import TRANSFORMER_PIPELINES
from imagine.transformer_bases.adapter import TransformerAdapter
from imagine.transformer_bases.blocks import block_factors
from imagine.transformer_bases.families import family_of
from imagine.transformer_bases.ip_branches import INSTANTX
from imagine.transformer_bases.ip_files import read_ip_adapter
from imagine.transformer_bases.passes import CallPasses, People
from imagine.transformer_bases.passing import KEY
from imagine.transformer_bases.second_pass import (
    SEVERAL_NATIVE,
    TransformerSecondPass,
    check_can_redraw,
    redrawing_class,
    redrawing_scheduler,
)

_PROMPTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
_OURS = (
    "reference", "identity_scale", "identity_window", "identity_blocks", "refine_faces", "layout", "attempts", "face",
    "on_no_face",
)  # fmt: skip
_NOT_REDRAWN = (
    "refine_faces redraws the people of reference= only, so no face of the IP-Adapter that diffusers has loaded was "
    "redrawn: load it with this pipeline's load_ip_adapter."
)
_ATTENTION_KWARGS = ("joint_attention_kwargs", "attention_kwargs")  # a stock call has one of them


class TransformerPersonalisationMixin(PersonalisationMixin):
    """Adds an adapter on the transformer, and arguments for the people in the picture, to a stock pipeline.

    `vision_encoder` encodes references; without it, the stock pipeline's own `image_encoder` does.
    """

    transformer: Any
    denoiser_name = "transformer"
    stock_classes = TRANSFORMER_PIPELINES

    # --- adapters ---------------------------------------------------------------------------------------------------

    def load_adapter(self, source: Any, **hub: Any) -> None:
        """Attach an adapter (a TransformerAdapter, a saved folder or file, or a hub id) in place of the present one.

        `hub` holds options of a hub id's download, such as revision.

        Raises WeightsError if it was made for another family, another size or another vision encoder.
        """
        self._check_can_load()
        transformer = self._require_denoiser()
        adapter = (
            source if isinstance(source, Adapter) else TransformerAdapter.load(adapter_path(source, **hub), transformer)
        )
        if not isinstance(adapter, TransformerAdapter):
            raise WeightsError(
                f"This is an adapter for a U-Net, but this pipeline has a {type(transformer).__name__}: give a "
                "TransformerAdapter made for it."
            )
        names = {spec.name for spec in adapter.branch_specs}
        if names != {VISION}:
            raise WeightsError(
                f"The adapter has the branches {', '.join(sorted(names))}, but this pipeline feeds only {VISION}: give "
                "an adapter with this one branch."
            )
        if self.reference_encoder is not None:
            check_encoder(adapter, self.encoder_fingerprint)
        self._replace_adapter("adapter", adapter.to(self._adapter_dtype).eval())

    def load_ip_adapter(  # type: ignore[override]
        self,
        source: Any,
        weight_name: str | None = None,
        subfolder: str | None = None,
        image_encoder_pretrained_model_name_or_path: Any = None,
        **hub: Any,
    ) -> None:
        """Load an IP-Adapter file (XLabs' for FLUX.1, InstantX's for Stable Diffusion 3.5) as the adapter.

        The people are then given by `reference=`, with `identity_scale`. The encoder is `vision_encoder` or the stock
        pipeline's own `image_encoder`: CLIP ViT-L/14, which may be named here, or SigLIP. Raises WeightsError if the
        file does not fit.
        """
        self._check_can_load()
        adapter = read_ip_adapter(source, self._require_denoiser(), subfolder or None, weight_name, **hub)
        if image_encoder_pretrained_model_name_or_path is not None:
            part = {"image_encoder": image_encoder_pretrained_model_name_or_path}
            encoder = load_parts(part, self._adapter_dtype, **hub)["image_encoder"]
            cast(Any, self).register_modules(image_encoder=encoder.to(cast(Any, self).device))
        self.load_adapter(adapter)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Set the scale of an IP-Adapter that diffusers has loaded; ours takes `identity_scale` with each call."""
        if not self._has_stock_ip_adapter:
            raise ConfigError("The strength of this adapter is an argument of each call: give identity_scale.")
        cast(Any, super(IPAdapterLoaderMixin, self)).set_ip_adapter_scale(scale)

    def unload_ip_adapter(self) -> None:
        """Remove the adapter, and an IP-Adapter that diffusers has loaded, which restores the base exactly."""
        if self._has_stock_ip_adapter:
            cast(Any, super(IPAdapterLoaderMixin, self)).unload_ip_adapter()
        self.unload_adapter()

    def _absent_tokens(self, count: int, reader: Reader | None = None) -> Tokens:
        """Return the tokens of pictures without people; those of InstantX files are zero features."""
        if isinstance(self.adapter, TransformerAdapter) and self.adapter.layout == INSTANTX:
            features = self._zero_picture_features()
            return Tokens(torch.zeros(count, *features.shape, device=execution_device(self)))
        return super()._absent_tokens(count, reader)

    @property
    def _adapter_dtype(self) -> torch.dtype:
        """The precision of the adapter: the transformer's, if it computes in the precision that it is stored in."""
        dtype = cast(torch.dtype, self.denoiser.dtype)
        return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16

    def _adapters_to_device(self) -> None:
        for adapter in self._adapters():
            adapter.to(execution_device(self), self._adapter_dtype)

    def _add_saved_adapter(self, folder: Path, variant: str | None) -> None:
        self._replace_adapter(
            "adapter", TransformerAdapter.load(folder, self.denoiser, variant=variant).to(self._adapter_dtype).eval()
        )

    @property
    def _has_stock_ip_adapter(self) -> bool:
        """Whether diffusers' own IP-Adapter is on the transformer."""
        transformer = self.denoiser
        if transformer is None:
            return False
        is_flux = getattr(transformer.config, "encoder_hid_dim_type", None) == "ip_image_proj"
        return is_flux or getattr(transformer, "image_proj", None) is not None

    def set_attention_slice(self, slice_size: Any) -> None:
        """Do nothing: transformers have no attention slicing."""

    def fuse_qkv_projections(self, *arguments: Any, **options: Any) -> None:
        """Fuse projections as in diffusers, which adapters on transformers allow."""
        self._require_denoiser().fuse_qkv_projections(*arguments, **options)

    # --- generating -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @device_found_once
    def __call__(
        self,
        *arguments: Any,
        reference: Any = None,
        identity_scale: Any = 1.0,
        identity_window: "Window | Sequence[float]" = (0.0, 1.0),
        identity_blocks: Blocks = ALL,
        refine_faces: "RefineFaces | bool | None" = None,
        layout: Layout | None = None,
        attempts: int = 1,
        face: FaceChoice = "largest",
        on_no_face: OnNoFace = "error",
        **options: Any,
    ) -> Any:
        """Generate with the stock pipeline, all of whose arguments are accepted, and show the referenced people.

        reference, face, on_no_face: as in `ImaginePipeline`: photos, Personas, lists of these, or a dict from names.
        identity_scale: strength of the identity branch, one number or one per prompt. 0 gives the stock pipeline's
            picture bit for bit, as does no reference.
        identity_window: the steps in which the reference acts, as two fractions of all steps.
        identity_blocks: the blocks in which it acts: "all", a preset such as "early", or strengths (see `blocks`).
        refine_faces: whether to redraw small faces of the reference's people enlarged; a RefineFaces gives other
            settings. Callbacks run in the first pass only.
        layout: where several people are. Without one, an adapter without a router places people from left to right.
        attempts: how often a picture is drawn at most until it shows its people, as in `ImaginePipeline`.

        Return the stock result with more attributes, as in `ImagineOutput`: `faces`, `refined`, `notes`, `records`,
        `flags`, and, if its people were checked, `people`, `people_found`, `attempts` and `seeds`. Raises ImagineError
        if our arguments or the adapter are used wrongly.
        """
        draw = naming_the_part(cast(Any, super(PersonalisationMixin, self)).__call__, self._suspects)
        given = bind_arguments(draw, arguments, options, _OURS)
        asked, output_type = dict(given), given.get("output_type") or "pil"
        notes = word_notes(*(given.get(name) for name in _PROMPTS))
        self._check_can_draw("transformer", *([] if output_type == "latent" else ["vae"]))
        refine_settings = RefineFaces.read(refine_faces, output_type, default=False)
        if refine_settings is not None:
            check_can_redraw(self)
        window = Window.read(identity_window)
        if self.adapter is None:
            self._check_no_adapter_needed(given, reference)
            return self._draw_without_adapter(draw, given, notes, redraw=refine_settings is not None)
        requests = read_prompts(given, reference)
        record = StockRecord(
            self, asked, requests, identity_scale=identity_scale, identity_window=identity_window,
            identity_blocks=identity_blocks, layout=layout, attempts=attempts,
        )  # fmt: skip
        _check_no_stock_photo(given)
        block_factors(self.denoiser, self._branched, identity_blocks)  # raises for wrong blocks
        most = checked_attempts(attempts, requests, output_type)
        self._adapters_to_device()
        try:
            personas = self._personas_for(requests, face, on_no_face, identify=most > 0)
            if not any(personas):
                return record.add_to(_with_notes(draw(**given), notes))
            check_encoder(self.adapter, self.encoder_fingerprint)  # it may have been set after the adapter
            self._check_photos(personas)
            regions, placed = self._regions(requests, layout, given)
            ours = {
                "identity_scale": identity_scale, "identity_window": window, "identity_blocks": identity_blocks,
                "regions": regions,
            }  # fmt: skip
            batch = Batch(len(requests), int(given.get("num_images_per_prompt") or 1), guided=False)
            once = functools.partial(self._draw_once, draw, refine_settings, [*notes, *placed])
            pictures = () if type(self).__name__ in SEVERAL_NATIVE else PER_PROMPT_PICTURES
            out = StockAttempts(batch, requests, given, personas, ours, most, pictures).run(self, once)
        finally:
            self._offload_adapters()
        return record.add_to(out, personas)

    def _draw_without_adapter(self, draw: Any, given: dict[str, Any], notes: Sequence[str], redraw: bool) -> Any:
        """Draw with the stock pipeline, and with diffusers' own IP-Adapter if one is loaded."""
        if redraw and self._has_stock_ip_adapter:
            notes = [*notes, _NOT_REDRAWN]
        record = StockRecord(self, given, read_prompts(given, None))
        return record.add_to(_with_notes(draw(**given), notes))

    @property
    def _branched(self) -> list[str]:
        """The sites with a branch of the adapter."""
        assert self.adapter is not None
        return list(self.adapter.layers())

    def _draw_once(
        self, draw: Any, refine_settings: RefineFaces | None, words: Sequence[str], given: dict[str, Any], batch: Batch,
        personas: Sequence[Sequence[Persona]], ours: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """Run the stock call once, and redraw the small faces of its result."""
        second_pass = TransformerSecondPass.plan(self, draw, refine_settings, batch, given, personas, ours)
        people = self._people(personas, batch.copies, ours["identity_scale"], ours["regions"])
        factors = block_factors(self.denoiser, self._branched, ours["identity_blocks"])
        out = self._draw_with(draw, dict(given), people, ours["identity_window"], factors)
        return self._add_refined_faces(out, second_pass, words)

    def _draw_with(
        self, draw: Any, given: dict[str, Any], people: People, window: Window, factors: Factors | None
    ) -> Any:
        passes = CallPasses(self.denoiser, people, family_of(self.denoiser).guidance, window, factors)
        passes.wrap_callback(given)
        name = _attention_argument(draw)
        given[name] = {**(given.get(name) or {}), KEY: passes}
        try:
            return draw(**given)
        finally:
            passes.release()  # the stock pipeline keeps the arguments until its next call

    def _redrawing_pipeline(self, ip_scales: Sequence[Any]) -> Any:
        """Return the pipeline that redraws faces, with the same components and a scheduler of its own."""
        with quiet_libraries():
            made = class_by_name(redrawing_class(type(self).__name__)).from_pipe(
                self, scheduler=redrawing_scheduler(cast(Any, self).scheduler)
            )
        made.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return made

    def _people(
        self, personas: Sequence[Sequence[Persona]], copies: int, scale: Any, regions: torch.Tensor | None
    ) -> People:
        """Return the identity branch of all pictures. regions: (prompts, people, height, width)."""
        spec = identity_spec(self.adapter)
        tokens = self._vision_tokens(personas, copies)
        assert spec is not None and tokens is not None
        strength = self._identity_strength(scale, personas, copies)
        absent = self._absent_tokens(len(strength)) if spec.absent == "zeros" else None
        device = execution_device(self)
        return People(
            tokens, strength, None if regions is None else regions.repeat_interleave(copies, 0).to(device),
            self._vision_groups(personas, copies), absent,
        )  # fmt: skip

    def _regions(
        self, requests: Sequence[Request], layout: Layout | None, given: Mapping[str, Any]
    ) -> tuple[torch.Tensor | None, list[str]]:
        """Return the regions (prompts, people, height, width) of a call's people, and a note if we chose them."""
        spec, notes = identity_spec(self.adapter), list[str]()
        assert spec is not None
        several = any(len(request.people) > 1 for request in requests)
        if layout is None and several and not spec.router and spec.people != "concatenate":
            layout, notes = LEFT_TO_RIGHT, [PLACED_NOTE]
        return call_regions(layout, requests, self._grid(given)), notes

    def _check_photos(self, personas: Sequence[Sequence[Persona]]) -> None:
        """Raise ConfigError if an adapter that resamples all features of a picture together cannot take these."""
        lengths = {sum(persona.tokens for persona in people) for people in personas if people}
        is_instantx = isinstance(self.adapter, TransformerAdapter) and self.adapter.layout == INSTANTX
        if is_instantx and (len(lengths) > 1 or any(len(people) > 1 for people in personas)):
            raise ConfigError(
                "An IP-Adapter of InstantX takes one person per picture, and as many photos for each: give the same "
                "number of photos for every prompt."
            )

    def _grid(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """Return the height and width of the drawn picture's latents, at which regions are described."""
        side = int(getattr(self, "vae_scale_factor", 0) or 8)
        height, width = given.get("height"), given.get("width")
        if height is None or width is None:
            native = int(getattr(self, "default_sample_size", 0) or 128) * side
            height, width = height or native, width or native
        return max(1, int(height) // side), max(1, int(width) // side)


def _attention_argument(call: Any) -> str:
    parameters = inspect.signature(call).parameters
    return next(name for name in _ATTENTION_KWARGS if name in parameters)


def _check_no_stock_photo(given: dict[str, Any]) -> None:
    if given.get("ip_adapter_image") is not None or given.get("ip_adapter_image_embeds") is not None:
        raise ConfigError(
            "An adapter of imagine is loaded, which takes photos with reference=: give the photo there, or call "
            "unload_adapter() and load the IP-Adapter with diffusers."
        )


def _with_notes(out: Any, notes: Sequence[str]) -> Any:
    """Set the notes of a result without people, and return it."""
    if hasattr(out, "images"):
        out.refined, out.notes = 0, list(notes)
    return out


# --- the classes ------------------------------------------------------------------------------------------------------


def personalised_class(stock: type) -> Any:
    """Return the subclass with `reference=` of a stock pipeline class. Raises ConfigError for an unsupported class."""
    if issubclass(stock, TransformerPersonalisationMixin):
        return stock
    if not any(base.__name__ in TRANSFORMER_PIPELINES for base in stock.__mro__):
        raise ConfigError(
            f"A {stock.__name__} cannot take references; use a pipeline such as {', '.join(TRANSFORMER_PIPELINES[:2])}."
        )
    return class_with(TransformerPersonalisationMixin, cast(Any, stock))


def class_by_name(name: str) -> Any:
    """Return the class with `reference=` for the diffusers pipeline class called `name`."""
    return personalised_class(getattr(importlib.import_module("diffusers"), name))


def __getattr__(name: str) -> Any:
    """Return a class by name, created on first access, because importing all of diffusers' pipelines takes seconds."""
    if name not in TRANSFORMER_PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return class_by_name(name)
