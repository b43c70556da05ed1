"""What files say of themselves, and what keys say of files that do not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from imagine.errors import WeightsError
from imagine.finder import Finder, save_finder
from imagine.inspection import inspect
from imagine.pipeline import ImaginePipeline
from tests import tiny


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def folder(pipe: ImaginePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    pipe.save_pretrained(folder)
    return folder


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_weights_folder(pipe: ImaginePipeline, folder: Path) -> None:
    found = inspect(folder)
    assert found["kind"] == "weights" and found["format_version"] == "1"
    assert found["encoder_fingerprint"] == pipe.encoder_fingerprint
    assert found["components"]["unet"]["class"] == "UNet2DConditionModel"
    assert found["components"]["unet"]["parameters"] == parameters(pipe.unet)
    assert found["adapters"]["text_adapter"]["branches"] == ["t5", "byt5"]
    assert found["bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    json.dumps(found)


def test_an_adapter_as_file_and_as_folder(pipe: ImaginePipeline, folder: Path) -> None:
    found = inspect(folder / "adapter" / "adapter.safetensors")
    assert found["kind"] == "adapter" and found["variant"] == "identity, full projection"
    assert (found["branches"], found["lora_rank"]) == (["vision"], 2)
    assert pipe.adapter is not None and found["parameters"] == parameters(pipe.adapter)
    assert found["precision"] == ["F32"]
    assert {**inspect(folder / "adapter"), "path": ""} == {**found, "path": ""}


def test_a_component_a_persona_and_a_finder(pipe: ImaginePipeline, folder: Path, tmp_path: Path) -> None:
    assert inspect(folder / "vae")["class"] == "AutoencoderDC"
    pipe.enroll([tiny.photo(1), tiny.photo(2)]).save(tmp_path / "me.safetensors")
    persona = inspect(tmp_path / "me.safetensors")
    assert (persona["kind"], persona["tokens"], len(persona["faces"])) == ("persona", 2 * tiny.TOKENS, 2)
    assert persona["encoder_fingerprint"] == pipe.encoder_fingerprint
    assert inspect(save_finder(Finder(32, 4), tmp_path))["kind"] == "face finder"


@pytest.mark.parametrize(
    ("names", "variant", "tokens"),
    [
        ({"proj.weight": (64, 8), "norm.weight": (16,)}, "base", 4),
        ({"proj.0.weight": (8, 8), "proj.3.weight": (16,)}, "full", "one per token of the vision encoder"),
        ({"latents": (1, 16, 8), "proj_in.weight": (8, 8)}, "plus", 16),
        ({"proj.0.weight": (8, 8), "proj.2.weight": (64, 8), "norm.weight": (16,)}, "FaceID", 4),
        ({"perceiver_resampler.proj_in.weight": (8, 8), "norm.weight": (16,)}, "FaceID Plus", 4),
    ],
)
def test_ip_adapters_are_recognised_by_their_keys(
    tmp_path: Path, names: dict[str, tuple[int, ...]], variant: str, tokens: object
) -> None:
    tensors = {f"image_proj.{name}": torch.zeros(shape) for name, shape in names.items()}
    tensors |= {f"ip_adapter.{2 * place + 1}.to_k_ip.weight": torch.zeros(4, 768) for place in range(16)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert (found["kind"], found["variant"], found["tokens"]) == ("IP-Adapter", variant, tokens)
    assert (found["base"], found["layers"]) == ("Stable Diffusion 1.5", 16)


def test_any_other_safetensors_file_is_described(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "x.safetensors", {"of": "nothing"})
    found = inspect(tmp_path / "x.safetensors")
    assert (found["kind"], found["parameters"], found["precision"]) == ("tensors", 6, ["BF16"])
    assert found["metadata"] == {"of": "nothing"}


def test_what_is_no_weights_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.bin").write_bytes(b"\x80")
    (tmp_path / "empty").mkdir()
    for name, says in (("a.txt", "safetensors"), ("b.bin", "pickle"), ("empty", "holds neither"), ("no", "no file")):
        with pytest.raises(WeightsError, match=says):
            inspect(tmp_path / name)
