"""The branches of a stock pipeline that show people: which of them read the references, and what each row attends to.

The identity adapter reads the references. Without one, the IP-Adapters do, as far as the call gives them no image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.ip_adapter.loading import IPAdapterLoaderMixin
from imagine.people.persona import Persona
from imagine.people.readings import Reader
from imagine.people.reference_encoder import ReferenceEncoderMixin, identity_spec
from imagine.pipeline.controls import Factors
from imagine.records import VISION
from imagine.request import Request
from imagine.stock.call import Batch, ConditioningParts
from imagine.stock.people import region_rows


class IdentityBranchesMixin(IPAdapterLoaderMixin, ReferenceEncoderMixin):
    """Pipeline mixin that computes the branches of the identity adapter and of IP-Adapters for one call."""

    def _readers(self) -> list[Reader]:
        """Return the branches that read the references: the identity adapter's, else those of all IP-Adapters."""
        return super()._readers() or [
            Reader(adapter, f"ip_{number}") for number, adapter in enumerate(self.ip_adapters)
        ]

    @property
    def shows_references(self) -> bool:
        """Whether an adapter that shows the people of references is loaded."""
        return bool(self._readers())

    def _reference_readers(self, given: Mapping[str, Any], requests: Sequence[Request]) -> list[Reader]:
        """Return the branches that show the call's people. Raises ConfigError if images leave none of them.

        Without an identity adapter these are the IP-Adapters for which the call gives no image.
        """
        readers = self._readers() if any(request.people for request in requests) else []
        if identity_spec(self.adapter) is not None:
            return readers
        images, embeds = given.get("ip_adapter_image"), given.get("ip_adapter_image_embeds")
        images = embeds if images is None else images
        if images is None or not readers:
            return readers
        listed = isinstance(images, (list, tuple)) and len(images) == len(readers)
        free = [reader for reader, image in zip(readers, images, strict=True) if image is None] if listed else []
        if not free:
            raise ConfigError(
                "The call gives an image for every IP-Adapter, so that none is left to show the reference: leave out "
                "the reference, or give a list with None for each IP-Adapter that shows it."
            )
        return free

    def _identity_parts(
        self, reader: Reader, personas: Sequence[Sequence[Persona]], scale: Any, factors: Factors | None, batch: Batch,
        regions: Tensor | None = None,
    ) -> Callable[[], ConditioningParts]:  # fmt: skip
        """Return a function that builds a branch that shows people, for all rows; empty parts if no person is shown.

        It is called again when a callback sets new scales of IP-Adapters.
        """
        spec, tokens = reader.spec, self._vision_tokens(personas, 1, reader)
        if tokens is None:
            return ConditioningParts
        absent = spec.absent == "zeros"

        def rows(each: Any) -> Tensor:
            strength = self._identity_strength(each, personas, batch.copies)
            return torch.cat([strength * absent, strength]) if batch.guided else strength

        strength = {name: rows(each) for name, each in scale.items()} if isinstance(scale, Mapping) else rows(scale)
        if factors is not None:
            by_layer: Mapping[str, Any] = strength if isinstance(strength, dict) else dict.fromkeys(factors, strength)
            strength = {name: by_layer[name] * factor for name, factor in factors.items() if name in by_layer}
        absent_tokens = self._absent_tokens(batch.prompts, reader) if absent and batch.guided else None
        groups = self._vision_groups(personas, 1, reader)
        placed_rows, name = region_rows(regions, batch, absent_tokens is not None), reader.branch
        separate = {} if groups is None else {name: batch.group_rows(groups, absent_tokens is not None)}
        placed = {} if placed_rows is None else {name: placed_rows}
        tokens_here = {name: batch.rows(tokens, absent_tokens)}

        def parts() -> ConditioningParts:
            scales = {name: self._with_ip_scale(reader, strength)}
            return ConditioningParts(tokens_here, scales, placed, separate)

        return parts

    def _with_ip_scale(self, reader: Reader, strength: Any) -> Any:
        """Return a branch's strength, multiplied by its IP-Adapter's scale if it belongs to one."""
        if reader.branch == VISION:
            return strength
        scale = self._ip_scale(self.ip_adapters.index(reader.adapter))
        if isinstance(scale, (list, tuple)):
            raise ConfigError(
                "set_ip_adapter_scale gave a scale for each image, but the IP-Adapter shows a reference: give one "
                "scale."
            )
        if not isinstance(scale, Mapping):
            return (
                {layer: each * scale for layer, each in strength.items()}
                if isinstance(strength, dict)
                else (strength * scale)
            )
        by_layer = strength if isinstance(strength, dict) else dict.fromkeys(scale, strength)
        return {layer: by_layer[layer] * each for layer, each in scale.items() if layer in by_layer}

    def _ip_adapter_parts(
        self, images: Any, embeds: Any, masks: Any, batch: Batch, reading: Sequence[int] = ()
    ) -> Callable[[], ConditioningParts]:
        """Return a function that builds the branches of the IP-Adapters that show images.

        reading: numbers of the IP-Adapters that show the reference.

        It is called again when a callback sets new scales; the images' features are computed only once.
        """
        if masks is not None and reading:
            raise ConfigError("ip_adapter_masks do not place the people of a reference: give layout= instead.")
        if images is None and embeds is None:
            return ConditioningParts
        features = self._ip_features(images, embeds, batch.guided, reading)
        return lambda: ConditioningParts(
            *self.ip_conditioning(None, features, masks, batch.prompts, batch.copies, batch.guided, reading)
        )
