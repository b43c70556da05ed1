"""Tar files as other tools write them, for tests of shards."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """Write a tar file with these members, in order; `mode` is that of tarfile.open, such as "w:gz"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path
