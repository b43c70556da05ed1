"""Stop a picture that is not finite before it is returned or written, with the name of the part that caused it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from imagine.errors import WeightsError
from imagine.networks.finite import is_finite, why_not_finite

Parts = Callable[[], Mapping[str, Any]]  # returns the components by name, in the order in which they are suspected


class NotFiniteError(WeightsError):
    """Raised when a decoded picture holds a number that is not finite."""


def check_picture(pictures: Any, parts: Parts) -> None:
    """Raise NotFiniteError, which names the part that caused it, if a tensor of pictures or latents is not finite."""
    if isinstance(pictures, Tensor) and not is_finite(pictures):
        raise NotFiniteError(why_not_finite(parts()))


class FiniteImageProcessor(VaeImageProcessor):
    """diffusers' processor of decoded pictures, which refuses those that are not finite instead of drawing black."""

    def postprocess(self, image: Any, *arguments: Any, **options: Any) -> Any:
        """Convert decoded pictures to the wanted type. Raises NotFiniteError."""
        check_picture(image, dict)
        return super().postprocess(image, *arguments, **options)


def naming_the_part(draw: Callable[..., Any], parts: Parts) -> Callable[..., Any]:
    """Return a stock pipeline's call whose NotFiniteError names the part that caused it."""

    @functools.wraps(draw)
    def checked(*arguments: Any, **options: Any) -> Any:
        try:
            out = draw(*arguments, **options)
        except NotFiniteError as error:
            raise NotFiniteError(why_not_finite(parts())) from error
        check_picture(getattr(out, "images", None), parts)  # latents, which no processor has seen
        return out

    return checked
