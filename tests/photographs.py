"""Photographs of real people for tests: one that scikit-image carries, and portraits of a source distribution.

`face-recognition` 1.3.0 publishes portraits with its tests, which are read from its unpacked source distribution if the
environment variable IMAGINE_TEST_PORTRAITS names that folder; they are not part of this repository.
"""

import importlib
import os
from pathlib import Path

from PIL import Image

PORTRAITS = os.environ.get("IMAGINE_TEST_PORTRAITS", "")


def astronaut() -> Image.Image:
    """Return NASA's portrait of Eileen Collins, (512, 512); her face is near (171, 69), 103 pixels wide."""
    return Image.fromarray(importlib.import_module("skimage.data").astronaut())


def portraits() -> dict[str, Path]:
    """Return the portraits of face-recognition by name, or nothing if they are not on this machine."""
    return {path.stem: path for path in sorted(Path(PORTRAITS).rglob("*.jpg"))} if PORTRAITS else {}
