"""Make a new picture of a person from one photo and a sentence.

    from imagine import ImaginePipeline
    pipe = ImaginePipeline.from_pretrained()
    pipe("smiling, on a beach, as a pencil sketch", reference="photo.jpg").images[0].save("out.png")

The public names are imported on first use, so that `import imagine` and `imagine --help` stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Both register pipelines of diffusers as bases, without importing them.
from imagine import stock as stock
from imagine import transformer_bases as transformer_bases
from imagine.paths import VERSION

if TYPE_CHECKING:
    from imagine.bases.opening import open_base as open_base
    from imagine.people.persona import Persona as Persona
    from imagine.pipeline.pipeline import ImaginePipeline as ImaginePipeline

__version__ = VERSION
__all__ = ["ImaginePipeline", "Persona", "__version__", "open_base"]

_MODULES = {
    "ImaginePipeline": "imagine.pipeline.pipeline",
    "Persona": "imagine.people.persona",
    "open_base": "imagine.bases.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'imagine' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
