"""The judge: small networks that recognise the person in a picture and classify what the picture shows.

They are trained on renders of people from a separate range of seeds (never those of the generator's training) and
measure the pictures that the pipeline draws. `Recogniser` turns a masked face crop into a unit vector; the angle
between two vectors measures whether two pictures show the same person. `Reader` classifies the context of a whole
picture (expression, scene, letters ...) and, for diagnosis, the identity traits. `imagine.evaluation.evaluate` and the
demo call `Judge`, which holds both, and a second recogniser if the weights have one: a network of another architecture
that is trained on other people, to see how far a result depends on the recogniser.

Recogniser and reader share one residual body that is cheap on a CPU in float32: it uses an early stride, and
bottlenecks of ordinary 3x3 convolutions, because depthwise convolutions are slow on a CPU. GroupNorm computes the same
function in training and in inference, so an average of the weights needs no average of batch statistics. Vocabularies
are passed as plain mappings and saved with the weights, so that a saved reader keeps the words of its training even if
the vocabulary of the world changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from imagine.networks.recogniser import (
    AnyRecogniser,
    Backbone,
    Recogniser,
    load_network,
    load_recogniser,
    save_network,
)
from imagine.networks.weights import default_folder, fingerprint
from imagine.people.faces import FaceFinder, LearnedFinder, crop_faces

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_SLOTS = 3
SECOND = "second"  # the name of the second recogniser among the others
IGNORED = -100  # the class of an attribute without a label: it adds no loss, as in torch's cross_entropy
PRIOR_BOX = (0.3, 0.274, 0.4, 0.416)  # left, top, width, height of a typical face, as shares of the picture

Vocabulary = Mapping[str, Sequence[str]]
Embedder = Callable[[Tensor, Tensor], Tensor]  # pictures and boxes -> embeddings
FaceBoxes = Callable[[Tensor], Tensor]  # pictures (N, 3, H, W) in 0..1 -> boxes (N, 4): left, top, width, height in px


def margin_loss(embeddings: Tensor, labels: Tensor, prototypes: Tensor, scale: float, margin: float) -> Tensor:
    """Return CosFace's large-margin loss (arXiv 1801.09414, eq. 4) for each sample, (B,).

    Embeddings (B, D) and prototypes (C, D) are compared by cosine, so their lengths do not matter; labels (B,) are the
    indices of the samples' prototypes. -log( e^{s(cos_y - m)} / (e^{s(cos_y - m)} + sum_{j != y} e^{s cos_j}) ).
    """
    cosines = F.normalize(embeddings, dim=-1) @ F.normalize(prototypes, dim=-1).T
    margins = margin * F.one_hot(labels, len(prototypes)).to(cosines.dtype)
    return F.cross_entropy(scale * (cosines - margins), labels, reduction="none")


class Reader(nn.Module):
    """Classify whole pictures: (B, 3, size, size) in 0..1 -> logits per attribute; about 130 MFLOP at the defaults.

    `attributes` (context) and `traits` (identity, for diagnosis) map the name of each classification head to its words.
    The attribute "letters" needs no words: a separate head reads up to three characters, each one of 27 classes (none,
    A to Z), from the finer feature maps, at any place on the shirt. Raises ValueError if a name is in both mappings.
    """

    def __init__(
        self,
        attributes: Vocabulary,
        traits: Vocabulary | None = None,
        size: int = 128,
        widths: Sequence[int] = (24, 48, 80, 128, 128),
        blocks: int = 1,
        hidden: int = 192,
    ) -> None:
        super().__init__()
        traits = traits or {}
        if shared := sorted(set(attributes) & set(traits)):
            raise ValueError(f"{shared} are both attributes and traits: remove them from one of the two.")
        self.attributes = {name: tuple(words) for name, words in attributes.items()}
        self.traits = {name: tuple(words) for name, words in traits.items()}
        self.config: dict[str, Any] = {
            "attributes": {name: list(words) for name, words in self.attributes.items()},
            "traits": {name: list(words) for name, words in self.traits.items()},
            "size": size, "widths": list(widths), "blocks": blocks, "hidden": hidden,
        }  # fmt: skip
        self.size = size
        self.body = Backbone(widths, stem_stride=2, blocks=blocks)
        cells = (size >> len(widths)) ** 2
        thin = nn.Conv2d(widths[-1], widths[-1] // 2, 1)  # flattening keeps positions, at an affordable width
        self.trunk = nn.Sequential(thin, nn.Flatten(), nn.Linear(widths[-1] // 2 * cells, hidden), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, len(words)) for name, words in self.vocabulary.items()})
        self.letters = LettersHead(widths[1], widths[2]) if "letters" in self.attributes else None

    @property
    def vocabulary(self) -> dict[str, tuple[str, ...]]:
        """Return the words of every head except the letters' head, context attributes first."""
        return {name: words for name, words in {**self.attributes, **self.traits}.items() if name != "letters"}

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return logits: name -> (B, words), and "letters" -> (B, 3, 27)."""
        return self.look(pictures)[0]

    def look(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the logits of `forward`, and the features (B, hidden) that the heads classify."""
        maps = self.body(pictures)
        h = self.trunk(maps[-1])
        logits = {name: head(h) for name, head in self.heads.items()}
        if self.letters is not None:
            logits["letters"] = self.letters(maps[0], maps[1])
        return logits, h

    def trait_vector(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Return the probabilities of all identity traits as one unit vector per picture, (B, words of all traits).

        It recognises people by other means than `Recogniser`: a network with another task, which sees whole pictures.
        The reader must have been trained with traits.
        """
        probabilities = [logits[name].softmax(-1) for name in self.traits if name in logits]
        return F.normalize(torch.cat(probabilities, -1), dim=-1)

    def targets(self, labels: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Return the class indices of true attributes, for `reading_loss`; a missing attribute is IGNORED."""
        classes = {
            name: torch.tensor([_class(words, label.get(name)) for label in labels])
            for name, words in self.vocabulary.items()
        }
        if self.letters is not None:
            classes["letters"] = torch.tensor([_letter_classes(label.get("letters")) for label in labels])
        return classes

    def words(self, logits: Mapping[str, Tensor]) -> list[dict[str, str]]:
        """Return the most likely word of every head, per picture; letters are one upper-case string, empty for none."""
        names = list(self.vocabulary)
        numbers = {name: logits[name].argmax(-1).tolist() for name in names}
        count = len(next(iter(logits.values())))
        read = [{name: self.vocabulary[name][numbers[name][i]] for name in names} for i in range(count)]
        if self.letters is not None:
            for row, slots in zip(read, logits["letters"].argmax(-1).tolist(), strict=True):
                row["letters"] = "".join(LETTERS[number - 1] for number in slots if number)
        return read

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        save_network(self, folder, dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "Reader":
        """Load the network saved in `folder`, in float32 and eval mode. Raises WeightsError if the files do not fit."""
        return load_network(cls, folder)


class LettersHead(nn.Module):
    """Read up to three characters: each slot attends to a place in the finest map, and all share one classifier."""

    def __init__(self, fine_width: int, coarse_width: int, hidden: int = 64) -> None:
        super().__init__()
        self.fine = nn.Conv2d(fine_width, hidden, 3, padding=1)
        self.coarse = nn.Conv2d(coarse_width, hidden, 1)
        self.shape = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.place = nn.Conv2d(hidden, LETTER_SLOTS, 5, padding=2)
        self.out = nn.Linear(hidden, len(LETTERS) + 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Maps (B, fine_width, s, s) and (B, coarse_width, s/2, s/2) -> logits (B, 3, 27)."""
        around = F.interpolate(self.coarse(coarse), size=fine.shape[-2:], mode="nearest")
        h = F.relu(self.fine(fine) + around)
        attention = self.place(h).flatten(2).softmax(-1)  # (B, 3, s * s)
        shapes = F.relu(self.shape(h)).flatten(2)  # (B, hidden, s * s)
        return cast(Tensor, self.out(attention @ shapes.transpose(1, 2)))


def reading_loss(logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the cross-entropy per head and sample, name -> (B,); for letters, the mean over their three slots.

    `targets` comes from `Reader.targets`; an IGNORED entry has zero loss.
    """
    losses = {}
    for name, target in targets.items():
        scores = logits[name].transpose(1, -1)  # cross_entropy takes the classes in dimension 1
        loss = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="none")
        losses[name] = loss.flatten(1).mean(1) if loss.ndim > 1 else loss
    return losses


@dataclass(frozen=True)
class Seen:
    """What the judge's networks say about a batch of pictures."""

    embeddings: Tensor  # (N, D), unit length, of the recogniser
    read: list[dict[str, str]]  # attribute or trait -> word
    others: dict[str, Tensor]  # (N, D), unit length: "traits" is `Reader.trait_vector`, then further recognisers
    features: Tensor  # (N, F), of the reader
    faces: Tensor  # (N,), whether a face was found


class CropRecogniser:
    """A recogniser of face crops as a function from pictures (N, 3, H, W) in 0..1 and boxes (N, 4) to embeddings."""

    def __init__(self, network: AnyRecogniser) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, images: Tensor, boxes: Tensor) -> Tensor:
        return cast(Tensor, self.network(crop_faces(images, boxes, self.network.size)))


class Judge:
    """The recogniser and the reader, with a function that finds the face in pictures without a box.

    `find_boxes` is any function from pictures to one box each (`boxes_by` makes one from a face finder). Without it,
    every picture gets the prior box, the typical place of a face in this world. `finder` finds all faces in pictures of
    several people, which cannot be judged without it. `second` is a recogniser of another architecture and training,
    named "second" in the results. `others` are further recognisers, each a function from pictures (N, 3, H, W) in 0..1
    and boxes (N, 4) to embeddings (N, D), whose lengths do not matter.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        reader: Reader,
        find_boxes: FaceBoxes | None = None,
        finder: FaceFinder | None = None,
        others: "Mapping[str, Embedder] | None" = None,
        second: AnyRecogniser | None = None,
    ) -> None:
        self.second = second
        self.others: dict[str, Embedder] = {} if second is None else {SECOND: CropRecogniser(second)}
        self.others |= others or {}
        self.recogniser = recogniser.eval().requires_grad_(False)
        self.reader = reader.eval().requires_grad_(False)
        self.find_boxes = find_boxes or prior_boxes
        self.finder = finder

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None, find_boxes: FaceBoxes | None = None) -> "Judge":
        """Load the judge saved in `folder` (with recogniser/ and reader/), or the shipped judge.

        A second recogniser is loaded from second_recogniser/, if that exists. Without `find_boxes`, the judge uses the
        small face finder in finder/ beside the folder, if it exists.
        Raises WeightsError if the files are missing, damaged or of another format.
        """
        folder = default_folder() / "judge" if folder is None else Path(folder)
        finder_folder = folder.parent / "finder"
        finder = LearnedFinder.from_folder(finder_folder) if finder_folder.is_dir() else None
        if find_boxes is None and finder is not None:
            find_boxes = boxes_by(finder)
        second = folder / "second_recogniser"
        return cls(
            Recogniser.load(folder / "recogniser"), Reader.load(folder / "reader"), find_boxes, finder,
            second=load_recogniser(second) if second.is_dir() else None,
        )  # fmt: skip

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        self.recogniser.save(Path(folder) / "recogniser", dtype)
        self.reader.save(Path(folder) / "reader", dtype)
        if self.second is not None:
            self.second.save(Path(folder) / "second_recogniser", dtype)

    @torch.inference_mode()
    def embed(self, images: Tensor, boxes: Tensor | None = None, batch: int = 64) -> Tensor:
        """Return unit embeddings (N, D) of the faces in pictures (N, 3, H, W) in 0..1.

        `boxes` (N, 4) are left, top, width and height in px; without them `find_boxes` finds the faces.
        """
        parts = []
        for start in range(0, len(images), batch):
            images_of_batch = images[start : start + batch]
            boxes_of_batch = self.find_boxes(images_of_batch) if boxes is None else boxes[start : start + batch]
            parts.append(self.recogniser(crop_faces(images_of_batch, boxes_of_batch, self.recogniser.size)))
        return torch.cat(parts) if parts else torch.zeros(0, self.recogniser.config["dimensions"])

    @torch.inference_mode()
    def read(self, images: Tensor, batch: int = 64) -> list[dict[str, str]]:
        """Classify each picture (N, 3, H, W) in 0..1: attribute or trait -> word."""
        read: list[dict[str, str]] = []
        for start in range(0, len(images), batch):
            read += self.reader.words(self.reader(self._resized(images[start : start + batch])))
        return read

    @torch.inference_mode()
    def look(self, images: Tensor, boxes: Tensor | None = None) -> "Seen":
        """Return everything that the judge's networks say about one batch of pictures (N, 3, H, W) in 0..1."""
        faces = torch.ones(len(images), dtype=torch.bool)
        if boxes is None and isinstance(self.find_boxes, FinderBoxes):
            boxes, faces = self.find_boxes.locate(images)
        boxes = self.find_boxes(images) if boxes is None else boxes
        logits, features = self.reader.look(self._resized(images))
        others = {"traits": self.reader.trait_vector(logits)} if self.reader.traits else {}
        others |= {name: F.normalize(embed(images, boxes), dim=-1) for name, embed in self.others.items()}
        return Seen(self.embed(images, boxes), self.reader.words(logits), others, features, faces)

    def fingerprint(self) -> str:
        """Return a short hash of the networks, to recognise results that another judge found."""
        networks: list[nn.Module] = [self.recogniser, self.reader, *([] if self.second is None else [self.second])]
        finder = self.find_boxes.finder if isinstance(self.find_boxes, FinderBoxes) else self.find_boxes
        networks += [finder.network] if isinstance(finder, LearnedFinder) else []
        names = [fingerprint(network)[:16] for network in networks]
        return " ".join([*names, *self.others, getattr(finder, "__qualname__", type(finder).__name__)])

    def _resized(self, images: Tensor) -> Tensor:
        if images.shape[-1] == images.shape[-2] == self.reader.size:
            return images
        return F.interpolate(images, size=(self.reader.size,) * 2, mode="bilinear", antialias=True)


def prior_boxes(images: Tensor) -> Tensor:
    """Return the typical place of a face for pictures (N, 3, H, W): boxes (N, 4), left, top, width, height in px."""
    height, width = images.shape[-2:]
    box = torch.tensor(PRIOR_BOX) * torch.tensor([width, height, width, height])
    return box.expand(len(images), 4)


def boxes_by(finder: FaceFinder) -> "FinderBoxes":
    """Return a function that gives the largest face that `finder` finds in each picture, or the prior box."""
    return FinderBoxes(finder)


class FinderBoxes:
    """A function from pictures to one box each: the largest face that `finder` finds, or the prior box."""

    def __init__(self, finder: FaceFinder) -> None:
        self.finder = finder

    def __call__(self, images: Tensor) -> Tensor:
        return self.locate(images)[0]

    def locate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the boxes (N, 4), and where a face was found (N,)."""
        found_boxes, is_found = prior_boxes(images).clone(), torch.zeros(len(images), dtype=torch.bool)
        for row, image in enumerate(images):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()
            if found := self.finder.find(Image.fromarray(pixels)):
                face = found[0]
                found_boxes[row] = torch.tensor([face.left, face.top, face.width, face.height])
                is_found[row] = True
        return found_boxes, is_found


def _class(words: Sequence[str], word: str | None) -> int:
    return words.index(word) if word in words else IGNORED


def _letter_classes(letters: str | None) -> list[int]:
    if letters is None:
        return [IGNORED] * LETTER_SLOTS
    padded = letters[:LETTER_SLOTS].ljust(LETTER_SLOTS)
    return [LETTERS.find(letter) + 1 for letter in padded]
