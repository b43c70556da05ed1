"""Arrange the rows of a stock pipeline's batch, and update what each row attends to while the call runs.

The stock `__call__` stacks [negative; positive] if guidance is on, with the copies of a prompt adjacent; the rows that
we add must have the same order. It passes one dict, `cross_attention_kwargs`, to the denoiser at every step. If a
callback changes the call while it runs (diffusers' cutoffs of guidance and of IP-Adapters), we update that dict.
"""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from imagine.adapter.adapter import prepare
from imagine.errors import ConfigError
from imagine.pipeline.controls import Window
from imagine.records import Conditioning, Scale, Tokens, join, repeat, take
from imagine.request import Request, in_plain_words, read_requests

Scales = Mapping[str, "Scale | Mapping[str, Scale]"]

DEPRECATED = ("callback", "callback_steps")  # some stock calls still read these from their **kwargs
IMAGINE_PIPELINE_ONLY = ("identity_guidance_scale", "guidance_balance")  # arguments of ImaginePipeline's own loop


@dataclass(frozen=True)
class Batch:
    """The number of prompts of a call, the number of pictures per prompt, and whether guidance is on."""

    prompts: int
    copies: int
    guided: bool

    @property
    def pictures(self) -> int:
        return self.prompts * self.copies

    def rows(self, positive: Tokens, negative: Tokens | None) -> Tokens:
        """Expand tokens of prompts to all rows of the batch. If `negative` is None, the positive tokens replace it."""
        positive = repeat(positive, self.copies)
        if not self.guided:
            return positive
        return join([positive if negative is None else repeat(negative, self.copies), positive])

    def group_rows(self, groups: Tensor, negative_is_one: bool) -> Tensor:
        """Expand groups (prompts, people) to all rows of the batch, as `rows` expands their tokens.

        With `negative_is_one` the negative rows have one group of tokens, those of an empty picture.
        """
        groups = groups.repeat_interleave(self.copies, 0)
        if not self.guided:
            return groups
        first = torch.arange(groups.shape[1], device=groups.device) == 0
        return torch.cat((first.expand_as(groups) if negative_is_one else groups, groups))


@dataclass(frozen=True)
class ConditioningParts:
    """Some branches of a Conditioning, with their scales, regions and groups."""

    branches: Mapping[str, Tokens] = field(default_factory=dict)
    scales: Scales = field(default_factory=dict)
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Mapping[str, Tensor] = field(default_factory=dict)


def merge_parts(*parts: ConditioningParts) -> Conditioning:
    """Merge parts into one Conditioning."""
    return Conditioning(
        {name: each for part in parts for name, each in part.branches.items()},
        {name: each for part in parts for name, each in part.scales.items()},
        {name: each for part in parts for name, each in part.regions.items()},
        {name: each for part in parts for name, each in part.groups.items()},
    )


def bind_arguments(
    call: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], ours: Collection[str] = ()
) -> dict[str, Any]:
    """Return a stock call's positional and keyword arguments, all by name.

    `ours` are the names of our own arguments, which error sentences may suggest. Raises ConfigError for an unknown
    argument.
    """
    signature = inspect.signature(call)
    known = [name for name, each in signature.parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {*known, *(DEPRECATED if len(known) < len(signature.parameters) else ())}
    for name in options:
        if name in IMAGINE_PIPELINE_ONLY:
            raise ConfigError(
                f"Stock pipelines of diffusers take no {name}, which only ImaginePipeline has: leave it out."
            )
        if name not in taken:  # stock calls with **kwargs would silently ignore it
            near = difflib.get_close_matches(name, [*known, *ours], n=1)
            raise ConfigError(f"This pipeline takes no {name!r}{f'; is it {near[0]}?' if near else ': leave it out.'}")
    return by_name(call, arguments, options)


def by_name(call: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name. Raises ConfigError if they do not fit its signature."""
    signature = inspect.signature(call)
    try:
        named = dict(signature.bind(*arguments, **options).arguments)
    except TypeError as error:
        raise ConfigError(f"These arguments do not fit {call.__name__}: {error}.") from error
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def like_stock(ours: Any, stock: Any) -> Any:
    """Return our method with the signature, annotations and documentation of the stock method that it replaces.

    Our own keyword-only arguments follow those of the stock method. User interfaces, editors and diffusers' tools read
    the signature.
    """

    @functools.wraps(ours)
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        return ours(self, *arguments, **options)

    kinds = inspect.Parameter
    signature, more = inspect.signature(stock), inspect.signature(ours).parameters.values()
    parameters = list(signature.parameters.values())
    last = [parameters.pop()] if parameters[-1].kind is kinds.VAR_KEYWORD else []
    parameters += [each for each in more if each.kind is kinds.KEYWORD_ONLY]
    cast(Any, method).__signature__ = signature.replace(parameters=[*parameters, *last])
    method.__annotations__ = {**typing.get_type_hints(stock), **ours.__annotations__}
    method.__doc__ = f"{inspect.getdoc(ours)}\n\nThe stock method:\n\n{inspect.getdoc(stock)}"
    return method


def read_call(pipe: Any, call: Any, given: dict[str, Any], reference: Any) -> tuple[Batch, list[Request]]:
    """Return the batch that the stock call will draw, and one request per prompt.

    If a prompt has placeholders for people, `given` is updated with plain words in their place.
    """
    requests = read_prompts(given, reference)
    # The stock property that tells whether guidance is on reads this attribute, which the stock call sets only later.
    pipe._guidance_scale = given.get("guidance_scale", inspect.signature(call).parameters["guidance_scale"].default)
    return Batch(
        len(requests), given.get("num_images_per_prompt") or 1, bool(pipe.do_classifier_free_guidance)
    ), requests


def read_prompts(given: dict[str, Any], reference: Any) -> list[Request]:
    """Return one request per prompt of a call; `given` is updated with plain words for placeholders of people."""
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    if prompt is None:  # without sentences there are no names, so all people are shown
        count = 0 if embeds is None else len(embeds)
        return _requests("" if count == 1 else [""] * count, reference)
    requests = _requests(prompt, reference)
    if reference is not None:
        for name in ("prompt", "prompt_2", "prompt_3"):
            if given.get(name) is not None:
                given[name] = _plain(given[name], requests)
    return requests


def _requests(prompt: Any, reference: Any) -> list[Request]:
    """Return one request per prompt. Unlike `read_requests`, this accepts no prompts and no reference."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if reference is None:
        return [Request(each) for each in prompts]
    return read_requests(prompt if isinstance(prompt, str) else prompts, reference, blank=True)


def _plain(prompt: Any, requests: Sequence[Request]) -> Any:
    """Return a prompt or a list of prompts with plain words for the names of the requests' people."""
    if isinstance(prompt, str):
        return _in_words_of(requests[0], prompt)
    return [_in_words_of(request, each) for request, each in zip(requests, prompt, strict=False)]


def _in_words_of(request: Request, prompt: str) -> str:
    names = [person.name for person in request.people]
    return in_plain_words(prompt, names) if any(names) else prompt


class ConditioningUpdater:
    """Keeps the Conditioning current in the dict that the stock pipeline passes to the denoiser at every step.

    `record` returns the Conditioning for all rows of the initial batch, with (True) or without (False) the references.
    `window` gives the steps in which the references act.
    """

    def __init__(
        self,
        pipe: Any,
        batch: Batch,
        kwargs: dict[str, Any],
        record: Callable[[bool], Conditioning],
        window: Window = Window(),  # noqa: B008  (it is immutable)
    ) -> None:
        self.pipe, self.batch, self.kwargs, self.record, self.window = pipe, batch, kwargs, record, window
        self._scales = pipe.ip_scales
        self._reference_active = window.contains(0.0)
        self._prepare()

    def _prepare(self) -> None:
        record = self.record(self._reference_active)
        if self.guidance_ended:
            record = last_rows(record, self.batch.pictures)
        self.kwargs["conditioning"] = prepare(self.pipe.denoiser, record)

    @property
    def guidance_ended(self) -> bool:
        """Whether guidance was on at the start of the call and is now off."""
        return self.batch.guided and not self.pipe.do_classifier_free_guidance

    def wrap_callback(self, given: dict[str, Any]) -> None:
        """Wrap the call's callback, if any, to detect its changes and to count steps for the window."""
        callback: Callable[..., Any] | None = given.get("callback_on_step_end")
        if callback is None and self.window == Window():
            return
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            before = self.guidance_ended, self._reference_active
            changed = {} if callback is None else callback(pipe, step, timestep, tensors)
            self._reference_active = self.window.contains((step + 1) / self.pipe.num_timesteps)
            if (self.guidance_ended, self._reference_active) != before or self.pipe.ip_scales is not self._scales:
                self._scales = self.pipe.ip_scales
                self._prepare()
            return changed

        given["callback_on_step_end"] = on_step_end


def last_rows(record: Conditioning, count: int) -> Conditioning:
    """Return the last `count` rows of a conditioning: the positive half of a guided batch."""

    def scale(each: Any) -> Any:
        return each[-count:] if isinstance(each, Tensor) and each.dim() else each

    branches = {name: take(each, slice(-count, None)) for name, each in record.branches.items()}
    scales = {
        name: {layer: scale(one) for layer, one in each.items()} if isinstance(each, Mapping) else scale(each)
        for name, each in record.scales.items()
    }
    regions = {name: each[-count:] for name, each in record.regions.items()}
    groups = {name: each[-count:] for name, each in record.groups.items()}
    return Conditioning(branches, cast(Any, scales), regions, groups, record.record)


def tokens_to(tokens: Tokens, device: torch.device, dtype: torch.dtype) -> Tokens:
    """Move tokens to a device and convert their values to a dtype."""
    mask = None if tokens.mask is None else tokens.mask.to(device)
    return Tokens(tokens.values.to(device, dtype), mask)
