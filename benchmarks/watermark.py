"""Measure the watermark: bits read and marks found after common changes, visible change, and false alarms.

    python benchmarks/watermark.py FOLDER [--sides 128 256 512] [--most N]

FOLDER holds pictures; each is cropped to a square and scaled to each side. Prints one line per side and change.
"""

import argparse
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from imagine.provenance.watermark import BITS, MEANINGS, add_watermark, read_watermark

CHANGES = ("none", "JPEG 95", "JPEG 75", "shrunk to 75 %", "cropped by an eighth")


def changed(image: Image.Image, change: str) -> Image.Image:
    """Return a picture after one of CHANGES."""
    if change.startswith("JPEG"):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(change.split()[1]))
        return Image.open(io.BytesIO(file.getvalue()))
    if change.startswith("shrunk"):
        size = round(image.width * 0.75), round(image.height * 0.75)
        return image.resize(size, Image.Resampling.LANCZOS)
    return image.crop((image.width // 8, image.height // 8, *image.size)) if change.startswith("cropped") else image


def square(file: Path, side: int) -> Image.Image:
    """Return the middle of a picture as a square of `side` pixels."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)


def measure(files: list[Path], side: int) -> None:
    """Print the results at one side."""
    alarms, failed, strengths, psnr = 0, 0, list[float](), list[float]()
    bits: dict[str, list[int]] = defaultdict(list)
    right: dict[str, int] = defaultdict(int)
    for number, file in enumerate(files):
        image, meaning = square(file, side), MEANINGS[number % len(MEANINGS)]
        alarms += read_watermark(image).found
        made = add_watermark(image, meaning)
        if made is None:
            failed += 1
            continue
        strengths.append(made.strength)
        error = np.square(np.asarray(made.image, float) - np.asarray(image, float)).mean()
        psnr.append(10 * float(np.log10(255**2 / error)))
        for change in CHANGES:
            reading = read_watermark(changed(made.image, change))
            bits[change].append(BITS - reading.wrong_bits)
            right[change] += reading.found and reading.consent == meaning
    print(f"{side} px, {len(files)} pictures: {failed} not embedded, {alarms} false alarms without a mark")
    print(f"  strength {np.mean(strengths):.2f}, PSNR {np.mean(psnr):.1f} dB, lowest {min(psnr):.1f} dB")
    for change in CHANGES:
        print(f"  {change:<21} bits {np.mean(bits[change]):.1f}, found and right {right[change]}/{len(files)}")


def main() -> None:
    """Measure the pictures of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--most", type=int, default=60, help="number of pictures (default: 60)")
    options = parser.parse_args()
    endings = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(file for file in options.folder.rglob("*") if file.suffix.lower() in endings)[: options.most]
    for side in options.sides:
        measure(files, side)


if __name__ == "__main__":
    main()
