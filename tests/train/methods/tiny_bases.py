"""Folders with tiny bases, photos and a captions file, and runs of the methods on them."""

from pathlib import Path
from typing import Any

from tests import tiny, tiny_stock
from train.config import Run
from train.methods.registry import TUNED
from train.methods.runs import load_method_run, subject_data

BASES = ("world", "sd15", "sdxl")
NOUN = "person"
RARE = {"dreambooth": "zq", "dreambooth_lora": "zq"}  # the tiny tokenizers have no rare words of their own
SMALL = ("images=8", "batch_size=2", "warmup_images=0", "report_every_seconds=0", "checkpoint_every_seconds=0",
         "keep=50", "settings.sentences=plain", "settings.drawings=1", "settings.drawing_steps=1")  # fmt: skip


def fill(home: Path) -> Path:
    """Write the bases, and photos of two people, into a folder."""
    tiny.pipeline(3).save_pretrained(home / "world")
    for name, xl in (("sd15", False), ("sdxl", True)):
        tiny_stock.stock(xl).save_pretrained(home / name)
    for person in ("anna", "ben"):
        (home / person).mkdir()
        for number in range(2):
            tiny.photo(len(person) * 10 + number).save(home / person / f"{number}.png")
    (home / "captions.txt").write_text("a person\na red hat\nan old woman\n")
    return home


def overrides(method: str, home: Path, *more: str) -> list[str]:
    lines = list(SMALL)
    if method in ("dreambooth", "dreambooth_lora", "custom_diffusion", "svdiff"):
        lines += ["settings.prior_images=2", "settings.prior_steps=1"]
    if method in RARE:
        lines.append(f"settings.token={RARE[method]}")
    if method == "custom_diffusion":
        lines += ["settings.scales=0"]  # its words for scales do not fit the tiny windows
    if method == "perfusion":
        lines.append(f"settings.captions={home / 'captions.txt'}")
    return [*lines, *more]


def tiny_run(method: str, base: str, home: Path, *more: str, people: tuple[str, ...] = ("anna",)) -> Run:
    assert method in TUNED
    data: dict[str, Any] = subject_data(str(home / base), [[home / person] for person in people], home / "prior")
    return load_method_run(method, None, overrides(method, home, *more), data)
