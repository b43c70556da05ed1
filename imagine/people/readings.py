"""What a branch reads of a photo: which output of which network, from which crop.

    tokens            the vision encoder's penultimate tokens              (tokens, width)
    pooled            its pooled embedding                                 (1, width)
    face              a face recogniser's embedding, of length 1           (1, width): FaceID
    raw face          the same as the network returns it                   (1, width): InstantID
    face and tokens   a face's embedding, padded with zeros, and the tokens (1 + tokens, widest): FaceID Plus

A persona keeps the features of each reading under its key, so that it is refused wherever it does not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.errors import WeightsError
from imagine.people.crops import CropKind
from imagine.records import VISION, FaceBox

Output = Literal["tokens", "pooled", "face", "raw face", "face and tokens"]
LAYER, FACE_LAYER, CROP = "feature_layer", "face embedding", "crop"  # keys and a value of an adapter's metadata
FACE_SIDE = 224  # pixels of the aligned face that is reported where no vision encoder reads one


class FaceEmbedder(Protocol):
    """A face recogniser whose embeddings an adapter reads."""

    @property
    def name(self) -> str:
        """Return the name of the network; personas of another one are refused."""
        ...

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        """Return the embedding of a face of an upright RGB picture, as the network returns it."""
        ...


@dataclass(frozen=True)
class Reading:
    """One output of one network, from one crop of a photo."""

    output: Output = "tokens"
    crop: CropKind = "masked"

    @classmethod
    def of(cls, spec: BranchSpec, metadata: Mapping[str, str]) -> "Reading":
        """Return what a branch with this description reads; its adapter's metadata name the crop."""
        outputs: dict[str, Output] = {"linear": "pooled", "faceid": "face", "faceid-plus": "face and tokens"}
        output = outputs.get(spec.projection or "", "tokens")
        if spec.projection == "plus" and metadata.get(LAYER) == FACE_LAYER:
            output = "raw face"
        return cls(output, cast(CropKind, metadata.get(CROP, "masked")))

    @property
    def reads_face(self) -> bool:
        """Whether a face recogniser is needed."""
        return "face" in self.output

    @property
    def reads_encoder(self) -> bool:
        """Whether a vision encoder is needed."""
        return self.output in ("tokens", "pooled", "face and tokens")

    def key(self, fingerprint: str, recogniser: str) -> str:
        """Return the key of the features in a persona: the networks, and after a colon the output and the crop."""
        recogniser = recogniser.replace("-", "_").replace(":", "_")  # fingerprints use both signs
        if not self.reads_encoder:
            return f"{recogniser}:{self.output}"
        more: list[str] = [] if self.crop == "masked" else [self.crop]
        more = [recogniser, *more] if self.reads_face else more
        names = ([] if self.output == "tokens" else [self.output]) + more
        return f"{fingerprint}:{', '.join(names)}" if names else fingerprint

    def length(self, tokens: int) -> int:
        """Return the number of rows of one photo's features. tokens: of the vision encoder."""
        return {"tokens": tokens, "face and tokens": 1 + tokens}.get(self.output, 1)

    def zeros(self, spec: BranchSpec, zero_picture: Tensor | None) -> Tensor:
        """Return the features (length, width) of nobody: a zero embedding, or the tokens of a picture of zeros."""
        if not self.reads_encoder or self.output == "pooled":
            return torch.zeros(1, spec.feature_width)
        assert zero_picture is not None
        return with_embedding(torch.zeros(spec.face_width or 1), zero_picture) if self.reads_face else zero_picture


@dataclass(frozen=True)
class Reader:
    """A branch that shows the people of references: its adapter, and its name there."""

    adapter: Adapter
    branch: str = VISION

    @property
    def spec(self) -> BranchSpec:
        """The description of the branch."""
        return next(spec for spec in self.adapter.branch_specs if spec.name == self.branch)

    @property
    def reading(self) -> Reading:
        """What the branch reads of a photo."""
        return Reading.of(self.spec, self.adapter.metadata)


def with_embedding(embedding: Tensor, tokens: Tensor) -> Tensor:
    """Return the features of FaceID Plus, (1 + length, widest): an embedding (width,) above tokens (length, width)."""
    width = max(len(embedding), tokens.shape[1])
    features = tokens.new_zeros(1 + len(tokens), width)
    features[0, : len(embedding)] = embedding
    features[1:, : tokens.shape[1]] = tokens
    return features


def face_embedding(embedder: FaceEmbedder, image: Image.Image, face: FaceBox | None, spec_width: int | None) -> Tensor:
    """Return a face's embedding (width,) in float32; `spec_width` is the width that the adapter reads.

    Raises WeightsError if the recogniser's width is another one, or if no face was found.
    """
    if face is None:
        raise WeightsError(
            "This adapter reads the embedding of a face, and no face was found in the photo: give another photo."
        )
    found = torch.from_numpy(np.asarray(embedder.embed(image, face), np.float32)).flatten()
    if spec_width is not None and len(found) != spec_width:
        raise WeightsError(
            f"This adapter reads face embeddings of width {spec_width}, but the recogniser {embedder.name} gives "
            f"{len(found)}: set pipe.face_recogniser to the one that it was trained with."
        )
    return found
