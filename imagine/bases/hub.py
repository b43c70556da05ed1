"""Fetch public files from the hub: what is needed, how large it is, and one sentence where the hub is out of reach.

Everything that is downloaded is first told, with its size and its licence. Files of the local cache are used without a
network. Without a network and without such files the error says which folder to give.
"""

import errno
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagine.bases.sources import Source
from imagine.errors import WeightsError
from imagine.licences import licence_sentence
from imagine.networks.files import variant_of
from imagine.networks.weights import INDEX

Tell = Callable[[str], None]  # receives sentences for people, such as what is downloaded
HALF = "fp16"  # the variant of half precision
_TEXTS = (".json", ".txt", ".model", ".jinja")  # configurations and vocabularies


def tell_nothing(_: str) -> None:
    """Drop a sentence."""


@dataclass(frozen=True)
class Fetched:
    """Files of a repository on this machine: their folder, and what was downloaded for them, in bytes."""

    folder: Path
    downloaded: int = 0


def pipeline_files(names: Collection[str], index: Mapping[str, Any], half: bool) -> list[str]:
    """Return the files of a repository that its pipeline needs, as diffusers loads them.

    names: all files. index: its model_index.json. half: whether to take weights of half precision where there are some.
    For each component safetensors files are preferred to .bin files, and those without a variant to other variants.
    """
    wanted = [INDEX]
    for component, entry in index.items():
        if not isinstance(entry, list) or not any(entry):
            continue
        files = [name for name in names if name.startswith(f"{component}/") and name.count("/") == 1]
        wanted += [name for name in files if name.endswith(_TEXTS) and not name.endswith(".index.json")]
        wanted += _weights_of(files, half)
    return [name for name in dict.fromkeys(wanted) if name in names or name == INDEX]


def _weights_of(files: Sequence[str], half: bool) -> list[str]:
    """Return the weights' files of one component, of one format and one variant, with their index."""
    for ending in (".safetensors", ".bin"):
        by_variant: dict[str, list[str]] = {}
        for name in files:
            plain = name.rpartition("/")[2]
            if plain.endswith(ending) and (variant := variant_of(plain)) is not None:
                by_variant.setdefault(variant, []).append(name)
        for variant in (HALF, "") if half else ("", HALF):
            if variant in by_variant:
                indices = [
                    name for name in files if f"{ending}.index" in name and (f".{HALF}." in name) == (variant == HALF)
                ]
                return [*by_variant[variant], *indices]
    return []


def fetch_pipeline(
    source: Source, half: bool, tell: Tell = tell_nothing, into: Path | None = None, api: Any = None
) -> Fetched:
    """Return the folder of a pipeline, and download what is missing. `into` is a folder to fill instead of the cache.

    api: a huggingface_hub.HfApi, by default the usual hub's. Raises WeightsError if it cannot be fetched.
    """
    if source.path is not None:
        return Fetched(source.path / source.inside)
    api = api or _api()
    with reachable(source, "base") as cached:
        names = api.list_repo_files(source.repository, revision=source.revision)
        if INDEX not in names:
            raise WeightsError(
                f"{source.repository} has no {INDEX}, so it is no pipeline of diffusers: give the repository of a "
                "pipeline, or convert it first."
            )
        index = json.loads(
            Path(api.hf_hub_download(source.repository, INDEX, revision=source.revision)).read_text(encoding="utf-8")
        )
        return _download(api, source, pipeline_files(names, index, half), tell, into)
    return Fetched(cached[0])


def fetch_files(
    source: Source, patterns: Sequence[str], what: str, tell: Tell = tell_nothing, into: Path | None = None,
    api: Any = None,
) -> Fetched:  # fmt: skip
    """Return the folder that holds files of a repository, or `source.path`, and download what is missing.

    patterns: paths within the repository, with * for any text. what: the name of the argument, for sentences.
    Raises WeightsError if they cannot be fetched.
    """
    if source.path is not None:
        return Fetched(source.path)
    api = api or _api()
    with reachable(source, what, patterns) as cached:
        return _download(api, source, patterns, tell, into)
    return Fetched(cached[0])


def _download(api: Any, source: Source, patterns: Sequence[str], tell: Tell, into: Path | None) -> Fetched:
    options = {"revision": source.revision, "allow_patterns": list(patterns), "local_dir": into}
    listed = api.snapshot_download(source.repository, dry_run=True, **options)
    if not listed:
        raise WeightsError(f"{source.repository} has no {' or '.join(patterns)}: check the name after the colon.")
    size = sum(file.file_size for file in listed if file.will_download)
    if size:
        tell(licence_sentence(source.repository))
        count = sum(file.will_download for file in listed)
        tell(f"Downloading {in_gigabytes(size)} of {source.repository} ({count} files).")
    return Fetched(Path(api.snapshot_download(source.repository, **options)), size)


def in_gigabytes(size: int) -> str:
    """Return a size in bytes as people write it for downloads, in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextmanager
def reachable(source: Source, what: str, patterns: Sequence[str] = ()) -> Iterator[list[Path]]:
    """Run requests for a repository; if the hub is out of reach, fill the yielded list with its cached folder.

    patterns: the files that are needed; none for a pipeline. Raises WeightsError, one sentence, if the repository
    cannot be read, or is not in the cache either.
    """
    from huggingface_hub import errors

    cached: list[Path] = []
    try:
        yield cached
    except WeightsError:
        raise
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{source.repository} asks you to accept its terms first: do so on its page, and run `hf auth login`."
        ) from error
    except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
        at = f" with the revision {source.revision}" if source.revision else ""
        raise WeightsError(
            f"The hub has no public repository {source.repository}{at}: check the name, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # the types of the HTTP library, which the hub's client exchanges from time to time
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise WeightsError(f"The disk has no room for {source.repository}: free some space.") from error
        folder = _cached_files(source, patterns) if patterns else _cached_pipeline(source)
        if folder is None:
            raise WeightsError(_where_to_get(source, what)) from error
        cached.append(folder)


def _cached_files(source: Source, patterns: Sequence[str]) -> Path | None:
    """Return the folder of a repository in the hub's cache if it holds all files of these patterns."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                source.repository, revision=source.revision, allow_patterns=list(patterns), local_files_only=True
            )
        )
    except Exception:  # the hub's client raises several types; all mean that something is not there
        return None
    return folder if all(any(folder.glob(pattern)) for pattern in patterns[:1]) else None


def _cached_pipeline(source: Source) -> Path | None:
    """Return the folder of a pipeline in the hub's cache if it holds something of every component."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.repository, INDEX, revision=source.revision)
    if not isinstance(found, str):
        return None
    index = json.loads(Path(found).read_text(encoding="utf-8"))
    components = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    whole = all(any((Path(found).parent / name).glob("*")) for name in components)
    return Path(found).parent if whole else None


def _where_to_get(source: Source, what: str) -> str:
    """Return the sentence for files that are neither in the cache nor within reach."""
    folder = source.repository.rpartition("/")[2]
    is_base = what == "base"
    command = f"imagine download {source.given} --output" if is_base else f"hf download {source.repository} --local-dir"
    inside = f"{folder}:{source.inside}" if source.inside else folder
    return (
        f"{source.repository} is not on this machine, and the hub cannot be reached: run `{command} {folder}` where "
        f"there is a network, and give that folder with --{what} {inside}."
    )


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()
