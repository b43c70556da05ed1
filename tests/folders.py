"""The files of a folder, to compare folders in tests."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder: its path relative to the folder -> its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
