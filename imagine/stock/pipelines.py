"""Add personalisation to diffusers' Stable Diffusion 1.5 and XL pipelines.

`from imagine.stock import StableDiffusionXLPipeline` returns diffusers' pipeline of that name with an additional base
class, `PersonalisationMixin`. Its `__call__` takes a reference in addition to all stock arguments, builds one
Conditioning for the denoiser, and calls the stock `__call__` to draw. LoRA, ControlNet, callbacks, schedulers and
offloading are diffusers' own.

    reference, prompt -> Conditioning, rows in the order of the stock batch: [negative; positive], copies adjacent
    cross_attention_kwargs={..., "conditioning": ...} -> stock __call__ -> U-Net -> ParallelAttention

The classes have the names of the stock classes, because diffusers writes a pipeline's class name into its folder and
selects the pipeline by it. Every other tool can therefore read a saved folder as a stock folder; our adapters are next
to the stock components.
"""

import functools
import gc
import inspect
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from imagine.adapter.adapter import Adapter, check_attached
from imagine.errors import ConfigError, PromptError, WeightsError
from imagine.networks.device import device_found_once, execution_device
from imagine.networks.encoders import TextEncoders
from imagine.networks.models import read_empty_denoiser
from imagine.networks.saving import PUSH_OPTIONS, check_save_options, write_whole
from imagine.networks.weights import (
    HUB_OPTIONS,
    adapter_path,
    quiet_libraries,
    refuse_random_weights,
    resolve_folder,
)
from imagine.people.faces import FaceChoice
from imagine.people.persona import Persona
from imagine.people.reference_encoder import FINDER, OnNoFace, check_encoder
from imagine.pipeline.call import checked_attempts
from imagine.pipeline.controls import ALL, Blocks, Window, block_factors
from imagine.pipeline.layout import Layout
from imagine.pipeline.picture_check import FiniteImageProcessor, naming_the_part
from imagine.pipeline.second_pass import RefineFaces
from imagine.pipeline.stock_recording import StockRecord
from imagine.records import VISION, Tokens, take
from imagine.request import word_notes
from imagine.stock import STOCK_PIPELINES
from imagine.stock.attention import AttentionBackendMixin
from imagine.stock.call import (
    Batch,
    ConditioningParts,
    ConditioningUpdater,
    bind_arguments,
    by_name,
    like_stock,
    merge_parts,
    read_call,
    read_prompts,
    tokens_to,
)
from imagine.stock.files import (
    choose_variant,
    load_parts,
    normalise_dtype_argument,
    save_adapters,
    saved_adapter_folders,
    saved_scale,
)
from imagine.stock.identity import IdentityBranchesMixin
from imagine.stock.people import StockAttempts, reference_regions
from imagine.stock.second_pass import StockSecondPass, inpainting

_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
T5, BYT5 = "t5", "byt5"  # names of the text branches in text adapters
TEXT_BRANCHES = (T5, BYT5)
# The models that we add to a stock pipeline, in the order in which a call runs them; offloading relies on this order.
ENCODERS = ("vision_encoder", "t5_encoder", "byt5_encoder")
COMPONENTS = (*ENCODERS, "t5_tokenizer", "byt5_tokenizer")


class PersonalisationMixin(AttentionBackendMixin, IdentityBranchesMixin):
    """Adds adapters on the denoiser, and arguments for the people in the picture, to a stock pipeline.

    `vision_encoder` encodes references; without it, the stock pipeline's own `image_encoder` does. `t5_encoder` and
    `byt5_encoder`, with their tokenizers, feed the branches "t5" and "byt5" of a text adapter. All are optional.
    """

    image_encoder: Any
    vision_encoder: Any
    stock_classes = STOCK_PIPELINES  # the class names of folders that from_pretrained accepts

    def _suspects(self) -> dict[str, Any]:
        """Return the components in the order in which a picture that is not finite is traced to them."""
        adapters = {"text_adapter": self.text_adapter, "adapter": self.adapter}
        adapters |= {f"ip_{number}": each for number, each in enumerate(self.ip_adapters)}
        return {**adapters, **cast(Any, self).components}

    def _init_adapters(self) -> None:
        self.text_adapter, self.adapter = None, None
        self.ip_adapters, self._ip_scales = [], []

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Return this pipeline with another one's components, not copied, and cast only if `dtype` is given.

        Components given by keyword, as objects or as names of folders, replace them. The other pipeline's adapters are
        kept, also on another `unet` if they fit it. Raises ConfigError if a required component is missing.
        """
        older = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", older)
        modules, options = cast(Any, cls)._get_signature_keys(cls)
        given = {name: part for name, part in pipeline.components.items() if name in modules}
        given |= {name: pipeline.config[name] for name in options if name in pipeline.config}
        given |= {**kwargs, **load_parts(kwargs, dtype or getattr(getattr(pipeline, cls.denoiser_name), "dtype", None))}
        parameters = inspect.signature(cls.__init__).parameters
        lacking = [
            name for name in modules if name not in given and parameters[name].default is inspect.Parameter.empty
        ]
        if lacking:
            raise ConfigError(f"A {cls.__name__} also needs {lacking[0]}: give it, as in {lacking[0]}=...")
        for part in (given[name] for name in modules if name in kwargs):
            if isinstance(part, nn.Module) and pipeline.device.type != "meta" and not hasattr(part, "_hf_hook"):
                part.to(pipeline.device)  # diffusers reads the device from one component only, so all must be on it
        made = cast(Any, cls)(**given)
        if isinstance(pipeline, PersonalisationMixin):
            made.text_adapter, made.adapter = pipeline.text_adapter, pipeline.adapter
            made.ip_adapters, made._ip_scales = list(pipeline.ip_adapters), pipeline._ip_scales
            made._finder, made._finder_folder = pipeline._finder, pipeline._finder_folder
            made._face_recogniser = pipeline._face_recogniser
            made._encoder_info, made._zero_features = pipeline._encoder_info, pipeline._zero_features
            if made.denoiser is not pipeline.denoiser:
                made._move_adapters(None)
        return made if dtype is None else made.to(dtype=dtype)

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a stock folder or hub repository through the stock loader, and the adapters saved in it.

        Takes the stock arguments. Components, including `vision_encoder`, `t5_encoder` and `byt5_encoder`, may be given
        as objects or by name (a folder or a hub id). `finder` is a face finder. Raises WeightsError if something is
        missing, does not fit or cannot be downloaded. As in diffusers, .bin files are read where there are no
        safetensors files, unless `use_safetensors` is true; torch reads only tensors from them, and runs no code.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        finder = kwargs.pop("finder", None)
        safe, variant = kwargs.get("use_safetensors"), kwargs.get("variant")
        folder = resolve_folder(pretrained_model_name_or_path, cls.stock_classes, variant, safe, **hub)
        dtype = normalise_dtype_argument(kwargs)
        modules = cast(Any, cls)._get_signature_keys(cls)[0]  # all other arguments belong to the loader
        parts = {name: each for name, each in kwargs.items() if name in modules or name in COMPONENTS}
        if (chosen := choose_variant(folder, variant, parts)) is not None:
            kwargs["variant"] = chosen
        kwargs |= load_parts(parts, dtype, variant, **hub)
        with as_weights_error(folder), refuse_random_weights(folder):
            pipe = cast(Any, super()).from_pretrained(os.fspath(folder), **kwargs)
        pipe._finder, pipe._finder_folder = finder, folder / FINDER
        for path in saved_adapter_folders(folder):
            pipe._add_saved_adapter(path, variant)
        return pipe

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a single file as the stock loader does.

        Without a network, also give `config`, a local folder of a pipeline of the same kind. Raises WeightsError if the
        file cannot be loaded.
        """
        source, dtype = os.fspath(pretrained_model_link_or_path), normalise_dtype_argument(kwargs)
        kwargs |= load_parts({name: each for name, each in kwargs.items() if name in COMPONENTS}, dtype)
        try:
            with quiet_libraries():
                return cast(Any, super()).from_single_file(source, **kwargs)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{source} cannot be loaded ({_reason(error)}); without a network, also give config=FOLDER, "
                "a local folder of a pipeline of the same kind (its weights are not needed)."
            ) from error

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the stock components as diffusers does, with our adapters and the face finder's files next to them.

        The folder is written whole or not at all. Raises WeightsError if something is missing, or for options whose
        files could not be loaded again. A `variant` is part of the names of the weights' files, adapters included.
        Without `safe_serialization` the components are .bin files, which `from_pretrained` reads too.
        """
        check_save_options(kwargs)
        self._check_can_save()
        push = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        adapters: dict[str, Adapter | None] = {"text_adapter": self.text_adapter, "adapter": self.adapter}
        adapters |= {f"ip_{number}": each for number, each in enumerate(self.ip_adapters)}
        has_encoder = self.reference_encoder is not None or self._encoder_info is not None
        scales = {f"ip_{number}": self._ip_scale(number) for number in range(len(self.ip_adapters))}
        fingerprint = self.encoder_fingerprint if has_encoder else None
        with write_whole(Path(save_directory), ("text_adapter", "adapter", "ip_*")) as folder:
            with quiet_libraries():
                cast(Any, super()).save_pretrained(os.fspath(folder), safe_serialization, variant, **kwargs)
            save_adapters(folder, adapters, scales, fingerprint, COMPONENTS, variant)
            self._save_small_networks(folder)
        if push:  # not by diffusers' save, which would upload before the adapters are there
            cast(Any, self).push_to_hub(
                hub.pop("repo_id", Path(save_directory).absolute().name), variant=variant, **hub
            )

    def _check_can_save(self) -> None:
        """Raise WeightsError if diffusers would write what it cannot load again, or what it would lose."""
        kind = cast(Any, type(self))
        needed = [name for name in kind._get_signature_keys(kind)[0] if name not in kind._optional_components]
        if lacking := [name for name in needed if getattr(self, name, None) is None]:
            raise WeightsError(
                f"The pipeline has no {lacking[0]}, so what is saved could not be loaded: load the pipeline again, or "
                "save it before free_encoders."
            )
        if self._has_stock_ip_adapter:
            raise WeightsError(
                "diffusers has loaded an IP-Adapter into the denoiser, which a saved folder cannot hold: call "
                "unload_ip_adapter() first, and load the IP-Adapter again after the folder."
            )
        for name, part in cast(Any, self).components.items():
            if isinstance(part, nn.Module) and any(".base_layer." in each for each, _ in part.named_parameters()):
                raise WeightsError(
                    f"LoRA weights are loaded into {name}, whose weights could then not be loaded again: call "
                    "unload_lora_weights() first, or fuse_lora() and unload_lora_weights() to save them fused."
                )

    # --- adapters ---------------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The components by name; ours only if they are set, so that a stock pipeline takes those of a stock folder."""
        found: dict[str, Any] = cast(Any, super()).components
        return {name: part for name, part in found.items() if part is not None or name not in COMPONENTS}

    def _remove_adapter(self, adapter: Adapter) -> None:
        super()._remove_adapter(adapter)
        if adapter in self.ip_adapters:
            place = self.ip_adapters.index(adapter)
            self.ip_adapters = [each for each in self.ip_adapters if each is not adapter]
            self._ip_scales = [*self._ip_scales[:place], *self._ip_scales[place + 1 :]]

    def _adapters(self) -> list[Adapter]:
        return [*(part for part in (self.text_adapter, self.adapter) if part is not None), *self.ip_adapters]

    def load_adapter(self, source: Any, **hub: Any) -> None:
        """Attach an adapter (an Adapter, a saved folder or file, or a hub id), replacing one of the same kind.

        `hub` holds options of a hub id's download, such as revision.

        An adapter with the branch "vision" becomes `adapter`; one with text branches only becomes `text_adapter`.
        Raises WeightsError for an unknown branch, or if the adapter was trained with another encoder.
        """
        self._check_can_load()
        if self._has_stock_ip_adapter:
            raise WeightsError(
                "diffusers has loaded an IP-Adapter into this denoiser, which leaves no place for an adapter: call "
                "unload_ip_adapter() first, and load the IP-Adapter again with this pipeline's load_ip_adapter."
            )
        adapter = source if isinstance(source, Adapter) else Adapter.load(adapter_path(source, **hub), self.denoiser)
        names = {spec.name for spec in adapter.branch_specs}
        if unknown := names - {VISION, *TEXT_BRANCHES}:
            raise WeightsError(
                f"The adapter has an unsupported branch {min(unknown)!r}. This pipeline supports {VISION}, {T5} and "
                f"{BYT5}; load IP-Adapters with load_ip_adapter."
            )
        if self.reference_encoder is not None:
            check_encoder(adapter, self.encoder_fingerprint)
        self._replace_adapter("adapter" if VISION in names else "text_adapter", adapter.to(self.unet.dtype).eval())

    def _add_saved_adapter(self, folder: Path, variant: str | None) -> None:
        """Load an adapter from a pipeline's folder, and store it under the folder's name: a place, or ip_0, ip_1 ...

        Without a denoiser it is not attached, but `from_pipe` passes it on, and `encode_branches` knows its branches.
        """
        denoiser = self.denoiser if self.denoiser is not None else read_empty_denoiser(folder.parent / "unet")
        adapter = Adapter.load(folder, denoiser, variant=variant).eval()
        if self.denoiser is not None:
            adapter.to(self.unet.dtype).attach(self.denoiser)
        if folder.name.startswith("ip_"):
            self.ip_adapters, self._ip_scales = [*self.ip_adapters, adapter], [*self._ip_scales, saved_scale(adapter)]
        else:
            setattr(self, folder.name, adapter)

    @property
    def ip_scales(self) -> Sequence[Any]:
        """The scales of IP-Adapters; every set_ip_adapter_scale replaces this object."""
        return self._ip_scales

    @property
    def reference_encoder(self) -> nn.Module | None:
        """The encoder of references: `vision_encoder`, else the stock `image_encoder`."""
        return cast("nn.Module | None", self.vision_encoder or getattr(self, "image_encoder", None))

    def enable_group_offload(self, *arguments: Any, **options: Any) -> None:
        """Offload groups of layers as in diffusers, except `vision_encoder`, which also runs outside `forward`."""
        stock = cast(Any, super()).enable_group_offload
        given = by_name(stock, arguments, options)
        excluded = given.pop("exclude_modules", None) or []
        excluded = [excluded] if isinstance(excluded, str) else list(excluded)
        stock(**given, exclude_modules=[*excluded, "vision_encoder"])

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Offload as in diffusers, after storing the reference encoder's info: offloaded weights cannot be read."""
        if self.reference_encoder is not None:
            self._current_encoder_info()
        cast(Any, super()).enable_sequential_cpu_offload(*arguments, **options)

    def _adapters_to_device(self) -> None:
        """Move the adapters to the execution device and the denoiser's dtype."""
        for adapter in self._adapters():
            adapter.to(execution_device(self), self.denoiser.dtype)

    def _offload_adapters(self) -> None:
        """Move the adapters back to the CPU if the pipeline offloads its models."""
        if getattr(self, "_offload_device", None) is not None:
            for adapter in self._adapters():
                adapter.to("cpu")

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
        branch_embeds: Mapping[str, Tokens] | None = None,
        negative_branch_embeds: Mapping[str, Tokens] | None = None,
        **options: Any,
    ) -> Any:
        """Generate with the stock pipeline, all of whose arguments are accepted, and show the referenced people.

        reference, face, on_no_face: as in `ImaginePipeline`: photos, Personas, lists of these, or a dict from names.
            The identity adapter shows them. Without one the IP-Adapters do, each from the part of the photo that it was
            trained with; IP-Adapters with an image in ip_adapter_image (a list, None for the others) show that image.
        identity_scale: strength of the identity branch: one number, one per prompt, or a mapping from attention layers
            to these. It multiplies the scales of IP-Adapters that show the reference. 0 gives the stock pipeline's
            picture bit for bit, as does no reference.
        identity_window, identity_blocks: the steps and the blocks in which the reference acts, as in `ImaginePipeline`.
        refine_faces: whether to redraw small faces with the inpainting pipeline of the same kind; a RefineFaces gives
            other settings. Only people given by a reference or an IP-Adapter are redrawn. Callbacks run in the first
            pass only.
        layout, attempts: where several people are, and how often a picture is drawn at most until it shows its people,
            as in `ImaginePipeline`. Without a layout, an adapter without a router places people from left to right.
        branch_embeds, negative_branch_embeds: results of `encode_branches` for the prompts, used instead of encoding.

        Return the stock result with more attributes, as in `ImagineOutput`: `faces`, `refined`, `notes`, `records`,
        `flags`, and, if its people were checked, `people`, `people_found`, `attempts` and `seeds`. Raises ImagineError
        if our additional arguments or adapters are used wrongly.
        """
        draw = naming_the_part(cast(Any, super()).__call__, self._suspects)
        given = bind_arguments(draw, arguments, options, _OUR_ARGUMENTS)
        asked = dict(given)
        words = word_notes(*(given.get(name) for name in _PROMPTS))
        output_type = given.get("output_type", "pil")
        self._check_can_draw("unet", *([] if output_type == "latent" else ["vae"]))
        refine_settings = RefineFaces.read(refine_faces, output_type, default=False)
        ours: dict[str, Any] = {
            "identity_scale": identity_scale, "identity_window": Window.read(identity_window),
            "identity_blocks": identity_blocks,
            "branch_embeds": branch_embeds, "negative_branch_embeds": negative_branch_embeds,
        }  # fmt: skip
        if not self._adapters():
            self._check_no_adapter_needed(given, reference)
            return self._draw_nobody(draw, refine_settings, words, given, ours)
        check_attached(self.denoiser, self._adapters())
        self._adapters_to_device()
        try:
            batch, requests = read_call(self, draw, given, reference)
            record = StockRecord(
                self, asked, requests, identity_scale=identity_scale, identity_window=identity_window,
                identity_blocks=identity_blocks, layout=layout, attempts=attempts,
            )  # fmt: skip
            ours["readers"] = readers = self._reference_readers(given, requests)
            spec = readers[0].spec if readers else None
            ours["regions"], placed = reference_regions(self, spec, layout, requests, given)
            most = checked_attempts(attempts, requests, output_type)
            personas = self._personas_for(requests, face, on_no_face, identify=most > 0)
            self._check_readers(readers, personas)
            once = functools.partial(self._draw_once, draw, refine_settings, [*words, *placed])
            out = StockAttempts(batch, requests, given, personas, ours, most).run(self, once)
        finally:
            self._offload_adapters()
        return record.add_to(out, personas)

    def _check_readers(self, readers: Sequence[Any], personas: Sequence[Sequence[Persona]]) -> None:
        """Raise WeightsError if people are shown by an adapter of another encoder, which may have been set after it."""
        if self.adapter is not None and any(personas) and any(each.reading.reads_encoder for each in readers):
            check_encoder(self.adapter, self.encoder_fingerprint)

    def _draw_nobody(
        self, draw: Any, refine_settings: RefineFaces | None, words: Sequence[str], given: dict[str, Any],
        ours: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """Run the stock call without adapters of ours, and redraw the small faces of its result."""
        record, second_pass = StockRecord(self, given, read_prompts(given, None)), None
        if refine_settings is not None:
            batch = read_call(self, draw, given, None)[0]
            second_pass = StockSecondPass.plan(self, draw, refine_settings, batch, given, [()] * batch.prompts, ours)
        return record.add_to(self._add_refined_faces(draw(**given), second_pass, words))

    def _draw_once(
        self, draw: Any, refine_settings: RefineFaces | None, words: Sequence[str], given: dict[str, Any], batch: Batch,
        personas: Sequence[Sequence[Persona]], ours: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """Run the stock call once, and redraw the small faces of its result."""
        second_pass = StockSecondPass.plan(self, draw, refine_settings, batch, given, personas, ours)
        return self._add_refined_faces(self._call_stock(draw, given, batch, personas, ours), second_pass, words)

    def _check_no_adapter_needed(self, given: Mapping[str, Any], reference: Any) -> None:
        """Raise WeightsError if the call gives a reference or image but no adapter is attached."""
        if reference is not None and self._has_stock_ip_adapter:
            raise WeightsError(
                "diffusers loaded the IP-Adapter of this pipeline, and its code takes no reference: call "
                "unload_ip_adapter(), and load the IP-Adapter again with this pipeline's load_ip_adapter."
            )
        has_image = any(given.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds"))
        if reference is not None or (has_image and not self._has_stock_ip_adapter):
            raise WeightsError(
                "No adapter is attached, so a reference cannot be used: call load_adapter or load_ip_adapter first, or "
                "leave the reference out."
            )

    def _call_stock(
        self,
        draw: Any,
        given: dict[str, Any],
        batch: Batch,
        personas: Sequence[Sequence[Persona]],
        ours: Mapping[str, Any],
    ) -> Any:
        """Run the stock call with the conditioning of all branches, and return its result."""
        ip_adapter_inputs = given.pop("ip_adapter_image", None), given.pop("ip_adapter_image_embeds", None)
        given["cross_attention_kwargs"] = kwargs = dict(given.get("cross_attention_kwargs") or {})
        try:
            text = self._text_parts(given, batch, ours["branch_embeds"], ours["negative_branch_embeds"])
            factors = block_factors(self.denoiser, ours["identity_blocks"])
            shown = [
                self._identity_parts(reader, personas, ours["identity_scale"], factors, batch, ours["regions"])
                for reader in ours["readers"]
            ]
            reading = [self.ip_adapters.index(each.adapter) for each in ours["readers"] if each.branch != VISION]
            theirs = self._ip_adapter_parts(*ip_adapter_inputs, kwargs.pop("ip_adapter_masks", None), batch, reading)

            def conditioning(active: bool) -> Any:
                return merge_parts(text, *(each() for each in shown if active), theirs())

            updater = ConditioningUpdater(self, batch, kwargs, conditioning, ours["identity_window"])
            updater.wrap_callback(given)
            return draw(**given)
        finally:
            kwargs.pop("conditioning", None)  # the stock pipeline holds this dict until its next call

    def _add_refined_faces(self, out: Any, second_pass: StockSecondPass | None, words: Sequence[str]) -> Any:
        """Return the stock call's result, with small faces redrawn if there is a second pass, and notes."""
        refined, notes = 0, list[str]()
        if second_pass is not None:
            refined, notes = second_pass.refine(self, out, lambda: self._redrawing_pipeline(second_pass.ip_scales))
            cast(Any, self).maybe_free_model_hooks()  # that pipeline shares our models but does not offload them
        if hasattr(out, "images"):
            out.refined, out.notes = refined, [*words, *notes]
        return out

    def _redrawing_pipeline(self, ip_scales: Sequence[Any]) -> Any:
        """Return the inpainting pipeline with the same components and its own scheduler and IP-Adapter scales."""
        mine = cast(Any, self)
        with quiet_libraries():
            made = personalised_class(inpainting(self)).from_pipe(
                self, scheduler=type(mine.scheduler).from_config(mine.scheduler.config)
            )
        made._ip_scales = ip_scales
        made.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        if hasattr(made, "watermark"):
            made.watermark = None  # the first pass has already added the watermark
        return made

    # --- additional text encoders -----------------------------------------------------------------------------------

    def _text_parts(
        self,
        given: Mapping[str, Any],
        batch: Batch,
        positive: Mapping[str, Tokens] | None,
        negative: Mapping[str, Tokens] | None,
    ) -> ConditioningParts:
        """Return the text adapter's branches for all rows."""
        if self.text_adapter is None:
            return ConditioningParts()
        words: list[str] = []
        if positive is None:
            if given.get("prompt") is None:
                raise PromptError(
                    "The text adapter also needs the prompt: with prompt_embeds, also give branch_embeds, which "
                    "encode_branches returns for the prompt."
                )
            words = [given["prompt"]] if isinstance(given["prompt"], str) else list(given["prompt"])
        count = len(words)
        if negative is None and batch.guided:
            unwanted = given.get("negative_prompt") or ""
            negatives = [unwanted] if isinstance(unwanted, str) else list(unwanted)
            words += negatives * batch.prompts if len(negatives) == 1 else negatives
        # One call per encoder, so that an offloaded encoder moves to the device only once.
        read = self.encode_branches(words) if words else {}
        wanted = {name: take(each, slice(count)) for name, each in read.items()}
        negative_branches = {name: take(each, slice(count, None)) for name, each in read.items()}
        if positive is not None:
            wanted = self._check_branch_embeds("branch_embeds", positive, batch.prompts)
        if negative is not None and batch.guided:
            negative_branches = self._check_branch_embeds("negative_branch_embeds", negative, batch.prompts)
        return ConditioningParts(
            {name: batch.rows(each, negative_branches[name] if batch.guided else None) for name, each in wanted.items()}
        )

    def _check_branch_embeds(self, argument: str, given: Mapping[str, Tokens], count: int) -> dict[str, Tokens]:
        """Return the given text branches on the execution device. Raises PromptError if they do not fit."""
        assert self.text_adapter is not None
        names = [spec.name for spec in self.text_adapter.branch_specs]
        if missing := [name for name in names if name not in given]:
            raise PromptError(
                f"{argument} lacks {missing[0]}, which the text adapter reads: give everything that encode_branches "
                "returned."
            )
        if wrong := [name for name in names if len(given[name].values) != count]:
            raise PromptError(
                f"{argument} has {len(given[wrong[0]].values)} rows of {wrong[0]} for {count} prompts: give one per "
                "prompt."
            )
        device = execution_device(self)
        return {name: tokens_to(given[name], device, self.unet.dtype) for name in names}

    @torch.no_grad()
    def encode_branches(self, prompts: "str | Sequence[str]") -> dict[str, Tokens]:
        """Encode prompts with T5 and ByT5, as far as the text adapter has branches for them; one row per prompt."""
        names = [spec.name for spec in self.text_adapter.branch_specs] if self.text_adapter is not None else []
        mine = cast(Any, self)
        for name in names:
            if getattr(self, f"{name}_encoder") is None or getattr(self, f"{name}_tokenizer") is None:
                raise WeightsError(
                    f"The text adapter reads {name}, but the pipeline has no {name}_encoder with its {name}_tokenizer: "
                    "give both, as in ImaginePipeline.from_pipe(pipe, ...), or unload_adapter('text_adapter')."
                )
        text_encoders = TextEncoders(
            None, None, mine.t5_encoder, mine.t5_tokenizer, mine.byt5_encoder, mine.byt5_tokenizer,
            execution_device(mine),
        )  # fmt: skip
        read = {T5: text_encoders.encode_t5, BYT5: text_encoders.encode_byt5}
        sentences = [prompts] if isinstance(prompts, str) else list(prompts)
        each = list(dict.fromkeys(sentences))  # the prompts of a batch often share one negative prompt
        rows = [each.index(sentence) for sentence in sentences]
        dtype = getattr(self.unet if self.unet is not None else self.text_adapter, "dtype", torch.float32)
        return {name: take(tokens_to(read[name](each), execution_device(mine), dtype), rows) for name in names}

    def free_encoders(self) -> None:
        """Delete all encoders to free memory. Later calls need personas, prompt_embeds and branch_embeds."""
        if self.reference_encoder is not None and any(reader.reading.reads_encoder for reader in self._readers()):
            self._keep_encoder_info()
        for name in (*ENCODERS, "text_encoder", "text_encoder_2", "image_encoder"):
            if getattr(self, name, None) is not None:
                setattr(self, name, None)
        cast(Any, self).maybe_free_model_hooks()  # the hooks still reference the encoders
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_OUR_ARGUMENTS = tuple(
    name
    for name, each in inspect.signature(PersonalisationMixin.__call__).parameters.items()
    if each.kind is inspect.Parameter.KEYWORD_ONLY
)


# Methods that take their arguments as *arguments, and get the stock method's signature.
_LIKE_STOCK = ("__call__", "save_pretrained", "enable_group_offload", "enable_sequential_cpu_offload")


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


@contextmanager
def as_weights_error(folder: Path) -> Iterator[None]:
    """Convert any exception of the stock loader to a WeightsError, because each library raises its own types."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{folder} cannot be loaded ({_reason(error)}); copy or download it again.") from error


# --- the classes ------------------------------------------------------------------------------------------------------


def personalised_class(stock: type) -> Any:
    """Return the subclass with `reference=` of a stock pipeline class, the same object on every call.

    Raises ConfigError for a class that is not supported.
    """
    if issubclass(stock, PersonalisationMixin):
        return stock
    if not any(base.__name__ in STOCK_PIPELINES for base in stock.__mro__):
        raise ConfigError(
            f"A {stock.__name__} cannot take references; use a pipeline of Stable Diffusion 1.5 or XL, such as "
            "StableDiffusionXLPipeline."
        )
    return class_with(PersonalisationMixin, cast(Any, stock))


@functools.cache
def class_with(mixin: Any, stock: Any) -> Any:
    """Return the subclass of a stock pipeline class that also has this mixin, the same object on every call."""
    first = "->".join(ENCODERS)
    members = {
        "__module__": mixin.__module__,
        "__doc__": f"{stock.__doc__}\n    It takes references: see `{mixin.__module__}.{mixin.__name__}`.",
        "__init__": _constructor(stock),
        **{name: like_stock(getattr(mixin, name), getattr(stock, name)) for name in _LIKE_STOCK},
        "_optional_components": [*stock._optional_components, *COMPONENTS],
        "model_cpu_offload_seq": f"{first}->{stock.model_cpu_offload_seq}",  # they run first and are offloaded first
        # Parts of our encoder also run outside `forward`, so that offload hooks on them would come too late.
        "_exclude_from_cpu_offload": [*stock._exclude_from_cpu_offload, "vision_encoder"],
    }
    return type(stock.__name__, (mixin, stock), members)


def _constructor(stock: Any) -> Any:
    """Return an __init__ that also takes our components and lists them in its signature, which diffusers reads."""

    def __init__(self: Any, *arguments: Any, **components: Any) -> None:
        ours = {name: components.pop(name, None) for name in COMPONENTS}
        stock.__init__(self, *arguments, **components)
        if type(self.image_processor) is VaeImageProcessor:  # some pipelines have a processor of another class
            self.image_processor = FiniteImageProcessor.from_config(self.image_processor.config)
        self.register_modules(**ours)
        self._init_adapters()

    signature = inspect.signature(stock.__init__)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in COMPONENTS]
    cast(Any, __init__).__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
    __init__.__annotations__ = typing.get_type_hints(stock.__init__)
    return __init__


def __getattr__(name: str) -> Any:
    """Return a class by name, created on first access, because importing all of diffusers' pipelines takes seconds."""
    if name not in STOCK_PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import diffusers

    return personalised_class(getattr(diffusers, name))
