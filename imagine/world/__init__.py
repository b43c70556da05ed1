"""The portrait world: a procedural generator of stylised people with exact ground truth.

    seeds -> people.py (identity), contexts.py (context)  ->  render.py (pictures, masks, boxes, landmarks)
                                                          ->  captions.py (sentences), attributes

Identity and context are sampled independently; everything is a pure function of integer seeds.
"""

from imagine.world.captions import attributes, captions
from imagine.world.contexts import Contexts, sample_contexts
from imagine.world.people import People, drift, sample_people
from imagine.world.render import Renders, render, render_groups
from imagine.world.styles import camera_noise

__all__ = [
    "Contexts",
    "People",
    "Renders",
    "attributes",
    "camera_noise",
    "captions",
    "drift",
    "render",
    "render_groups",
    "sample_contexts",
    "sample_people",
]
