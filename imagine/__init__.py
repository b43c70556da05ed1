"""From one photo of a person and a sentence to a new picture of that person.

    from imagine import ImaginePipeline
    pipe = ImaginePipeline.from_pretrained()
    pipe("smiling, on a beach, as a pencil sketch", reference="photo.jpg").images[0].save("out.png")

The public names are imported when they are first used, so that `import imagine` and `imagine --help` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from imagine import stock as stock  # registers diffusers' pipelines as bases; imports none of them

if TYPE_CHECKING:
    from imagine.people.persona import Persona as Persona
    from imagine.pipeline.pipeline import ImaginePipeline as ImaginePipeline

__version__ = "0.1.0"
__all__ = ["ImaginePipeline", "Persona", "__version__"]

_HOMES = {"ImaginePipeline": "imagine.pipeline.pipeline", "Persona": "imagine.people.persona"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'imagine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
