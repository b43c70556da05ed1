"""How far the judge's recogniser can be trusted: accuracy and margin by style, headwear and head turn.

Real pictures of held-out people, who are in no evaluation, are compared with a plain portrait of each and of 1,000
people. accuracy: the right person is the nearest. margin: similarity to the right person minus that to the nearest
other one. faces: share of pictures in which the finder finds a face.

    python benchmarks/judge.py --people 100 --gallery 1000
"""

import argparse
import json

import torch
from torch import Tensor

from imagine.evaluation.judge import FinderBoxes, Judge
from imagine.evaluation.suites import contexts_for
from imagine.world import People, render, sample_people, seeds
from imagine.world.vocabulary import HEADWEAR, SIDES, STYLES

FIRST = seeds.HELD_OUT.start + 9_800_000  # of people and contexts that no evaluation uses
CONDITIONS = {"style": STYLES, "headwear": HEADWEAR, "yaw": SIDES}


def main() -> None:
    """Measure every condition and print a line of a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--gallery", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge.from_pretrained()
    people = sample_people(range(FIRST, FIRST + options.gallery))
    plain = [{"style": "photo", "headwear": "none"}] * options.gallery
    gallery, _ = embed(judge, people, plain, 10_000, known=True)
    found = {}
    for number, (attribute, word) in enumerate((a, w) for a, words in CONDITIONS.items() for w in words):
        asked = [{"style": "photo", "headwear": "none", attribute: word}] * options.people
        embeddings, faces = embed(judge, people[: options.people], asked, 20_000 + 1_000 * number, known=False)
        found[f"{attribute}: {word}"] = {**measure(embeddings, gallery), "faces": float(faces.float().mean())}
        line = found[f"{attribute}: {word}"]
        if not options.json:
            print(f"| {attribute}: {word} | {line['accuracy']:.0%} | {line['margin']:+.2f} | {line['faces']:.0%} |")
    if options.json:
        print(json.dumps(found))


def embed(
    judge: Judge, people: People, asked: list[dict[str, str]], first: int, known: bool, batch: int = 50
) -> tuple[Tensor, Tensor]:
    """Return the embeddings of renders, and whether a face was found; `known`: by the true boxes."""
    contexts = contexts_for(asked, range(FIRST + first, FIRST + first + len(asked)))
    parts, faces = [], []
    for start in range(0, len(people), batch):
        drawn = render(people[start : start + batch], contexts[start : start + batch])
        boxes, is_found = drawn.boxes, torch.ones(len(drawn.images), dtype=torch.bool)
        if not known and isinstance(judge.find_boxes, FinderBoxes):
            boxes, is_found = judge.find_boxes.locate(drawn.images)
        parts.append(judge.embed(drawn.images, boxes))
        faces.append(is_found)
    return torch.cat(parts), torch.cat(faces)


def measure(embeddings: Tensor, gallery: Tensor) -> dict[str, float]:
    """Return accuracy and mean margin of the first people of the gallery."""
    similarities = embeddings @ gallery.T
    rows = torch.arange(len(embeddings))
    own = similarities[rows, rows].clone()
    similarities[rows, rows] = -2
    margin = own - similarities.max(1).values
    return {"accuracy": float((margin > 0).float().mean()), "margin": float(margin.mean())}


if __name__ == "__main__":
    main()
