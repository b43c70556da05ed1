"""Public bases from folders, with IP-Adapters, our adapters and LoRA, from Python."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imagine import open_base
from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError, WeightsError
from imagine.people.faces import KnownBoxesFinder
from tests import tiny, tiny_bases, tiny_faces, tiny_ip, tiny_stock
from tests.tiny_stock import draw, same

SIZE = {"height": 16, "width": 16}
FINDER = KnownBoxesFinder([tiny.BOX])
FACE_FILE = "ip-adapter-plus-face_sd15.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.save_base(tmp_path_factory.mktemp("base") / "sd15")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a public repository: files in `models`, and their encoder in a folder there."""
    folder = tmp_path_factory.mktemp("repository")
    tiny_bases.save_ip_adapter(folder / "models" / FACE_FILE)
    tiny_bases.save_ip_adapter(folder / "models" / "ip-adapter_sd15.safetensors", "linear")
    return folder


def opened(base: Path, **options: Any) -> Any:
    pipe = open_base(base, finder=FINDER, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_three_lines_show_a_person(base: Path, models: Path, family: str, tmp_path: Path) -> None:
    told: list[str] = []
    if family == "sdxl":
        base, models = tiny_bases.save_base(tmp_path / "sdxl", xl=True), tmp_path
        tiny_bases.save_ip_adapter(models / "models" / FACE_FILE, xl=True)
    pipe = opened(base, ip_adapter=models / "models" / FACE_FILE, tell=told.append)
    shown = draw(pipe, reference=tiny.photo(1), **SIZE)
    assert not same(shown, draw(pipe, reference=tiny.photo(2), **SIZE)) and not same(shown, draw(pipe, **SIZE))
    assert (
        pipe.dtype == torch.float32 and pipe.ip_scales == [0.6] and told == []
    )  # a folder says nothing of its licence
    more = opened(base, ip_adapter=f"{models}:models/{FACE_FILE}", preset="likeness")
    assert more.ip_scales == [0.9] and not same(draw(more, reference=tiny.photo(1), **SIZE), shown)


def test_the_encoder_is_found_beside_the_file_or_where_the_publisher_puts_it(
    base: Path, models: Path, tmp_path: Path
) -> None:
    tiny_bases.save_ip_adapter(tmp_path / "sdxl_models" / "x.safetensors", with_encoder=False)
    tiny_ip.encoder(tokens=tiny_ip.TOKENS + 8).save_pretrained(tmp_path / "sdxl_models" / "image_encoder")
    with pytest.raises(WeightsError, match="no such encoder is beside the file: give its folder"):
        opened(base, ip_adapter=tmp_path / "sdxl_models")
    shutil.copytree(models / "models" / "image_encoder", tmp_path / "models" / "image_encoder")
    pipe = opened(
        base, ip_adapter=tmp_path / "sdxl_models" / "x.safetensors"
    )  # not the one beside it, which is another
    assert pipe.image_encoder.config.hidden_size == tiny_ip.TOKENS
    wrong = tmp_path / "sdxl_models" / "image_encoder"
    with pytest.raises(WeightsError, match="the given --image-encoder is another one"):
        opened(base, ip_adapter=models / "models" / FACE_FILE, image_encoder=wrong)
    with pytest.raises(WeightsError, match="holds 2 weights files"):
        opened(base, ip_adapter=models / "models")


def test_lora_and_our_own_adapter(base: Path, tmp_path: Path) -> None:
    pipe = opened(base)
    adapter = tiny_stock.identity(pipe.unet)
    encoder = tiny_stock.encoder()
    facts = dict.fromkeys(("base", "encoder", "feature_layer", "tokens", "licence"), "test")
    adapter.save(tmp_path / "mine" / "adapter", facts)
    encoder.save_pretrained(tmp_path / "mine" / "vision_encoder")
    shown = draw(opened(base, adapter=tmp_path / "mine"), reference=tiny.photo(1), **SIZE)
    assert isinstance(Adapter.load(tmp_path / "mine" / "adapter", pipe.unet), Adapter)
    assert not same(shown, draw(pipe, **SIZE))
    layer = next(name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_q"))
    width = pipe.unet.get_submodule(layer).in_features
    low_rank = {
        f"unet.{layer}.lora_A.weight": torch.randn(2, width, generator=tiny.generator(1)),
        f"unet.{layer}.lora_B.weight": torch.randn(width, 2, generator=tiny.generator(2)),
    }
    save_file(low_rank, tmp_path / "style.safetensors")
    styled = draw(opened(base, lora=tmp_path / "style.safetensors"), **SIZE)
    half = draw(opened(base, lora=tmp_path / "style.safetensors", lora_scale=0.5), **SIZE)
    assert not same(styled, draw(pipe, **SIZE)) and not same(styled, half)
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError, match="cannot be loaded as LoRA of this base"):
        opened(base, lora=tmp_path / "broken.safetensors")


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_and_precision_keep_the_picture(base: Path, models: Path, offload: str) -> None:
    file = models / "models" / FACE_FILE
    whole = draw(opened(base, ip_adapter=file), reference=tiny.photo(1), **SIZE)
    assert same(draw(opened(base, ip_adapter=file, offload=offload), reference=tiny.photo(1), **SIZE), whole)
    half = opened(base, ip_adapter=file, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.ip_adapters[0].dtype == torch.bfloat16
    assert draw(half, reference=tiny.photo(1), **SIZE).isfinite().all()


def test_instant_id_and_face_id_need_no_encoder(base: Path, tmp_path: Path) -> None:
    unet = tiny_ip.unet()
    torch.save(tiny_ip.nested(tiny_faces.instant_id(unet)), tmp_path / "ip-adapter.bin")
    pipe = opened(base, ip_adapter=tmp_path / "ip-adapter.bin")
    pipe.face_recogniser = tiny_faces.RandomEmbedder(512)
    assert pipe.image_encoder is None
    assert not same(draw(pipe, reference=tiny.photo(1), **SIZE), draw(pipe, reference=tiny.photo(2), **SIZE))


def test_what_does_not_fit_raises_one_sentence(base: Path, models: Path, tmp_path: Path) -> None:
    xl = tiny_bases.save_ip_adapter(tmp_path / "xl" / "ip-adapter-plus-face_sdxl_vit-h.safetensors", xl=True)
    flux = tmp_path / "other"
    flux.mkdir()
    (flux / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "model_index.json").write_text(json.dumps({"_class_name": "ImaginePipeline"}))
    (tmp_path / "empty").mkdir()
    for options, error, message in (
        ({"ip_adapter": xl}, WeightsError, f"plus-face-sdxl is made for sdxl, and {base} is another family"),
        ({"base": flux}, WeightsError, "holds a KandinskyPipeline, with which imagine cannot draw a person: choose a"),
        ({"base": ours}, ConfigError, "holds weights of imagine itself: give it with --weights"),
        ({"base": tmp_path / "empty"}, WeightsError, "has no model_index.json that can be read"),
        ({"base": xl}, ConfigError, "is a file, and a base is a folder of diffusers"),
        ({"ip_adapter": "owner/name"}, ConfigError, "is a hub id: name one of its files"),
        ({"ip_adapter": "nothing.safetensors"}, ConfigError, "no file or folder nothing.safetensors, and it is no hub"),
        ({"dtype": "int8"}, ConfigError, "dtype='int8' is unknown"),
        ({"offload": "all"}, ConfigError, "offload='all' is unknown"),
        ({"offload": "sequential"}, ConfigError, "Sequential offloading needs a GPU"),
        ({"lora": tmp_path / "empty"}, WeightsError, "holds 0 safetensors files: name the LoRA's file"),
        ({"ip_adapter": models / "models" / FACE_FILE, "preset": "best"}, ConfigError, "no preset 'best'"),
        ({"base": "sdxl"}, WeightsError, "give that folder with --base stable-diffusion-xl-base-1.0"),
    ):  # fmt: skip
        given: dict[str, Any] = {"base": base, **options}
        with pytest.raises(error, match=message) as caught:
            opened(given.pop("base"), **given)
        assert "\n" not in str(caught.value)


def test_a_hub_id_of_our_adapter_is_fetched_with_its_revision(base: Path) -> None:
    pipe = opened(base)
    with pytest.raises(WeightsError, match="There is no folder someone/adapter, and a hub repository"):
        pipe.load_adapter("someone/adapter", revision="v1")
    with pytest.raises(WeightsError, match="revision is an option of a hub id"):
        pipe.load_adapter(base, revision="v1")
    with pytest.raises(WeightsError, match="There is no option reversion"):
        pipe.load_adapter("someone/adapter", reversion="v1")
