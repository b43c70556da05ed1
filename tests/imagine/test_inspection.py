"""Descriptions of files, from their metadata or, without any, from their keys."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imagine.errors import WeightsError
from imagine.inspection import inspect
from imagine.ip_adapter.layout import projection_shapes, read_layout
from imagine.networks.vision_conversion import to_transformers
from imagine.people.finder import Finder, save_finder
from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny, tiny_ip, tiny_stock


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


def test_a_stock_folder_with_adapters_in_it(tmp_path: Path) -> None:
    pipe = tiny_stock.personal(tiny_stock.stock())
    pipe.save_pretrained(tmp_path)
    shutil.copytree(tmp_path / "adapter", tmp_path / "ip_0")
    found = inspect(tmp_path)
    assert (found["kind"], found["pipeline"]) == ("weights", "StableDiffusionPipeline")
    assert found["encoder_fingerprint"] == pipe.encoder_fingerprint
    assert found["adapters"].keys() == {"adapter", "ip_0"} and found["adapters"]["adapter"]["problems"] == []
    assert found["components"]["unet"]["parameters"] == parameters(pipe.denoiser)


def test_our_adapter_is_checked_against_the_encoder_in_its_folder(
    folder: Path, pipe: ImaginePipeline, tmp_path: Path
) -> None:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    eyes = pipe.image_encoder
    to_transformers(copy.deepcopy(eyes).half()).save_pretrained(tmp_path / "image_encoder")
    assert inspect(tmp_path)["problems"] == []
    other = copy.deepcopy(eyes)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    shutil.rmtree(tmp_path / "image_encoder")
    other.save_pretrained(tmp_path / "image_encoder")
    (problem,) = inspect(tmp_path)["problems"]
    assert pipe.encoder_fingerprint in problem and "the image_encoder beside it is" in problem
    config = {**json.loads((tmp_path / "image_encoder" / "config.json").read_text()), "width": 7}
    (tmp_path / "image_encoder" / "config.json").write_text(json.dumps(config))
    assert "but the image_encoder beside it gives 7" in inspect(tmp_path)["problems"][0]


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
    assert (found["encoder"] == "face recogniser (InsightFace)") == variant.startswith("FaceID")


def test_any_other_safetensors_file_is_described(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "x.safetensors", {"of": "nothing"})
    found = inspect(tmp_path / "x.safetensors")
    assert (found["kind"], found["parameters"], found["precision"]) == ("tensors", 6, ["BF16"])
    assert found["metadata"] == {"of": "nothing"}


def test_files_that_are_not_weights_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.bin").write_bytes(b"\x80")
    (tmp_path / "empty").mkdir()
    for name, words in (("a.txt", "safetensors"), ("b.bin", "pickle"), ("empty", "holds neither"), ("no", "no file")):
        with pytest.raises(WeightsError, match=words):
            inspect(tmp_path / name)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an IP-Adapter's folder: a file, LoRA and an image encoder in it, and a README one folder above."""
    root = tmp_path_factory.mktemp("repository")
    folder = root / "models"
    folder.mkdir()
    (root / "README.md").write_text("---\nlicense: openrail\nlanguage: en\n---\nAn adapter.\n")
    save_file(tiny_ip.tensors("plus", tiny_ip.unet()), folder / "ip.safetensors")
    save_file({"unet.a.to_q.lora_A.weight": torch.zeros(2, 8)}, folder / "pytorch_lora_weights.safetensors")
    tiny_ip.encoder().save_pretrained(folder / "image_encoder")
    return folder


def test_an_ip_adapters_folder_with_its_licence(repository: Path) -> None:
    found = inspect(repository)
    assert (found["kind"], found["variant"], found["tokens"], found["licence"]) == ("IP-Adapter", "plus", 3, "openrail")
    assert (found["layers"], found["text_width"], found["features_width"], found["base"]) == (7, 16, 24, None)
    assert [each.split(" cannot load")[0] for each in found["problems"]] == [
        "ComfyUI_IPAdapter_plus and sd-webui-controlnet", "InvokeAI",
    ]  # fmt: skip
    assert inspect(repository / "pytorch_lora_weights.safetensors")["kind"] == "LoRA"


@pytest.mark.parametrize(
    ("kind", "width", "encoder"),
    [
        ("linear", 1024, "OpenCLIP ViT-H/14"), ("linear", 1280, "OpenCLIP ViT-bigG/14"),
        ("linear", 768, "CLIP ViT-L/14"),
        ("plus", 1280, "OpenCLIP ViT-H/14"), ("full", 1664, "OpenCLIP ViT-bigG/14"), ("full", 1024, "CLIP ViT-L/14"),
    ],
)  # fmt: skip
def test_the_encoder_follows_from_the_width_of_its_features(kind: str, width: int, encoder: str) -> None:
    shapes = projection_shapes(kind, 4, width, 16, 64, 64)
    assert read_layout({f"image_proj.{name}": shape for name, shape in shapes.items()}).encoder == encoder


def test_files_that_will_not_load_are_reported(repository: Path, tmp_path: Path) -> None:
    file = tiny_ip.tensors("plus", tiny_ip.unet())
    deeper = {name.replace(".layers.3.", ".layers.5."): each.clone() for name, each in file.items()}
    save_file({**deeper, **file}, tmp_path / "deeper.safetensors")
    assert "5 layers, but diffusers supports exactly 4" in inspect(tmp_path / "deeper.safetensors")["problems"][0]
    tiny_ip.encoder(tokens=26).save_pretrained(tmp_path / "image_encoder")
    save_file(file, tmp_path / "ip.safetensors")
    assert "of width 24 (no public one), but the image_encoder beside it gives 26" in " ".join(
        inspect(tmp_path / "ip.safetensors")["problems"]
    )


def test_bin_files_are_read_without_running_code(tmp_path: Path) -> None:
    file = tiny_ip.tensors("full", tiny_ip.unet())
    torch.save(tiny_ip.nested(file), tmp_path / "ip.bin")
    found = inspect(tmp_path / "ip.bin")
    assert (found["kind"], found["variant"], found["problems"], found["precision"]) == (
        "IP-Adapter",
        "full",
        [],
        ["F32"],
    )
    assert found["parameters"] == sum(each.numel() for each in file.values())
    torch.save({"x": torch.zeros(1)}, tmp_path / "ip.pt")
    with pytest.raises(WeightsError, match="is a pickle"):
        inspect(tmp_path / "ip.pt")


def test_problems_of_our_own_adapters_are_reported(folder: Path, tmp_path: Path) -> None:
    source = folder / "adapter" / "adapter.safetensors"
    assert inspect(source)["problems"] == []
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    gate = next(name for name in tensors if name.endswith("gate"))
    low_rank = next(name for name in tensors if name.endswith("lora_B.weight"))
    for change, words in (
        ({gate: None}, f"lacks {gate}"),
        ({low_rank: None}, f"lacks {low_rank}"),
        ({"projections.vision.proj.3.bias": None}, "lacks projections.vision.proj.3.bias"),
        ({"projections.vision.proj.9.bias": torch.zeros(1)}, "has the unknown tensor projections.vision.proj.9.bias"),
        ({"projections.vision.proj.3.bias": torch.zeros(2)}, "shape [2] instead of [16]"),
    ):
        changed = {name: each for name, each in {**tensors, **change}.items() if each is not None}
        save_file(changed, tmp_path / "x.safetensors", metadata)
        assert words in " ".join(inspect(tmp_path / "x.safetensors")["problems"])
    save_file(tensors, tmp_path / "x.safetensors", {**metadata, "format_version": "7"})
    assert "format version 7" in inspect(tmp_path / "x.safetensors")["problems"][0]


def rewritten(folder: Path, tmp_path: Path, **metadata: str) -> Path:
    """Return a copy of the folder's adapter with other metadata."""
    file = folder / "adapter" / "adapter.safetensors"
    with safe_open(file, framework="pt") as opened:
        said = {**opened.metadata(), **metadata}
    save_file(load_file(file), tmp_path / "other.safetensors", said)
    return tmp_path / "other.safetensors"


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_rank": "many"},
        {"lora_rank": "-1"},
        {"branches": "{"},
        {"branches": '["vision"]'},
        {"branches": '[{"name": "vision"}]'},
        {"branches": '[{"name": 7, "width": 16}]'},
        {"branches": '[{"name": "vision", "width": 16, "projection": "full", "input_width": "wide"}]'},
    ],
)
def test_an_adapter_that_describes_itself_wrongly_is_one_sentence(
    folder: Path, tmp_path: Path, metadata: dict[str, str]
) -> None:
    with pytest.raises(WeightsError, match="branches and LoRA properly") as caught:
        inspect(rewritten(folder, tmp_path, **metadata))
    assert "\n" not in str(caught.value)


def test_a_persona_with_a_wrong_token_count_is_still_described(tmp_path: Path) -> None:
    save_file({"vision_features": torch.zeros(2, 3)}, tmp_path / "me.safetensors", {"kind": "persona", "tokens": "two"})
    assert inspect(tmp_path / "me.safetensors")["tokens"] is None


@pytest.mark.parametrize("config", ["[]", '{"architectures": "one"}', '{"architectures": []}'])
def test_a_model_with_an_incomplete_config(tmp_path: Path, config: str) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    if config == "[]":
        with pytest.raises(WeightsError, match="does not describe a model"):
            inspect(tmp_path)
    else:
        assert inspect(tmp_path)["class"] is None


def test_an_incomplete_index_entry_names_no_class(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "weights"))
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers"]}))
    assert inspect(copied)["components"]["unet"]["class"] is None
