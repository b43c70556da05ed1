"""Small folders of evaluations, as `imagine evaluate` writes them, for tests of what reads them."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def write_evaluation(folder: Path, system: str, shift: float = 0.0, **settings: Any) -> Path:
    """Write the pictures and the report of `system` for 4 people x 2 prompts; `shift` is added to every score."""
    facts = {"suite": "portraits", "seed": 0, "world": "portrait-world-2", "identities": 4, "prompts": 2, **settings}
    dice = torch.Generator().manual_seed(1)
    people = (torch.rand(4, generator=dice) * 0.5).tolist()
    lines = []
    for person in range(4):
        paint(folder / "pictures" / "reference" / f"{person:03}.png", 10 * person)
        for prompt in range(2):
            name = f"{person:03}_{prompt:02}"
            paint(folder / "pictures" / "full" / f"{name}.png", 10 * person + prompt + 1 + round(100 * shift))
            lines.append({
                "row": "full", "id": name, "file": f"pictures/full/{name}.png", "text": f"a person, prompt {prompt}",
                "identity": person, "reference": f"pictures/reference/{person:03}.png",
            })  # fmt: skip
    (folder / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = [value + shift for value in people]
    metric = {"value": sum(values) / 4, "low": min(values), "high": max(values), "ceiling": 0.9, "floor": 0.0}
    report = {
        **facts, "system": system, "metrics": {"sim_gt": metric}, "people": {"sim_gt": values},
        "costs": {"people": 4, "seconds_per_person": 1.5, "bytes_per_person": 2048.0, "seconds_per_picture": None},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "evaluation.json").write_text(json.dumps(facts))
    return folder


def paint(path: Path, number: int) -> None:
    """Write a picture of its own for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 48), (number * 7 % 256, number * 53 % 256, number * 101 % 256)).save(path)
