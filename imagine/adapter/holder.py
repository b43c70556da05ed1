"""A pipeline mixin that keeps adapters on the pipeline's denoiser while either of them is replaced.

Assigning `pipe.unet` is how users of diffusers exchange a denoiser, for example for a distilled one. The adapters then
move to the new denoiser. An adapter that does not fit it is removed from the pipeline, with a warning.
"""

import warnings
import weakref
from abc import abstractmethod
from typing import Any, Literal

from torch import nn

from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError, WeightsError

Place = Literal["adapter", "text_adapter"]

# The pipelines that use a denoiser: several may share one, with its adapters, and one of them may exchange it.
_pipelines: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[AdapterHolderMixin]]" = weakref.WeakKeyDictionary()


class AdapterHolderMixin:
    """Attaches a pipeline's adapters to its denoiser, and moves them when another denoiser is assigned."""

    unet: Any
    denoiser_name = "unet"  # the component that is the denoiser
    text_adapter: Adapter | None = None
    adapter: Adapter | None = None

    @property
    def denoiser(self) -> Any:
        """The denoiser without the wrapper of torch.compile; None if the pipeline was made without one."""
        denoiser = vars(self).get(self.denoiser_name)
        return getattr(denoiser, "_orig_mod", denoiser)

    @abstractmethod
    def _adapters(self) -> list[Adapter]:
        """Return all adapters of the pipeline; implemented by the pipeline."""

    def _remove_adapter(self, adapter: Adapter) -> None:
        """Remove an adapter from the pipeline's attributes; it is no longer on the denoiser."""
        for place in ("text_adapter", "adapter"):
            if getattr(self, place) is adapter:
                setattr(self, place, None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != self.denoiser_name:
            return super().__setattr__(name, value)
        before = self.denoiser
        super().__setattr__(name, value)
        if self.denoiser is not before:
            self._move_adapters(before)
        return None

    def _move_adapters(self, before: Any) -> None:
        """Move the adapters from the denoiser `before` to the new one; either may be None."""
        after = self.denoiser
        if before is not None and before in _pipelines:
            _pipelines[before].discard(self)
        if after is not None:
            _pipelines.setdefault(after, weakref.WeakSet()).add(self)
        for adapter in self._adapters():
            if before is not None and not any(adapter in each._adapters() for each in _pipelines.get(before, ())):
                adapter.release(before)
            try:
                if after is not None and not adapter.is_attached(after):
                    adapter.attach(after)
                    if after.device.type != "meta":  # where layers are offloaded one by one, the call moves adapters
                        adapter.to(after.device, after.dtype)
            except WeightsError as error:
                self._remove_adapter(adapter)
                branches = " and ".join(repr(spec.name) for spec in adapter.branch_specs)
                warnings.warn(
                    f"The adapter with {branches} was removed from the pipeline, because it cannot be attached to the "
                    f"new denoiser: {error}",
                    stacklevel=3,
                )

    def _require_denoiser(self) -> Any:
        """Return the denoiser. Raises ConfigError if the pipeline was made without one."""
        if self.denoiser is None:
            name = self.denoiser_name
            raise ConfigError(
                f"This pipeline was made without a {name}: make a whole one with from_pipe(pipe, {name}=...)."
            )
        return self.denoiser

    def _check_can_draw(self, *needed: str) -> None:
        """Raise ConfigError if one of the needed components is absent, as in a pipeline that only encodes."""
        if absent := [name for name in needed if getattr(self, name) is None]:
            raise ConfigError(
                f"This pipeline was made without {' and '.join(absent)}, so it can encode prompts and photos but not "
                f"draw: give their results to a whole pipeline, or make one with from_pipe(pipe, {absent[0]}=...)."
            )

    def _replace_adapter(self, place: Place, adapter: Adapter) -> None:
        """Attach an adapter in place of the present one. If it cannot be attached, the present one stays."""
        denoiser, previous = self._require_denoiser(), getattr(self, place)
        was_attached = previous is not None and previous.is_attached(denoiser)
        if previous is adapter and was_attached:
            return
        if previous is not None:
            previous.release(denoiser)
        try:
            if not adapter.is_attached(denoiser):
                adapter.release(denoiser)  # other code may have removed it from some of the layers
                adapter.attach(denoiser)
        except WeightsError:
            if was_attached:
                previous.attach(denoiser)
            raise
        setattr(self, place, adapter)

    def unload_adapter(self, name: Place = "adapter") -> Adapter | None:
        """Detach an adapter, which restores the base exactly. Return the adapter, or None if there was none."""
        adapter: Adapter | None = getattr(self, name)
        if adapter is not None:
            if self.denoiser is not None:
                adapter.release(self.denoiser)
            setattr(self, name, None)
        return adapter
