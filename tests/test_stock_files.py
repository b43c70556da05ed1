"""Folders of pipelines that know people are stock folders, and the other way round."""

from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch

import imagine.stock
from imagine.errors import WeightsError
from imagine.pipeline import ImaginePipeline
from imagine.stock import imagined
from imagine.weights import fingerprint
from tests import tiny, tiny_stock
from tests.tiny_stock import OTHER, draw


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def xl(request: Any) -> bool:
    return bool(request.param)


def test_saved_and_loaded_it_draws_the_same_and_the_folder_stays_a_stock_one(xl: bool, tmp_path: Path):
    stock = tiny_stock.stock(xl)
    pipe = tiny_stock.personal(stock, **tiny_stock.readers())
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    wanted, plain = draw(pipe, OTHER, reference=tiny.photo(1)), draw(tiny_stock.stock(xl), OTHER)
    pipe.save_pretrained(tmp_path)
    for cls in (ImaginePipeline, type(pipe)):
        loaded = cls.from_pretrained(tmp_path, finder=pipe.finder)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe) and torch.equal(draw(loaded, OTHER, reference=tiny.photo(1)), wanted)
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    assert type(other) is type(stock) and torch.equal(draw(other, OTHER), plain)
    pipe.unload_adapter()
    pipe.save_pretrained(tmp_path)
    assert ImaginePipeline.from_pretrained(tmp_path).adapter is None


def test_a_stock_folder_becomes_a_pipeline_that_knows_people(xl: bool, tmp_path: Path):
    stock = tiny_stock.stock(xl)
    stock.save_pretrained(tmp_path / "stock", variant="fp16")
    tiny_stock.encoder().save_pretrained(tmp_path / "encoder")
    assert (tmp_path / "stock" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    pipe = ImaginePipeline.from_pretrained(
        tmp_path / "stock", vision_encoder=tmp_path / "encoder", dtype=torch.float32, variant="fp16"
    )
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is imagined(type(stock)) and torch.equal(draw(pipe), draw(stock))
    assert pipe.encoder_fingerprint == fingerprint(tiny_stock.encoder())
    pipe.load_adapter(tiny_stock.identity(pipe.unet))
    other = getattr(imagine.stock, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")).from_pipe(pipe)
    assert other.adapter is pipe.adapter and other.unet is pipe.unet and other.vision_encoder is pipe.vision_encoder


def test_loading_a_part_by_a_name_out_of_reach_is_one_sentence(tmp_path: Path):
    stock = tiny_stock.stock()
    stock.save_pretrained(tmp_path / "stock")
    for name in ("t5_encoder", "vision_encoder", "vae"):
        with pytest.raises(WeightsError, match=f"{name}='nobody/nothing'.*local folder") as caught:
            ImaginePipeline.from_pretrained(tmp_path / "stock", **cast(Any, {name: "nobody/nothing"}))
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="local folder"):
        ImaginePipeline.from_pretrained("nobody-at-all/stable-diffusion")
    with pytest.raises(WeightsError, match="config=FOLDER"):
        (tmp_path / "one.safetensors").write_bytes(b"")
        type(ImaginePipeline.from_pipe(stock)).from_single_file(tmp_path / "one.safetensors")
    index = tmp_path / "stock" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(WeightsError, match="FluxPipeline"):
        ImaginePipeline.from_pretrained(tmp_path / "stock")
