"""A file that is not what its name says is called what it is, with what to do about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imagine.adapter.adapter import read_metadata
from imagine.errors import ImagineError
from imagine.inspection import inspect
from imagine.ip_adapter.reading import read_ip_adapter
from imagine.networks.files import is_pickle, is_safetensors, variant_of, variants_in, why_unreadable
from imagine.people.finder import load_finder
from imagine.people.persona import Persona


def as_pickle(path: Path) -> None:
    torch.save({"x": object()}, path)


def as_old_pickle(path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def cut(path: Path) -> None:
    save_file({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])


WRONG: list[tuple[str, Any, str]] = [
    ("empty", b"", "is empty"),
    ("git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n", "git lfs pull"),
    ("html", b"\n<!DOCTYPE html><html>401</html>", "is a web page"),
    ("html with a byte order mark", b"\xef\xbb\xbf<HTML>", "is a web page"),
    ("json", b'{"error": "Repository not found"}', "error of a server"),
    ("pickle", as_pickle, "is a pickle"),
    ("old pickle", as_old_pickle, "is a pickle"),
    ("cut", cut, "is not a complete safetensors file"),
]


def written(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return path


@pytest.mark.parametrize(("content", "words"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_a_wrong_file_is_called_what_it_is(content: Any, words: str, tmp_path: Path) -> None:
    sentence = why_unreadable(written(tmp_path / "x.safetensors", content))
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("read", [inspect, read_metadata, Persona.load, read_ip_adapter, load_finder])
@pytest.mark.parametrize(("content", "words"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_every_reader_says_so(read: Callable[[Any], Any], content: Any, words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "finder.safetensors", content)
    is_old = content is as_old_pickle and read in (inspect, read_ip_adapter)  # they read pickles without running code
    with pytest.raises(ImagineError, match="no tensors named" if is_old else words) as caught:
        read(tmp_path if read is load_finder else path)
        raise ImagineError("no tensors named as in an IP-Adapter.")  # `inspect` describes it
    assert "\n" not in str(caught.value)


def test_contents_are_told_apart_whatever_the_name(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.bin")
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert is_safetensors(tmp_path / "a.bin") and not is_pickle(tmp_path / "a.bin")
    assert is_pickle(tmp_path / "b.safetensors") and not is_safetensors(tmp_path / "b.safetensors")
    assert not is_pickle(tmp_path / "none") and not is_safetensors(tmp_path / "none")


@pytest.mark.parametrize("first", range(0, 256, 8))
def test_a_header_of_any_length_is_not_taken_for_a_pickle(first: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for words in range(8, 600, 8):  # headers are padded to multiples of 8
        save_file({"x": torch.zeros(1)}, path, {"a": "b" * words})
        if path.read_bytes()[0] == first:
            break
    assert path.read_bytes()[0] == first
    assert is_safetensors(path) and not is_pickle(path)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", ""), ("model-00001-of-00002.safetensors", ""),
        ("diffusion_pytorch_model.safetensors.index.json", ""),
        ("model.fp16.safetensors", "fp16"), ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"), ("model.safetensors.index.fp16.json", "fp16"),
        ("config.json", None), ("ip-adapter.safetensors", None), ("optimizer.bin", None),
        ("pytorch_model.bin", ""), ("diffusion_pytorch_model.fp16.bin", "fp16"),
        ("pytorch_model-00001-of-00002.bin", ""), ("pytorch_model.bin.index.fp16.json", "fp16"),
    ],
)  # fmt: skip
def test_the_variant_in_a_files_name(name: str, variant: str | None, tmp_path: Path) -> None:
    assert variant_of(name) == variant
    (tmp_path / name).touch()
    is_weights = variant is not None and name.endswith(".safetensors")
    assert variants_in(tmp_path) == ({variant} if is_weights else set())
