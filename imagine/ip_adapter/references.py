"""What public IP-Adapters read of a photo, as far as the name and layout of a file tell.

Plus and Plus Face share one layout; only their training data differ. The authors say how those were made:
https://github.com/tencent-ailab/IP-Adapter/issues/54 (aligned face crops), /issues/182 (Full Face: without background),
/issues/180 (Plus Face), and the model card of h94/IP-Adapter-FaceID (aligned crops; v2 adds the shortcut).
"""

import re

from imagine.ip_adapter.layout import Layout
from imagine.people.crops import CropKind

FACE_LICENCE = (
    "It reads the embeddings of a face recogniser; the public files of this kind, and InsightFace's recognisers, are "
    "for non-commercial research only (imagine licences)."
)
_SECOND_VERSION = re.compile(r"plus[-_]?v2", re.IGNORECASE)


def crop_of(layout: Layout, name: str) -> CropKind:
    """Return the part of a photo that an adapter was trained with. `name` is its file's name, or any other text."""
    if layout.face_width is not None:
        return "aligned"
    if "face" not in name.lower():
        return "picture"
    return "aligned-masked" if layout.kind == "full" else "aligned"


def has_shortcut(name: str) -> bool:
    """Return whether a FaceID Plus file is of its second version, which differs only in its file's name."""
    return _SECOND_VERSION.search(name) is not None
