"""The portrait world: a procedural generator of stylised people with exact ground truth.

    seeds -> people.py (identity), contexts.py (context), groups.py (arrangement of several people)
        -> render.py (pictures, masks, boxes, landmarks)
        -> captions.py and group_captions.py (sentences), attributes

Identity and context are sampled independently; everything is a pure function of integer seeds.
"""

from imagine.world.captions import attributes, captions
from imagine.world.contexts import Contexts, give_words, sample_contexts
from imagine.world.group_captions import group_captions
from imagine.world.groups import Groups, canvas_shape, sample_groups
from imagine.world.people import People, drift, sample_people
from imagine.world.render import Renders, render, render_groups
from imagine.world.styles import camera_noise

VERSION = "portrait-world-2"  # changes whenever a seed gives another picture

__all__ = [
    "VERSION",
    "Contexts",
    "Groups",
    "People",
    "Renders",
    "attributes",
    "camera_noise",
    "canvas_shape",
    "captions",
    "drift",
    "give_words",
    "group_captions",
    "render",
    "render_groups",
    "sample_contexts",
    "sample_groups",
    "sample_people",
]
