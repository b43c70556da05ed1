"""The stock Stable Diffusion pipelines of diffusers, 1.5 and XL, made to know people.

`from imagine.stock import StableDiffusionXLPipeline` gives diffusers' pipeline of that name with one more base class,
`Personal`. Its `__call__` takes a reference beside all stock arguments, works out one record of what the denoiser is to
attend to, and lets the stock `__call__` draw: LoRA, ControlNet, callbacks, schedulers, offloading are diffusers' own.

    reference, prompt -> Conditioning, rows in the order of the stock batch: [negative; positive], copies side by side
    cross_attention_kwargs={..., "conditioning": ...} -> stock __call__ -> U-Net -> ParallelAttention

The classes are called as the stock ones are, since diffusers writes a pipeline's class name into its folder and picks
pipelines by it: what is saved here is a stock folder to every other tool, with our adapters beside.
"""

import functools
import inspect
import os
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from imagine.adapter import Adapter, check_attached, prepare
from imagine.encoders import TextEncoders
from imagine.errors import ConfigError, PromptError, WeightsError
from imagine.faces import FaceChoice
from imagine.looking import FINDER, Looking, OnNoFace, check_encoder, identity_spec
from imagine.records import Conditioning, Scale, Tokens
from imagine.request import Request, read_requests
from imagine.sampling import VISION, join, repeat
from imagine.stock_files import HUB_OPTIONS, load_parts, save_beside, saved_beside
from imagine.weights import STOCK_PIPELINES, hushed, resolve_folder

T5, BYT5 = "t5", "byt5"  # the text branches, as text adapters call them
TEXT_BRANCHES = (T5, BYT5)
ENCODERS = ("t5_encoder", "byt5_encoder", "vision_encoder")  # what we add to a stock pipeline's models
COMPONENTS = (*ENCODERS, "t5_tokenizer", "byt5_tokenizer")

Scales = dict[str, "Scale | Mapping[str, Scale]"]


class Personal(Looking):
    """What a stock pipeline gains: adapters on its denoiser, and arguments that say who is in the picture.

    `vision_encoder` looks at references; without one, the stock pipeline's own `image_encoder` does. `t5_encoder` and
    `byt5_encoder`, with their tokenizers, feed the branches "t5" and "byt5" of a text adapter. All may be left out.
    """

    unet: Any
    image_encoder: Any
    vision_encoder: Any
    text_adapter: Adapter | None
    adapter: Adapter | None
    ip_adapters: list[Adapter]

    def _begin(self) -> None:
        self.text_adapter = None
        self.adapter = None
        self.ip_adapters = []

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Return this pipeline around another one's components, not copied, nor cast unless `dtype` says so.

        What is given by name replaces them. Adapters that are on the other pipeline's denoiser come along.
        """
        older = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", older)
        modules, options = cast(Any, cls)._get_signature_keys(cls)
        given = {name: part for name, part in pipeline.components.items() if name in modules}
        given |= {name: pipeline.config[name] for name in options if name in pipeline.config}
        given |= kwargs
        parameters = inspect.signature(cls.__init__).parameters
        lacking = [
            name for name in modules if name not in given and parameters[name].default is inspect.Parameter.empty
        ]
        if lacking:
            raise ConfigError(f"A {cls.__name__} also needs {lacking[0]}: give it, as in {lacking[0]}=...")
        made = cast(Any, cls)(**given)
        if isinstance(pipeline, Personal) and made.unet is pipeline.unet:
            made.text_adapter, made.adapter = pipeline.text_adapter, pipeline.adapter
            made.ip_adapters = list(pipeline.ip_adapters)
            made._finder, made._finder_folder, made._eyes = pipeline._finder, pipeline._finder_folder, pipeline._eyes
        return made if dtype is None else made.to(dtype=dtype)

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a stock folder, or a hub repository, through the stock loader; our adapters too, if they lie there.

        Takes the stock arguments. Parts may be given as objects or by name (a folder or a hub id), among them
        `vision_encoder`, `t5_encoder` and `byt5_encoder`, and a face finder as `finder`.
        Raises WeightsError, in one sentence, if something is missing, wrong or out of reach.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        finder = kwargs.pop("finder", None)
        folder = resolve_folder(source, STOCK_PIPELINES, kwargs.get("variant"), **hub)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        kwargs |= load_parts(kwargs, dtype if isinstance(dtype, torch.dtype) else None, **hub)
        kwargs.setdefault("use_safetensors", True)
        with hushed(), in_a_sentence(folder):
            pipe = cast(Any, super()).from_pretrained(os.fspath(folder), **kwargs)
        pipe._finder, pipe._finder_folder = finder, folder / FINDER
        for path in saved_beside(folder):
            pipe._add(Adapter.load(path, pipe._denoiser), path.name)
        return pipe

    @classmethod
    def from_single_file(cls, source: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As the stock loader; without a network, give `config`, a local folder of a pipeline of the same kind."""
        kwargs |= load_parts({name: each for name, each in kwargs.items() if name in COMPONENTS}, kwargs.get("dtype"))
        try:
            with hushed():
                return cast(Any, super()).from_single_file(os.fspath(source), **kwargs)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{os.fspath(source)} cannot be loaded ({_reason(error)}); without a network, also give config=FOLDER, "
                "a local folder of a pipeline of the same kind, whose weights are not needed."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the stock components as diffusers does, and beside them our adapters and the face finder's files."""
        folder = Path(save_directory)
        with hushed():
            cast(Any, super()).save_pretrained(os.fspath(folder), **kwargs)
        adapters: dict[str, Adapter | None] = {"text_adapter": self.text_adapter, "adapter": self.adapter}
        adapters |= {f"ip_{number}": each for number, each in enumerate(self.ip_adapters)}
        seeing = self.reference_encoder is not None or self._eyes is not None
        save_beside(folder, adapters, self.encoder_fingerprint if seeing else None, COMPONENTS)
        source = self._finder_folder
        if source is not None and source.is_dir() and source.resolve() != (folder / FINDER).resolve():
            shutil.copytree(source, folder / FINDER, dirs_exist_ok=True)

    # --- adapters ---------------------------------------------------------------------------------------------------

    @property
    def _denoiser(self) -> nn.Module:
        """The denoiser itself, which torch.compile may have wrapped."""
        return cast(nn.Module, getattr(self.unet, "_orig_mod", self.unet))

    def _adapters(self) -> list[Adapter]:
        return [*(part for part in (self.text_adapter, self.adapter) if part is not None), *self.ip_adapters]

    def load_adapter(self, source: Any) -> None:
        """Put an adapter (an object, or a saved folder or file) on the denoiser, in place of one of the same kind.

        One with the branch "vision" becomes `adapter`; one with text branches only becomes `text_adapter`.
        """
        adapter = source if isinstance(source, Adapter) else Adapter.load(source, self._denoiser)
        names = {spec.name for spec in adapter.branch_specs}
        if unknown := names - {VISION, *TEXT_BRANCHES}:
            raise WeightsError(
                f"The adapter has a branch {min(unknown)!r}, which this pipeline cannot fill; it knows {VISION}, {T5} "
                f"and {BYT5}, and loads IP-Adapters by load_ip_adapter."
            )
        if self.reference_encoder is not None:
            check_encoder(adapter, self.encoder_fingerprint)
        place: Literal["adapter", "text_adapter"] = "adapter" if VISION in names else "text_adapter"
        if getattr(self, place) is not adapter:
            self.unload_adapter(place)
            self._add(adapter, place)

    def _add(self, adapter: Adapter, place: str) -> None:
        """Attach an adapter and remember it as `text_adapter`, `adapter` or one of `ip_adapters`."""
        adapter.to(self.unet.device, self.unet.dtype).eval().attach(self._denoiser)
        if place.startswith("ip_"):
            self.ip_adapters.append(adapter)
        else:
            setattr(self, place, adapter)

    def unload_adapter(self, name: Literal["adapter", "text_adapter"] = "adapter") -> Adapter | None:
        """Take an adapter off the denoiser, leaving the base exactly as before it; return it, or None."""
        adapter: Adapter | None = getattr(self, name)
        if adapter is not None:
            adapter.detach(self._denoiser)
            setattr(self, name, None)
        return adapter

    @property
    def reference_encoder(self) -> nn.Module | None:
        """The encoder that looks at references: `vision_encoder`, else the stock `image_encoder`."""
        return cast("nn.Module | None", self.vision_encoder or getattr(self, "image_encoder", None))

    def _settle(self) -> None:
        """Bring the adapters to where the denoiser will run, and in its precision."""
        for adapter in self._adapters():
            adapter.to(cast(Any, self)._execution_device, self.unet.dtype)

    def _rest(self) -> None:
        """Take the adapters off the accelerator again, if the pipeline offloads its models."""
        if getattr(self, "_offload_device", None) is not None:
            for adapter in self._adapters():
                adapter.to("cpu")

    # --- drawing ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        *arguments: Any,
        reference: Any = None,
        identity_scale: Any = 1.0,
        face: FaceChoice = "largest",
        on_no_face: OnNoFace = "error",
        branch_embeds: Mapping[str, Tokens] | None = None,
        negative_branch_embeds: Mapping[str, Tokens] | None = None,
        **options: Any,
    ) -> Any:
        """Draw with the stock pipeline, whose arguments are all taken, and show in the pictures who is referred to.

        reference, face, on_no_face: as in `ImaginePipeline`: photos, Personas, lists of them, or a dict of names.
        identity_scale: strength of the identity branch, one number or one per prompt, or a mapping from attention
            layers to these; 0, like no reference, gives the stock pipeline's picture, bit for bit.
        branch_embeds, negative_branch_embeds: what `encode_branches` gave for the prompts, instead of encoding them.

        The result is the stock one; its attribute `faces` says which faces were used.
        Raises ImagineError with one sentence where what we add is used wrongly.
        """
        draw = cast(Any, super()).__call__
        given = _by_name(draw, arguments, options)
        images, embeds = given.pop("ip_adapter_image", None), given.pop("ip_adapter_image_embeds", None)
        kwargs = dict(given.get("cross_attention_kwargs") or {})
        masks = kwargs.pop("ip_adapter_masks", None) if self.ip_adapters else None
        if not self._adapters():
            if reference is not None or images is not None or embeds is not None:
                raise WeightsError(
                    "Nothing on the denoiser can show a reference: load_adapter or load_ip_adapter first, or leave the "
                    "reference out."
                )
            return draw(**given)
        check_attached(self._denoiser, self._adapters())
        self._settle()
        try:
            shape, requests = self._read(draw, given, reference)
            personas = self._see(requests, face, on_no_face)
            record = Conditioning(
                *self._merged(
                    self._text(given, shape, branch_embeds, negative_branch_embeds),
                    self._identity(personas, identity_scale, shape),
                    self._ip(images, embeds, masks, shape),
                )
            )
            call = _Call(self, kwargs, record, shape)
            given["cross_attention_kwargs"] = kwargs
            call.follow_callbacks(given)
            out = draw(**given)
        finally:
            self._rest()
        if hasattr(out, "images"):
            out.faces = [one for people in personas for persona in people for one in persona.faces]
        return out

    def _read(self, draw: Any, given: dict[str, Any], reference: Any) -> "tuple[_Shape, list[Request]]":
        """Say who is in which picture, write the people's words into `given`, and find the batch that will be drawn."""
        signature = inspect.signature(draw).parameters
        prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [""] * (0 if embeds is None else len(embeds)))
        if reference is None:
            requests = [Request(each) for each in prompts]
        else:
            # An empty prompt is one to the stock pipeline; to us it names nobody.
            shown = [each if each.strip() else "-" for each in prompts]
            requests = read_requests(shown[0] if isinstance(prompt, str) else shown, reference)
            words = [
                request.sentence if each.strip() else each for each, request in zip(prompts, requests, strict=True)
            ]
            if prompt is not None:
                given["prompt"] = words[0] if isinstance(prompt, str) else words
        # The stock rule whether guidance is on is a property that reads what the stock call is about to set.
        cast(Any, self)._guidance_scale = given.get("guidance_scale", signature["guidance_scale"].default)
        copies = given.get("num_images_per_prompt", 1) or 1
        return _Shape(len(prompts), copies, bool(cast(Any, self).do_classifier_free_guidance)), requests

    def _identity(self, personas: Any, scale: Any, shape: "_Shape") -> "_Parts":
        """The identity branch of all rows; nothing if nobody is shown."""
        shown = self._vision(personas, shape.copies)
        if shown is None:
            return _Parts()
        spec = identity_spec(self.adapter)
        assert spec is not None
        absent = spec.absent == "zeros"

        def rows(each: Any) -> Tensor:
            strength = self._strength(each, personas, shape.copies)
            return torch.cat([strength * absent, strength]) if shape.guided else strength

        strength = {name: rows(each) for name, each in scale.items()} if isinstance(scale, Mapping) else rows(scale)
        if shape.guided:
            shown = join([self._nobody(shape.pictures) if absent else shown, shown])
        return _Parts({VISION: shown}, {VISION: strength})

    def _ip(self, images: Any, embeds: Any, masks: Any, shape: "_Shape") -> "_Parts":
        """The branches of IP-Adapters."""
        if images is None and embeds is None:
            return _Parts()
        made = cast(Any, self).ip_conditioning(images, embeds, masks, shape.prompts, shape.copies, shape.guided)
        return _Parts(*made)

    @staticmethod
    def _merged(*parts: "_Parts") -> tuple[dict[str, Tokens], Scales, dict[str, Tensor]]:
        branches: dict[str, Tokens] = {}
        scales: Scales = {}
        regions: dict[str, Tensor] = {}
        for each in parts:
            branches.update(each.branches)
            scales.update(each.scales)
            regions.update(each.regions)
        return branches, scales, regions

    # --- the sentence's further readers -----------------------------------------------------------------------------

    def _text(
        self,
        given: Mapping[str, Any],
        shape: "_Shape",
        positive: Mapping[str, Tokens] | None,
        negative: Mapping[str, Tokens] | None,
    ) -> "_Parts":
        """The text branches of all rows that the text adapter reads."""
        if self.text_adapter is None:
            return _Parts()
        if positive is None:
            if given.get("prompt") is None:
                raise PromptError(
                    "The text adapter reads the sentence too: with prompt_embeds, also give branch_embeds, which "
                    "encode_branches makes of it."
                )
            positive = self.encode_branches(given["prompt"])
        if not shape.guided:
            return _Parts({name: repeat(each, shape.copies) for name, each in positive.items()})
        if negative is None:
            words = given.get("negative_prompt") or ""
            negatives = [words] * shape.prompts if isinstance(words, str) else list(words)
            negatives = negatives * shape.prompts if len(negatives) == 1 else negatives
            negative = self.encode_branches(negatives)
        sides = (negative, positive)
        return _Parts({name: join([repeat(side[name], shape.copies) for side in sides]) for name in positive})

    @torch.no_grad()
    def encode_branches(self, prompts: "str | Sequence[str]") -> dict[str, Tokens]:
        """Read prompts with those of T5 and ByT5 that the text adapter has branches for, one row per prompt."""
        names = [spec.name for spec in self.text_adapter.branch_specs] if self.text_adapter is not None else []
        for name in names:
            if getattr(self, f"{name}_encoder") is None or getattr(self, f"{name}_tokenizer") is None:
                raise WeightsError(
                    f"The text adapter reads {name}, but the pipeline has no {name}_encoder with its {name}_tokenizer: "
                    "give both, as in ImaginePipeline.from_pipe(pipe, ...), or unload_adapter('text_adapter')."
                )
        sentences = [prompts] if isinstance(prompts, str) else list(prompts)
        mine = cast(Any, self)
        readers = TextEncoders(
            None, None, mine.t5_encoder, mine.t5_tokenizer, mine.byt5_encoder, mine.byt5_tokenizer,
            mine._execution_device,
        )  # fmt: skip
        read = {T5: readers.encode_t5, BYT5: readers.encode_byt5}
        return {name: _at(read[name](sentences), mine._execution_device, self.unet.dtype) for name in names}


@dataclass(frozen=True)
class _Shape:
    """The batch of one call: how many prompts, how many pictures of each, and whether the negative side is drawn."""

    prompts: int
    copies: int
    guided: bool

    @property
    def pictures(self) -> int:
        return self.prompts * self.copies


@dataclass(frozen=True)
class _Parts:
    """Some branches of a Conditioning."""

    branches: Mapping[str, Tokens] = field(default_factory=dict)
    scales: Mapping[str, "Scale | Mapping[str, Scale]"] = field(default_factory=dict)
    regions: Mapping[str, Tensor] = field(default_factory=dict)


class _Call:
    """What a running call attends to, in the very dict that the stock pipeline hands to the denoiser at every step."""

    def __init__(self, pipe: Personal, kwargs: dict[str, Any], record: Conditioning, shape: _Shape) -> None:
        self.pipe, self.kwargs, self.record, self.shape = pipe, kwargs, record, shape
        self._prepare()

    def _prepare(self) -> None:
        self.kwargs["conditioning"] = prepare(self.pipe._denoiser, self.record)

    def follow_callbacks(self, given: dict[str, Any]) -> None:
        """Put ourselves behind the caller's callback, if there is one, to see what it has changed."""
        callback: Callable[..., Any] | None = given.get("callback_on_step_end")
        if callback is None:
            return
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

        def after(*arguments: Any, **options: Any) -> Any:
            changed = callback(*arguments, **options)
            self._follow()
            return changed

        given["callback_on_step_end"] = after

    def _follow(self) -> None:
        """Where a callback has ended guidance, as diffusers' cutoffs do, only the positive rows are drawn from here."""
        if self.shape.guided and not cast(Any, self.pipe).do_classifier_free_guidance:
            self.shape = replace(self.shape, guided=False)
            self.record = _last(self.record, self.shape.pictures)
            self._prepare()


def _last(record: Conditioning, count: int) -> Conditioning:
    """The last `count` rows of a conditioning."""

    def scale(each: Any) -> Any:
        return each[-count:] if isinstance(each, Tensor) and each.dim() else each

    branches = {
        name: Tokens(each.values[-count:], None if each.mask is None else each.mask[-count:])
        for name, each in record.branches.items()
    }
    scales = {
        name: {layer: scale(one) for layer, one in each.items()} if isinstance(each, Mapping) else scale(each)
        for name, each in record.scales.items()
    }
    return Conditioning(branches, scales, {name: each[-count:] for name, each in record.regions.items()})


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


@contextmanager
def in_a_sentence(folder: Path) -> Iterator[None]:
    """Turn what the stock loader raises into a WeightsError: each library fails in its own way."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{folder} cannot be loaded ({_reason(error)}); copy or download it again.") from error


def _at(tokens: Tokens, device: torch.device, dtype: torch.dtype) -> Tokens:
    mask = None if tokens.mask is None else tokens.mask.to(device)
    return Tokens(tokens.values.to(device, dtype), mask)


def _by_name(call: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """A stock call's arguments by name, however they were given."""
    signature = inspect.signature(call)
    named = dict(signature.bind(*arguments, **options).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


# --- the classes ------------------------------------------------------------------------------------------------------


def imagined(stock: type) -> Any:
    """The subclass of a stock pipeline class that knows people; always the same one. Raises ConfigError for others."""
    if issubclass(stock, Personal):
        return stock
    if not any(base.__name__ in STOCK_PIPELINES for base in stock.__mro__):
        raise ConfigError(
            f"A {stock.__name__} cannot be made to know people: take one of Stable Diffusion 1.5 or XL, such as "
            "StableDiffusionXLPipeline."
        )
    return _imagined(cast(Any, stock))


@functools.cache
def _imagined(stock: Any) -> Any:
    first = "->".join(ENCODERS)
    members = {
        "__module__": __name__,
        "__doc__": f"{stock.__doc__}\n    It knows people: see `imagine.stock.Personal`.",
        "__init__": _constructor(stock),
        "_optional_components": [*stock._optional_components, *COMPONENTS],
        "model_cpu_offload_seq": f"{first}->{stock.model_cpu_offload_seq}",  # they run first, and leave first
        # Our encoder is not run through `forward` alone, so that hooks on its parts would come too late.
        "_exclude_from_cpu_offload": [*stock._exclude_from_cpu_offload, "vision_encoder"],
    }
    return type(stock.__name__, (Personal, stock), members)


def _constructor(stock: Any) -> Any:
    """An __init__ that takes our components beside the stock ones, and says so: diffusers reads its signature."""

    def __init__(self: Any, *arguments: Any, **components: Any) -> None:
        ours = {name: components.pop(name, None) for name in COMPONENTS}
        stock.__init__(self, *arguments, **components)
        self.register_modules(**ours)
        self._begin()

    signature = inspect.signature(stock.__init__)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in COMPONENTS]
    cast(Any, __init__).__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
    __init__.__annotations__ = typing.get_type_hints(stock.__init__)
    return __init__


def __getattr__(name: str) -> Any:
    """The classes by name, made when asked for: importing all of diffusers' pipelines takes seconds."""
    if name not in STOCK_PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import diffusers

    return imagined(getattr(diffusers, name))
