"""What real pictures score with each prompt of the suite `portraits`: the ceiling of every single prompt.

For each prompt the world renders held-out people as the prompt asks, and the judge reads the attributes back. A prompt
that even real pictures do not show measures the reader and not the pipeline, so it does not belong in the suite.
found: share of the requested attributes that are read. all: share of pictures in which all of them are.

    python benchmarks/prompts.py --people 24
"""

import argparse
import json
from typing import Any

import torch

from imagine.evaluation import metrics
from imagine.evaluation.judge import Judge
from imagine.evaluation.suites import PORTRAITS, Prompt, contexts_for, suite_version
from imagine.world import VERSION, render, sample_people, seeds

FIRST = seeds.HELD_OUT.start + 9_900_000  # of people and contexts that no evaluation uses
LEAST = 0.6  # a prompt with fewer attributes found leaves the suite


def main() -> None:
    """Print a line of a table for each prompt, the lowest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge.from_pretrained()
    rows = [measure(judge, number, prompt, options.people) for number, prompt in enumerate(PORTRAITS)]
    rows.sort(key=lambda row: row["found"])
    if options.json:
        print(json.dumps({"suite_version": suite_version(), "world": VERSION, "prompts": rows}))
        return
    for row in rows:
        mark = "" if row["found"] >= LEAST else "  <- too low"
        print(f"| {row['text']} | {row['found']:.0%} | {row['all']:.0%} | {row['missed']} |{mark}")


def measure(judge: Judge, number: int, prompt: Prompt, people: int) -> dict[str, Any]:
    """Return what is read in `people` real pictures of a prompt, and which attributes are missed, with their shares."""
    first = FIRST + 1_000 * number
    drawn = render(
        sample_people(range(FIRST, FIRST + people)), contexts_for([prompt.asked] * people, range(first, first + people))
    )
    found = [metrics.found(prompt.asked, read) for read in judge.read(drawn.images)]
    shares = {name: sum(each[name] for each in found) / people for name in prompt.asked}
    return {
        "text": prompt.text,
        "found": sum(shares.values()) / len(shares),
        "all": sum(all(each.values()) for each in found) / people,
        "missed": ", ".join(f"{name} {1 - share:.0%}" for name, share in shares.items() if share < 1),
    }


if __name__ == "__main__":
    main()
