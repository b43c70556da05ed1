"""The diffusers pipeline that generates a picture from one photo and a sentence. The data pass through these modules:

    request        one request per picture, from any form of prompt and reference
    photos, faces  opening each photo, finding and cropping its face
    encoders       vision features of the face crop, and three sequences of text tokens
    drawing        the passes of the call, whose steps `stepping` takes with the predictions of `sampling`

A call's state belongs to the call: the conditioning is an argument, the scheduler a copy, the guidance a context
variable. Several threads may therefore share one pipeline, a batch may contain different people, and every picture
equals the one generated alone. Noise is drawn per picture on the generator's device, so that a seed gives the same
noise in any batch and on any accelerator.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, check_attached, is_attached
from imagine.adapter.holder import AdapterHolderMixin
from imagine.errors import ConfigError, PromptError, WeightsError
from imagine.networks import weights
from imagine.networks.diffusion import denormalise_latents, normalise_latents, pack_latents, unpack_latents
from imagine.networks.encoders import TextEncoders
from imagine.networks.saving import PUSH_OPTIONS, check_save_options, write_whole
from imagine.people.faces import FaceChoice, FaceFinder
from imagine.people.persona import Persona
from imagine.people.reference_encoder import FINDER, ReferenceEncoderMixin, check_encoder, saved_metadata
from imagine.people.strangers import FaceRecogniser
from imagine.pipeline import families
from imagine.pipeline.call import (
    Callback,
    CallSettings,
    StepCallback,
    call_requests,
    checked_attempts,
    count_prompts,
    start_latents,
    timestep_shift,
)
from imagine.pipeline.controls import ALL, Blocks, Window, block_factors
from imagine.pipeline.drawing import Drawing
from imagine.pipeline.files import ADAPTERS, ENCODERS, MODELS, load_adapters, load_models
from imagine.pipeline.layout import Layout, call_regions, canvas_shape, trained_people
from imagine.pipeline.output import ImagineOutput
from imagine.pipeline.picture_check import check_picture
from imagine.pipeline.recording import CallRecord, picture_seeds
from imagine.pipeline.sampling import Guidance, Inputs, TextTokens, text_rows
from imagine.pipeline.second_pass import RefineFaces
from imagine.pipeline.stepping import CallState, Stepper, current_call
from imagine.records import Progress, no_progress, repeat
from imagine.request import (
    Request,
    check_choice,
    finite,
    negative_sentences,
    numbers,
    sentences,
    whole,
)  # fmt: skip

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class ImaginePipeline(AdapterHolderMixin, ReferenceEncoderMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Generates pictures of a person from one photo and a sentence.

    `latents_mean` and `latents_std` (one number per channel of the denoiser) normalise the latents, and `latents_patch`
    joins that many positions in each direction into one (`imagine.networks.diffusion.pack_latents`). The `default_*`
    values, measured for these weights, apply where a call gives none. An identity guidance scale of None equals the
    guidance scale.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->unet->vae"
    # Sequential offload moves a module when its `forward` runs. Adapters run inside the denoiser's attention, and parts
    # of the vision encoder run outside `forward`, so both would be moved too late; both are small beside the denoiser.
    _exclude_from_cpu_offload = [*ADAPTERS, "image_encoder"]  # noqa: RUF012  (diffusers' convention)
    _optional_components = list(ADAPTERS)  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "identity_scale"]  # noqa: RUF012

    def __init__(
        self,
        unet: nn.Module | None,
        vae: nn.Module | None,
        text_encoder: nn.Module,
        tokenizer: object,
        text_encoder_2: nn.Module,
        tokenizer_2: object,
        text_encoder_3: nn.Module,
        tokenizer_3: object,
        image_encoder: nn.Module,
        scheduler: object,
        text_adapter: Adapter | None = None,
        adapter: Adapter | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        latents_patch: int = 1,
        default_steps: int = 20,
        default_guidance_scale: float = 2.0,
        default_identity_guidance_scale: float | None = None,
        default_refine_faces: bool = False,
        format_version: str = weights.FORMAT_VERSION,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            scheduler=scheduler,
            text_adapter=text_adapter,
            adapter=adapter,
        )
        # Adapters are registered as absent components because diffusers can neither save nor load their class.
        self.register_to_config(**{name: (None, None) for name in ADAPTERS})
        self.register_to_config(
            latents_mean=latents_mean,
            latents_std=latents_std,
            latents_patch=latents_patch,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            default_identity_guidance_scale=default_identity_guidance_scale,
            default_refine_faces=default_refine_faces,
            format_version=format_version,
        )
        if unet is not None:
            channels = int(self.unet.config.in_channels)
            weights.check_statistics(channels, latents_mean=latents_mean, latents_std=latents_std)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        for part in self._adapters() if unet is not None else ():
            if not is_attached(self.denoiser, part):
                part.attach(self.denoiser)

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        finder: FaceFinder | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "ImaginePipeline":
        """Load the shipped weights (no argument), a folder, or a hub repository owner/name.

        Only a hub repository is downloaded.
        A folder or repository of Stable Diffusion 1.5 or XL returns the pipeline of `imagine.stock` with the same class
        name, and takes the arguments of its `from_pretrained`.

        Weights are converted to `dtype` (default float32; torch_dtype is the older name). Components given by keyword
        replace those in the folder. Loading is strict: raises WeightsError if a tensor is missing, unexpected or has
        the wrong shape.
        """
        hub = {name: kwargs.pop(name) for name in weights.HUB_OPTIONS if name in kwargs}
        folder = weights.resolve_folder(source, families.class_names(), kwargs.get("variant"), **hub)
        index = weights.read_index(folder, families.class_names())
        if index["_class_name"] in families.class_names():
            precision = dtype or torch_dtype
            more = {} if precision is None else {"dtype": precision}
            stock = families.class_by_name(index["_class_name"])
            return stock.from_pretrained(folder, finder=finder, **more, **hub, **kwargs)
        chosen = dtype or torch_dtype or torch.float32
        weights.check_components(folder, index, kwargs)
        for name in TOKENIZERS:
            if name not in kwargs:
                weights.check_tokenizer(folder / name, index[name][1])
        given = {name: kwargs.pop(name) for name in (*MODELS, *ADAPTERS) if name in kwargs}
        parts = {**load_models(folder, index, given, chosen, kwargs.get("variant")), **given}
        adapters = load_adapters(folder, parts, chosen, kwargs.get("variant"))
        parts |= {name: part for name, part in adapters.items() if name not in given}
        try:
            with weights.quiet_libraries():
                pipe = cast(ImaginePipeline, super().from_pretrained(os.fspath(folder), **parts, **kwargs))
        except (OSError, ValueError, KeyError) as error:  # missing or truncated files of a tokenizer or the scheduler
            reason = str(error).strip().split("\n")[0][:200].rstrip(".")
            raise WeightsError(f"{folder} cannot be loaded ({reason}); copy or download the weights again.") from error
        pipe._finder = finder
        pipe._finder_folder = folder / FINDER
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Return a pipeline with `reference=` that shares the components of another pipeline without copying them.

        diffusers' Stable Diffusion 1.5 and XL pipelines become those of `imagine.stock`. Components given by keyword
        are added, or replace the pipeline's own. Raises ConfigError for any other kind of pipeline.
        """
        if isinstance(pipeline, ImaginePipeline):
            return cls._sharing(pipeline, **kwargs)
        return families.class_for(type(pipeline)).from_pipe(pipeline, **kwargs)

    @classmethod
    def _sharing(cls, pipeline: "ImaginePipeline", **kwargs: Any) -> "ImaginePipeline":
        """Return an ImaginePipeline with another one's components and settings; `kwargs` replace some of them."""
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", dtype)
        modules, options = cls._get_signature_keys(cls)
        given = {name: getattr(pipeline, name) for name in modules}
        given |= {name: pipeline.config[name] for name in options}
        made = cls(**{**given, **kwargs})
        made._finder, made._finder_folder = pipeline._finder, pipeline._finder_folder
        return made if dtype is None else made.to(dtype=dtype)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save every component in its current precision, including our adapters and the face finder's files.

        The folder is written whole or not at all. Raises WeightsError if a component is missing, or for options whose
        files could not be loaded again. A `variant` is part of the names of the weights' files, adapters included.
        """
        check_save_options({"safe_serialization": safe_serialization, **kwargs})
        if lacking := [name for name in (*MODELS, *TOKENIZERS, "scheduler") if getattr(self, name, None) is None]:
            raise WeightsError(
                f"The pipeline has no {lacking[0]}, so what is saved could not be loaded: load the pipeline again, or "
                "save it before free_encoders."
            )
        described = {name: part for name in ADAPTERS if (part := getattr(self, name)) is not None}
        metadata = {
            name: {**saved_metadata(part), "encoder_fingerprint": self.encoder_fingerprint}
            for name, part in described.items()
        }
        push = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        with write_whole(Path(save_directory), ADAPTERS) as folder:
            with weights.quiet_libraries():
                super().save_pretrained(os.fspath(folder), safe_serialization, variant, **kwargs)
            for name, part in described.items():
                part.save(folder / name, metadata[name], variant)
            weights.remove_local_paths(folder)  # local paths are private and useless to the next user
            self._save_small_networks(folder)
        if push:  # not by diffusers' save, which would upload before the adapters are there
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).absolute().name), variant=variant, **hub)

    # --- the adapter and the finder ---------------------------------------------------------------------------------

    def _adapters(self) -> list[Adapter]:
        return [part for part in (self.text_adapter, self.adapter) if part is not None]

    def load_adapter(self, source: "Adapter | str | os.PathLike[str]", **hub: Any) -> None:
        """Replace the identity adapter with this one: an Adapter, a saved folder or file, or a hub id.

        `hub` holds options of a hub id's download, such as revision.
        """
        denoiser = self._require_denoiser()
        adapter = source if isinstance(source, Adapter) else Adapter.load(weights.adapter_path(source, **hub), denoiser)
        check_encoder(adapter, self.encoder_fingerprint)
        self._replace_adapter("adapter", adapter.to(denoiser.device, denoiser.dtype).eval())

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per position of the denoiser; 1 without an autoencoder, as in a pipeline that only encodes prompts."""
        return 1 if self.vae is None else int(self.vae.spatial_compression_ratio) * int(self.config.latents_patch)

    @property
    def reference_encoder(self) -> nn.Module:
        """The encoder of references."""
        return cast(nn.Module, self.image_encoder)

    # --- attributes that diffusers' callbacks and tools expect ------------------------------------------------------

    @property
    def guidance_scale(self) -> float | None:
        """The running call's guidance scale; None outside a call."""
        call = current_call.get()
        return None if call is None else call.guidance.text

    @property
    def _guidance_scale(self) -> float | None:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        call = self._current_call()
        call.guidance = replace(call.guidance, text=float(value))

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call uses classifier-free guidance, which needs a scale above 1."""
        return (self.guidance_scale or 0.0) > 1

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the running call; 0 outside a call."""
        call = current_call.get()
        return 0 if call is None else call.timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has requested the running call to stop."""
        call = current_call.get()
        return call is not None and call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._current_call().interrupt = bool(value)

    @staticmethod
    def _current_call() -> CallState:
        call = current_call.get()
        if call is None:
            raise RuntimeError("No call is running; set this attribute from callback_on_step_end.")
        return call

    # --- encoding ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompts: "str | Sequence[str]") -> TextTokens:
        """Encode prompts with the text encoders, for `prompt_embeds` and `negative_prompt_embeds`.

        Return CLIP's tokens and a dict of the other encoders' tokens that an attached adapter reads, one batch item per
        prompt. An empty prompt means no sentence. Raises PromptError if a prompt is too long, or after `free_encoders`.
        """
        if None in (self.text_encoder, self.text_encoder_2, self.text_encoder_3):
            raise PromptError(
                "The text encoders were freed or left out: give prompt_embeds and negative_prompt_embeds instead."
            )
        encoders = TextEncoders(
            self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2,
            self.text_encoder_3, self.tokenizer_3, self._execution_device,
        )  # fmt: skip
        given = sentences(prompts)
        each = list(dict.fromkeys(given))  # the prompts of a batch often share one negative prompt
        clip, others = encoders.encode(each)
        read = {spec.name for part in self._adapters() for spec in part.branch_specs}
        text = clip, {name: tokens for name, tokens in others.items() if name in read}
        return text if len(each) == len(given) else text_rows(text, [each.index(one) for one in given])

    def free_encoders(self) -> None:
        """Delete all encoders to free memory. Later calls need personas, prompt_embeds and negative_prompt_embeds."""
        if self.image_encoder is not None:
            self._keep_encoder_info()
        for name in ENCODERS:
            setattr(self, name, None)
        self.maybe_free_model_hooks()  # the hooks still reference the encoders

    # --- generating -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: "str | Sequence[str] | None" = None,
        reference: Any = None,
        *,
        height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None, identity_guidance_scale: float | None = None,
        guidance_rescale: float = 0.0, guidance_balance: bool = False,
        identity_scale: "float | Sequence[float] | Tensor" = 1.0,
        identity_window: "Window | Sequence[float]" = (0.0, 1.0), identity_blocks: Blocks = ALL,
        refine_faces: "RefineFaces | bool | None" = None, layout: Layout | None = None, attempts: int = 1,
        negative_prompt: "str | Sequence[str] | None" = None, num_images_per_prompt: int = 1,
        generator: "torch.Generator | Sequence[torch.Generator] | None" = None, latents: Tensor | None = None,
        prompt_embeds: TextTokens | None = None, negative_prompt_embeds: TextTokens | None = None,
        face: FaceChoice = "largest", on_no_face: Literal["error", "whole"] = "error",
        output_type: Literal["pil", "np", "pt", "latent"] = "pil", return_dict: bool = True, stepwise: bool = False,
        cross_attention_kwargs: Mapping[str, Any] | None = None, progress: Progress = no_progress,
        callback_on_step_end: Callback | None = None, callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagineOutput:  # fmt: skip
        """Generate one picture, or `num_images_per_prompt` pictures, for each prompt.

        reference: the people in the picture: a photo (path, bytes, PIL, array), a Persona or its file, a list of these
            for one person, or a dict from names to these for a prompt such as "{a} hugs {b}" or "the man hugs the
            woman" (see `request`). With a list of prompts, a list with one reference per prompt.
        guidance_scale: how strictly the prompt is followed; 1 is off. identity_guidance_scale is the same for the
            identity. By default both are equal, and a step takes two denoiser passes; otherwise it takes three.
        guidance_balance: bring both guidance directions to the same norm before their scales apply
            (`imagine.networks.diffusion.balance`); a step then takes three passes.
        identity_scale: strength of the identity, one number or one per prompt; 0 gives exactly the base's own picture.
        identity_window: the steps in which the identity acts, as fractions of all: (0, 0.8) leaves out the last fifth.
        identity_blocks: the denoiser's blocks in which the identity acts: "all", a preset such as "coarse", or
            strengths in diffusers' form, {"down": {"block_2": [0.0, 1.0]}}, where a block that is not named gets 0 (see
            `controls.presets`).
        refine_faces: whether to redraw small faces, enlarged; a RefineFaces gives other settings (see `second_pass`).
        layout: where the people are: "left to right", or a box or mask for each name (see `layout.layout_regions`).
        attempts: how often a picture is drawn at most until it shows its people (see `attempts.draw_until_matched`).
        negative_prompt: what to avoid. generator: one, from which the pictures draw in turn, or one per picture.
        face, on_no_face: which face of a photo to use, and what to do if there is none (see `faces.crop_face`).
        callback_on_step_end: called as (pipe, step, timestep, tensors). It may return changed "latents" or
            "identity_scale" (one per picture), and may set pipe._interrupt or pipe._guidance_scale.
        progress: called as (stage, steps done, steps in all) while the call denoises, decodes and redraws small faces.
        return_dict: False for the tuple (images, faces). stepwise: return the `drawing`. Raises ImagineError.
        """
        self._check_can_draw("unet", "vae")
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        copies = whole("num_images_per_prompt", num_images_per_prompt)
        requests = call_requests(prompt, reference, prompt_embeds, self.safety)
        size = self._latent_size(height, width, requests)
        regions = call_regions(layout, requests, size, copies)
        plan = CallSettings(
            self._guidance(guidance_scale, identity_guidance_scale, guidance_rescale, guidance_balance),
            self._scheduler(num_inference_steps, sigmas, size), Window.read(identity_window), output_type,
            block_factors(self.unet, identity_blocks), self._refining(refine_faces, output_type),
            StepCallback.make(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs),
            checked_attempts(attempts, requests, output_type),
        )  # fmt: skip
        check_attached(self.unet, self._adapters())
        text, negative = self._encode_requests(requests, prompt_embeds, negative_prompt, negative_prompt_embeds, copies)
        personas = self._personas_for(requests, face, on_no_face, identify=plan.attempts > 0)
        strength = self._identity_strength(identity_scale, personas, copies)
        given = {"identity_scale": identity_scale, "identity_blocks": identity_blocks, "layout": layout}
        seeds = picture_seeds(generator if latents is None else None, len(strength))
        record = CallRecord(requests, personas, prompt, negative_prompt, seeds, given)
        drawing = Drawing(
            self, plan, self._inputs(text, negative, personas, copies, plan, regions), cross_attention_kwargs or {},
            start_latents(self, len(strength), size, generator, latents), strength, record, progress,
        )  # fmt: skip
        out: Any = drawing if stepwise else self._denoise(drawing)
        return out if stepwise or return_dict else out.to_tuple()

    def drawing(self, *arguments: Any, **settings: Any) -> Drawing:
        """Prepare a call with these arguments, whose steps a `Stepper` takes, alone or with those of other calls."""
        return cast(Drawing, self(*arguments, stepwise=True, **settings))

    def _denoise(self, drawing: Drawing) -> ImagineOutput:
        """Take all steps of a call, alone."""
        stepper = Stepper(self)
        for run in drawing:
            with self.progress_bar(total=run.steps) as bar:
                while not run.done:
                    stepper.step([run])
                    bar.update()
        return drawing.result()

    def _inputs(
        self, text: TextTokens, negative: TextTokens, people: list[list[Persona]], copies: int, plan: CallSettings,
        regions: Tensor | None,
    ) -> Inputs:  # fmt: skip
        """Return the conditioning of all pictures of a call."""
        vision, groups = self._vision_tokens(people, copies), self._vision_groups(people, copies)
        return Inputs(text, negative, vision, plan.factors, groups, regions)

    def _picture_recogniser(self) -> FaceRecogniser | None:
        return self._drawing_recogniser()

    def _encode_requests(
        self, requests: Sequence[Request], embeds: TextTokens | None,
        negative_prompt: "str | Sequence[str] | None", negative_embeds: TextTokens | None, copies: int,
    ) -> tuple[TextTokens, TextTokens]:  # fmt: skip
        """Return the encoded prompts and negative prompts, one batch item per picture."""
        if embeds is None:
            embeds = self.encode_prompt([request.sentence for request in requests])
        if negative_embeds is None:
            negative_embeds = self.encode_prompt(negative_sentences(negative_prompt, len(requests)))
        elif count_prompts("negative_prompt_embeds", negative_embeds) != len(requests):
            raise PromptError(f"negative_prompt_embeds must have one row for each of the {len(requests)} prompts.")
        return _copies(embeds, copies), _copies(negative_embeds, copies)

    def _latent_size(self, height: int | None, width: int | None, requests: Sequence[Request]) -> tuple[int, int]:
        """Return the latent height and width for a height and width in pixels.

        None means the model's own size; if both are None and the adapter was trained with several people, the canvas
        for the largest number of people in a picture.
        """
        usual = int(self.unet.config.sample_size)
        # Every resolution of the denoiser after the first halves the latents.
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        step = self.vae_scale_factor * multiple
        for side in (height, width):
            if side is not None and (not isinstance(side, int) or side < step or side % step):
                raise ConfigError(f"height and width must be multiples of {step} pixels, not {side}.")
        most = max(len(request.people) for request in requests)
        if height is None and width is None and self.adapter is not None and most > 1:
            most = min(most, trained_people(self.adapter.metadata))
            if most > 1:
                return canvas_shape(most, usual, multiple)
        sides = [usual if side is None else side // self.vae_scale_factor for side in (height, width)]
        return sides[0], sides[1]

    def _guidance(self, text: float | None, identity: float | None, rescale: float, balanced: bool) -> Guidance:
        """Return the call's guidance. The weights' defaults apply if it gives neither scale."""
        if text is None and identity is None:
            identity = self.config.default_identity_guidance_scale
        text = finite("guidance_scale", self.config.default_guidance_scale if text is None else text)
        identity = None if identity is None else finite("identity_guidance_scale", identity)
        return Guidance(text, identity, finite("guidance_rescale", rescale), bool(balanced))

    def _refining(self, given: "RefineFaces | bool | None", output_type: str) -> RefineFaces | None:
        """Return the settings of the second pass from the call or, if it gives none, from the weights' default."""
        return RefineFaces.read(given, output_type, bool(self.config.default_refine_faces))

    def _scheduler(self, steps: int | None, sigmas: Sequence[float] | None, size: tuple[int, int]) -> Any:
        """Return a copy of the scheduler for this call, with its timesteps set."""
        scheduler = copy.deepcopy(cast(Any, self.scheduler))
        kind = scheduler.config.get("prediction_type", "flow_prediction")
        if kind != "flow_prediction":
            raise ConfigError(
                f"{type(scheduler).__name__} predicts {kind}, but the denoiser predicts flow: use a flow-match "
                "scheduler, or set use_flow_sigmas and prediction_type='flow_prediction'."
            )
        options: dict[str, Any] = {} if sigmas is None else {"sigmas": numbers("sigmas", sigmas)}
        if scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = timestep_shift(scheduler.config, size[0] * size[1])
        count = whole("num_inference_steps", self.config.default_steps if steps is None else steps)
        if sigmas is None:
            options["num_inference_steps"] = count
        scheduler.set_timesteps(device=self._execution_device, **options)
        return scheduler

    def _suspects(self) -> dict[str, Any]:
        """Return the components in the order in which a picture that is not finite is traced to them."""
        return {name: getattr(self, name) for name in (*ADAPTERS, *ENCODERS, "unet", "vae")}

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in 0..1 to normalised float32 latents, using the mode of the distribution."""
        pixels = (pictures * 2 - 1).to(self._execution_device, self.vae.dtype)
        out = self.vae.encode(pixels)
        latents = (out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent).float()
        latents = latents * float(getattr(self.vae.config, "scaling_factor", 1.0) or 1.0)
        latents = pack_latents(latents, int(self.config.latents_patch))
        if self.config.latents_mean is None or self.config.latents_std is None:
            return latents
        mean, std = torch.tensor(self.config.latents_mean), torch.tensor(self.config.latents_std)
        return normalise_latents(latents, mean, std)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Decode normalised latents to pictures of `output_type`."""
        if self.config.latents_mean is not None and self.config.latents_std is not None:
            mean, std = torch.tensor(self.config.latents_mean), torch.tensor(self.config.latents_std)
            latents = denormalise_latents(latents, mean, std)
        latents = unpack_latents(latents, int(self.config.latents_patch))
        latents = latents / float(getattr(self.vae.config, "scaling_factor", 1.0) or 1.0)
        pictures = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        check_picture(pictures, self._suspects)
        return self.image_processor.postprocess(pictures.float(), output_type=output_type)


def _copies(text: TextTokens, copies: int) -> TextTokens:
    return repeat(text[0], copies), {name: repeat(tokens, copies) for name, tokens in text[1].items()}
