"""Paths that users name: checking any path gives its kind or one sentence."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagine.adapter.adapter import read_metadata
from imagine.errors import ConfigError, ImagineError
from imagine.inspection import inspect
from imagine.networks.weights import resolve_folder
from imagine.paths import as_path, folder_to_fill, kind_of, writable_file, writable_folder
from imagine.people.persona import Persona
from imagine.people.photos import open_photo
from tests import pictures, tiny

LONG = "x" * 5000
READERS: list[Callable[[Any], Any]] = [open_photo, inspect, Persona.load, read_metadata, resolve_folder]


def test_every_kind_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert kind_of(tmp_path, ConfigError) == "folder" and kind_of(tmp_path / "file", ConfigError) == "file"
    for name in ("missing", "file/below", "zero\0byte"):
        assert kind_of(tmp_path / name, ConfigError) == "nothing"
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    assert kind_of(tmp_path / "loop", ConfigError) == "nothing"
    assert kind_of(Path(os.devnull), ConfigError) == "other"


def test_a_tilde_means_a_home_folder_only_if_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert as_path("~/me.jpg") == Path("/home/me/me.jpg")
    assert as_path("~nobody-at-all/me.jpg") == Path("~nobody-at-all/me.jpg") and as_path("~me.jpg") == Path("~me.jpg")


def test_a_file_whose_name_begins_with_a_tilde_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures.gradient().save("~me.jpg")
    assert open_photo("~me.jpg").size == (96, 64)
    tiny.pipeline().save_pretrained("~weights")
    assert resolve_folder("~weights") == Path("~weights") and inspect("~weights/adapter")["kind"] == "adapter"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("path", [LONG, f"{LONG}.safetensors", "~nobody-at-all/x.jpg", "zero\0byte"])
def test_impossible_paths_are_refused_in_a_sentence(read: Callable[[Any], Any], path: str) -> None:
    with pytest.raises(ImagineError) as caught:
        read(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.fixture
def closed() -> Iterator[Path]:
    """Yield a folder whose "secret.safetensors" is unreadable and whose folder "inside" is closed, even for root."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no file permissions")
    user, folder = os.geteuid(), Path(tempfile.mkdtemp())  # other users cannot access pytest's own folders
    folder.chmod(0o755)
    (folder / "inside").mkdir(mode=0)
    (folder / "secret.safetensors").write_bytes(b"")
    (folder / "secret.safetensors").chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)  # permissions do not restrict root
        yield folder
    finally:
        if user == 0:
            os.seteuid(user)
        (folder / "inside").chmod(0o700)
        shutil.rmtree(folder)


@pytest.mark.parametrize("read", READERS)
def test_a_path_without_permission_is_refused_in_a_sentence(read: Callable[[Any], Any], closed: Path) -> None:
    with pytest.raises(ImagineError, match=r"cannot be checked \(Permission denied\)") as caught:
        read(closed / "inside" / "me.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [open_photo, inspect, Persona.load, read_metadata])
def test_a_file_that_may_not_be_read_is_refused_in_a_sentence(read: Callable[[Any], Any], closed: Path) -> None:
    with pytest.raises(ImagineError, match=r"cannot be read|complete safetensors file") as caught:
        read(closed / "secret.safetensors")
    assert "\n" not in str(caught.value)


def test_an_output_that_is_not_writable_is_refused_in_a_sentence(closed: Path) -> None:
    for check in (writable_folder, folder_to_fill, lambda path: writable_file(path.with_suffix(".png"), (".png",))):
        for path in (closed / "inside" / "new", closed / "new"):
            with pytest.raises(ConfigError, match=r"is not writable|cannot be checked"):
                check(path)
    with pytest.raises(ConfigError, match="already exists"):
        writable_folder(closed / "inside")


def test_a_writable_output_is_returned_as_named(tmp_path: Path) -> None:
    assert writable_file(tmp_path / "a.png", (".png",)) == tmp_path / "a.png"
    assert writable_folder(tmp_path / "new") == tmp_path / "new"
    assert folder_to_fill(tmp_path / "new" / "and" / "below") == tmp_path / "new" / "and" / "below"
    (tmp_path / "file").write_text("")
    for check, path in ((writable_folder, tmp_path), (folder_to_fill, tmp_path / "file" / "below")):
        with pytest.raises(ConfigError, match=r"choose another|new or empty"):
            check(path)
