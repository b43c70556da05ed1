"""Parse the names that users give for a base, an adapter or a file: a path, or a hub id with its revision and place.

    sdxl                                            a short name of the table of licences
    models/sdxl, me.safetensors                     a folder or a file
    owner/name, owner/name@v1.0                     a hub repository, perhaps at a revision
    owner/name:folder/file.safetensors              a file of a repository, or a folder of it

What exists as a path is a path. Only a name that cannot be one leads to the hub.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from imagine.errors import ConfigError
from imagine.licences import base_names, licence_of
from imagine.networks.weights import is_hub_id
from imagine.paths import as_path, shorten_path


@dataclass(frozen=True)
class Source:
    """A path, or a place in a hub repository. Exactly one of `path` and `repository` is set.

    `inside` is a file or folder within the repository, or within the folder `path`; "" for all of it.
    """

    given: str
    path: Path | None = None
    repository: str = ""
    revision: str | None = None
    inside: str = ""

    @property
    def is_hub(self) -> bool:
        """Whether files may have to be downloaded."""
        return self.path is None


def read_source(given: "str | Path", revision: str | None = None) -> Source:
    """Return what a name means. Raises ConfigError if it is neither a path nor a hub id, or names two revisions."""
    text = str(given)
    path = as_path(text)
    if path.exists():
        return _checked(Source(text, path), revision)
    head, _, inside = text.partition(":")
    if inside and as_path(head).is_dir():
        return _checked(Source(text, as_path(head), inside=inside), revision)
    repository, _, pinned = head.partition("@")
    if not is_hub_id(repository):
        raise ConfigError(f"There is no file or folder {shorten_path(text)}, and it is no hub id: check the name.")
    if pinned and revision and pinned != revision:
        raise ConfigError(f"{text} names the revision {pinned}, and --revision another one: leave one of them out.")
    return Source(text, repository=repository, revision=pinned or revision, inside=inside)


def read_base_source(given: "str | Path", revision: str | None = None) -> Source:
    """Return what the name of a base means; a short name stands for its hub repository.

    Raises ConfigError for an unknown name, with the short names that there are.
    """
    text = str(given)
    name, _, pinned = text.partition("@")
    found = licence_of(name) if name in base_names() else None
    if found is not None:
        return replace(read_source(f"{found.hub[0]}{'@' if pinned else ''}{pinned}", revision), given=text)
    if not as_path(text).exists() and not is_hub_id(text.partition(":")[0].partition("@")[0]):
        raise ConfigError(
            f"There is no base {shorten_path(text)}: give a folder, a hub id such as owner/name, or one of "
            f"{', '.join(base_names())}."
        )
    return read_source(text, revision)


def _checked(source: Source, revision: str | None) -> Source:
    if revision is not None:
        raise ConfigError(f"{source.given} is on the disk, and --revision belongs to hub ids: leave --revision out.")
    return source
