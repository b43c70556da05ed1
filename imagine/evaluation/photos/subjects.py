"""Subjects of the suites of photographs: folders of photos, and the prompts for each subject.

`dreambench` is the set of DreamBooth (arXiv 2208.12242) in its published layout, google/dreambooth: a folder per
subject, beside `prompts_and_classes.txt`, which gives each subject's class noun, and the prompts for objects and for
live subjects. `photos` is a user's own folder: one sub-folder per person, or the photos of one person, beside
`prompts.txt` with one prompt per line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imagine.errors import ConfigError
from imagine.paths import as_path, kind_of, shorten_path

PHOTO_SUITES = ("dreambench", "photos")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".bmp", ".tif", ".tiff")
PROMPTS_FILE, DREAMBENCH_FILE = "prompts.txt", "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # class nouns of the set's live subjects
IMAGES = {"dreambench": 4, "photos": 1}  # pictures of each prompt, as in the paper


@dataclass(frozen=True)
class Subject:
    """One person or thing: photos that the system gets, photos to compare with, and prompts.

    In `dreambench` the system gets all photos, and its pictures are compared with all of them, as in the paper. In
    `photos` the system gets the first photos, and the others are kept apart.
    """

    name: str
    noun: str
    references: tuple[Path, ...]
    truths: tuple[Path, ...]
    prompts: tuple[str, ...]


def read_subjects(suite: str, folder: Path, prompts_file: Path | None = None, references: int = 1) -> list[Subject]:
    """Return the subjects of a suite in their folder, by name. Raises ConfigError if it is not laid out as described.

    prompts_file replaces the folder's own file; references: the number of photos of each person that the system gets,
    in the suite `photos`.
    """
    folder = as_path(folder)
    if kind_of(folder, ConfigError) != "folder":
        raise ConfigError(f"There is no folder {shorten_path(folder)} of photos: check the path.")
    if suite == "dreambench":
        return _dreambench(folder, prompts_file)
    prompts = _lines(prompts_file or folder / PROMPTS_FILE)
    groups = {path.name: photos for path in sorted(folder.iterdir()) if path.is_dir() and (photos := _photos(path))}
    groups = groups or ({folder.absolute().name: photos} if (photos := _photos(folder)) else {})
    if not groups:
        raise ConfigError(
            f"{shorten_path(folder)} holds no photos: put each person's photos into a sub-folder, or the photos of one "
            "person into the folder itself."
        )
    return [
        Subject(name, "person", tuple(photos[:references]), tuple(photos[references:]), prompts)
        for name, photos in groups.items()
    ]


def _dreambench(folder: Path, prompts_file: Path | None) -> list[Subject]:
    file = prompts_file or next(
        (path for path in (folder / DREAMBENCH_FILE, folder / "dataset" / DREAMBENCH_FILE) if path.exists()), None
    )
    if file is None:
        raise ConfigError(
            f"{shorten_path(folder)} has no {DREAMBENCH_FILE}: give a copy of the folder `dataset` of "
            "github.com/google/dreambooth."
        )
    classes, objects, live = parse_dreambench(_read(file), file)
    root = folder if (folder / DREAMBENCH_FILE).exists() or prompts_file else folder / "dataset"
    missing = [name for name in classes if not _photos(root / name)]
    if missing:
        raise ConfigError(
            f"{shorten_path(root)} has no photos of {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: copy "
            "the whole folder."
        )
    return [
        Subject(
            name, noun, photos := tuple(_photos(root / name)), photos,
            tuple(prompt.format("", noun).replace("  ", " ") for prompt in (live if noun in LIVE else objects)),
        )
        for name, noun in classes.items()
    ]  # fmt: skip


def parse_dreambench(text: str, file: Path) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Return subject -> class noun, the prompts for objects, and those for live subjects.

    Prompts hold {0} for the identifier and {1} for the class noun. Raises ConfigError for another layout.
    """
    head, *lists = re.split(r"prompt_list\s*=\s*\[", text)
    lines = [line.strip() for line in head.splitlines()]
    classes = dict(line.split(",", 1) for line in lines if re.fullmatch(r"[\w-]+,[\w -]+", line))
    classes.pop("subject_name", None)
    prompts = [tuple(re.findall(r"['\"](.*?)['\"]\.format", part)) for part in lists]
    if not classes or len(prompts) != 2 or not all(prompts):
        raise ConfigError(
            f"{shorten_path(file)} is not the file of DreamBench: it must list subjects with their classes, then two "
            "prompt lists."
        )
    return classes, prompts[0], prompts[1]


def _photos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _lines(path: Path) -> tuple[str, ...]:
    if not path.exists():
        raise ConfigError(
            f"There is no {shorten_path(path)}: write one prompt per line into it, or name it as --prompt-file."
        )
    lines = tuple(line.strip() for line in _read(path).splitlines() if line.strip() and not line.startswith("#"))
    if not lines:
        raise ConfigError(f"{shorten_path(path)} holds no prompt: write one per line.")
    return lines


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shorten_path(path)} cannot be read as text ({error}): save it as UTF-8.") from error


def describe(subjects: Sequence[Subject]) -> str:
    """Return a text that determines the subjects, to recognise another set."""
    return " ".join(f"{each.name}:{len(each.references)}:{len(each.truths)}:{len(each.prompts)}" for each in subjects)
