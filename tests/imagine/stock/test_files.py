"""Folders of personalised pipelines are stock folders, and stock folders load as personalised pipelines."""

import logging
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import imagine.stock.pipelines
from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError, WeightsError
from imagine.inspection import inspect
from imagine.networks.weights import fingerprint
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_ip, tiny_stock
from tests.folders import contents
from tests.tiny_stock import OTHER, draw


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal up to rounding: loaded weights may be unaligned in memory, and some CPUs then sum in another order."""
    return torch.allclose(left, right, rtol=0, atol=1e-5)


def test_saved_and_loaded_it_draws_the_same_and_the_folder_stays_a_stock_one(xl: bool, tmp_path: Path):
    stock = tiny_stock.stock(xl)
    pipe = tiny_stock.personal(stock, **tiny_stock.readers())
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    wanted, plain = draw(pipe, OTHER, reference=tiny.photo(1)), draw(tiny_stock.stock(xl), OTHER)
    pipe.save_pretrained(tmp_path)
    for cls in (ImaginePipeline, type(pipe)):
        loaded = cls.from_pretrained(tmp_path, finder=pipe.finder)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe) and same(draw(loaded, OTHER, reference=tiny.photo(1)), wanted)
    other_encoder = tiny_stock.encoder()
    torch.nn.init.normal_(next(other_encoder.parameters()))
    loaded = ImaginePipeline.from_pretrained(tmp_path, finder=pipe.finder, vision_encoder=other_encoder)
    with pytest.raises(WeightsError, match="was trained with the vision encoder"):
        draw(loaded, OTHER, reference=tiny.photo(1))
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    assert type(other) is type(stock) and same(draw(other, OTHER), plain)
    pipe.unload_adapter()
    pipe.save_pretrained(tmp_path)
    assert ImaginePipeline.from_pretrained(tmp_path).adapter is None


def test_a_stock_folder_loads_as_a_personalised_pipeline(xl: bool, tmp_path: Path):
    stock = tiny_stock.stock(xl)
    stock.save_pretrained(tmp_path / "stock", variant="fp16")
    tiny_stock.encoder().save_pretrained(tmp_path / "encoder")
    assert (tmp_path / "stock" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    pipe = ImaginePipeline.from_pretrained(
        tmp_path / "stock", vision_encoder=tmp_path / "encoder", dtype=torch.float32, variant="fp16"
    )
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is personalised_class(type(stock)) and same(draw(pipe), draw(stock))
    assert pipe.encoder_fingerprint == fingerprint(tiny_stock.encoder())
    pipe.load_adapter(tiny_stock.identity(pipe.unet))
    other = getattr(imagine.stock.pipelines, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")).from_pipe(pipe)
    assert other.adapter is pipe.adapter and other.unet is pipe.unet and other.vision_encoder is pipe.vision_encoder


def test_ip_adapters_are_saved_with_their_encoder_and_scales(tmp_path: Path):
    pipe = personalised_class(diffusers.StableDiffusionPipeline)(**tiny_ip.components(False))
    files = [tiny_ip.nested(tiny_ip.tensors(kind, pipe.unet, seed)) for seed, kind in enumerate(("plus", "linear"))]
    pipe.load_ip_adapter(files, image_encoder_folder=None)
    images: dict[str, Any] = {"ip_adapter_image": [tiny.photo(1), tiny.photo(2)], "height": 16, "width": 16}
    full = draw(pipe, **images)
    pipe.set_ip_adapter_scale([{"down": 0.3, "up": {"block_1": [0.0, 1.0]}}, 0.7])
    wanted = draw(pipe, **images)
    pipe.save_pretrained(tmp_path)
    loaded = ImaginePipeline.from_pretrained(tmp_path)
    assert not torch.equal(wanted, full) and torch.equal(draw(loaded, **images), wanted)
    without = ImaginePipeline.from_pretrained(tmp_path, unet=None)
    with pytest.raises(ConfigError, match="made without a unet"):
        without.set_ip_adapter_scale(0.5)
    assert torch.equal(draw(ImaginePipeline.from_pipe(without, unet=tiny_ip.unet()), **images), wanted)
    without.unload_ip_adapter()
    assert not without.ip_adapters


def test_a_component_may_be_in_a_folder_inside_a_hub_repository(tmp_path: Path):
    """The public image encoder has this layout; here it is placed in the cache, as after a download."""
    tiny_stock.stock().save_pretrained(tmp_path / "stock")
    cached = tmp_path / "cache" / "models--owner--name"
    tiny_ip.encoder().save_pretrained(cached / "snapshots" / "0a1b" / "models" / "image_encoder")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    hub: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    place = "owner/name/models/image_encoder"
    pipe = ImaginePipeline.from_pretrained(tmp_path / "stock", vision_encoder=place, **hub)
    assert fingerprint(pipe.vision_encoder) == fingerprint(tiny_ip.encoder())
    with pytest.raises(WeightsError, match="vision_encoder='owner/name/models/none'"):
        ImaginePipeline.from_pretrained(tmp_path / "stock", vision_encoder="owner/name/models/none", **hub)


def test_a_whole_clip_model_raises_one_sentence(tmp_path: Path):
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPModel(
        CLIPConfig(text_config={**small, "vocab_size": 9}, vision_config={**small, "image_size": 16, "patch_size": 8})
    ).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="give vision_encoder=CLIPVisionModelWithProjection"):
        ImaginePipeline.from_pipe(tiny_stock.stock(), vision_encoder=tmp_path)


def test_an_unavailable_component_raises_one_sentence(tmp_path: Path):
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


# --- whole or not at all ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_lacks_the_encoder_leaves_the_folder_as_it_was(existing: bool, tmp_path: Path):
    pipe, folder = tiny_stock.personal(tiny_stock.stock()), tmp_path / "saved"
    if existing:
        pipe.save_pretrained(folder)
    before = contents(tmp_path)
    pipe.vision_encoder = None
    with pytest.raises(WeightsError, match="no encoder for references"):
        pipe.save_pretrained(folder)
    assert contents(tmp_path) == before and folder.exists() == existing


@pytest.mark.parametrize("first", [True, False])
def test_an_earlier_save_never_hides_a_later_one_in_the_other_format(first: bool, tmp_path: Path):
    """Loading prefers safetensors files, so those of an earlier save must not stay beside new .bin files."""
    pipe = tiny_stock.personal(tiny_stock.stock())
    pipe.save_pretrained(tmp_path, safe_serialization=first)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    wanted = draw(pipe, reference=tiny.photo(1))
    pipe.save_pretrained(tmp_path, safe_serialization=not first)
    ending = "bin" if first else "safetensors"
    weights = [file.name for file in (tmp_path / "unet").iterdir() if file.name != "config.json"]
    assert weights == [f"diffusion_pytorch_model.{ending}"]
    loaded = ImaginePipeline.from_pretrained(tmp_path, finder=pipe.finder)
    loaded.set_progress_bar_config(disable=True)
    assert same(draw(loaded, reference=tiny.photo(1)), wanted)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_lora_is_saved_fused_or_not_at_all(part: str, tmp_path: Path):
    """diffusers would write the wrapped layers under names that loading replaces by random numbers."""
    from peft import LoraConfig

    pipe = tiny_stock.personal(tiny_stock.stock())
    target = "to_q" if part == "unet" else "q_proj"
    getattr(pipe, part).add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    wanted = draw(pipe, reference=tiny.photo(1))
    with pytest.raises(WeightsError, match=rf"LoRA weights are loaded into {part}.*unload_lora_weights\(\) first"):
        pipe.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    pipe.fuse_lora(components=[part])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    loaded = ImaginePipeline.from_pretrained(tmp_path, finder=pipe.finder)
    loaded.set_progress_bar_config(disable=True)
    assert same(draw(loaded, reference=tiny.photo(1)), wanted)


def test_an_ip_adapter_that_diffusers_loaded_is_not_lost_by_a_save(tmp_path: Path):
    stock = diffusers.StableDiffusionPipeline(**tiny_ip.components(False))
    file = tiny_ip.nested(tiny_ip.tensors("plus", stock.unet))
    stock.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)
    pipe = ImaginePipeline.from_pipe(stock)
    with pytest.raises(WeightsError, match=r"unload_ip_adapter\(\) first, and load the IP-Adapter again after"):
        pipe.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    pipe.unload_ip_adapter()
    pipe.save_pretrained(tmp_path)


def test_adapters_of_an_earlier_save_are_removed(tmp_path: Path):
    stock = tiny_stock.stock()
    pipe = tiny_stock.personal(stock)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "ip_0").mkdir()
    (tmp_path / "ip_0" / "adapter.safetensors").touch()
    (tmp_path / "README.md").write_text("mine")
    pipe.unload_adapter()
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "ip_0").exists() and not (tmp_path / "adapter").exists()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_adapters_are_saved_and_loaded_under_the_variants_name(tmp_path: Path):
    """Two variants of one pipeline share a folder, as in diffusers."""
    for pipe in (tiny_stock.personal(tiny_stock.stock()), tiny.pipeline()):
        folder = tmp_path / type(pipe).__name__
        pipe.save_pretrained(folder, variant="fp16")
        assert [file.name for file in (folder / "adapter").iterdir()] == ["adapter.fp16.safetensors"]
        assert "vision" in inspect(folder)["adapters"]["adapter"]["branches"]
        assert pipe.adapter is not None
        changed = pipe.adapter.state_dict()
        saved = {name: tensor.clone() for name, tensor in changed.items()}
        for tensor in changed.values():
            tensor.add_(1)
        pipe.save_pretrained(folder)
        options: dict[str, Any] = {"finder": pipe.finder}
        for variant, wanted in (("fp16", saved), (None, changed)):
            loaded = ImaginePipeline.from_pretrained(folder, variant=variant, **options).adapter
            assert loaded is not None
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_one_variant_loads_without_naming_it(safe: bool, tmp_path: Path):
    pipe = tiny_stock.personal(tiny_stock.stock())
    pipe.save_pretrained(tmp_path, safe_serialization=safe, variant="fp16")
    wanted = draw(pipe, reference=tiny.photo(1))
    options: dict[str, Any] = {"finder": pipe.finder}
    for variant in (None, "fp16"):
        loaded = ImaginePipeline.from_pretrained(tmp_path, variant=variant, **options)
        loaded.set_progress_bar_config(disable=True)
        assert same(draw(loaded, reference=tiny.photo(1)), wanted)
    with pytest.raises(WeightsError, match="has no files of the variant 'bf16'; give variant='fp16'"):
        ImaginePipeline.from_pretrained(tmp_path, variant="bf16")
    for variant in ("bf16", None):
        pipe.save_pretrained(tmp_path, safe_serialization=safe, variant=variant)
        if variant is not None:
            with pytest.raises(WeightsError, match="no files without a variant; give variant='bf16' or variant='fp16'"):
                ImaginePipeline.from_pretrained(tmp_path)
    assert ImaginePipeline.from_pretrained(tmp_path).adapter is not None


@pytest.mark.parametrize(
    ("part", "file", "kind"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "UNet2DConditionModel"),
        ("vae", "diffusion_pytorch_model.safetensors", "AutoencoderKL"),
        ("text_encoder", "model.safetensors", "CLIPTextModel"),
    ],
)
def test_a_folder_that_lacks_weights_is_refused_not_filled_with_random_numbers(
    part: str, file: str, kind: str, tmp_path: Path
):
    tiny_stock.stock().save_pretrained(tmp_path)
    path = tmp_path / part / file
    tensors = load_file(path)
    tensors["unknown"] = tensors.pop(max(tensors))
    save_file(tensors, path, {"format": "pt"})
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    with pytest.raises(WeightsError, match=f"lacks weights of its {kind}, which would become random"):
        ImaginePipeline.from_pretrained(tmp_path)
    assert before == [(each.handlers, each.propagate, each.level) for each in loggers]
    tiny_stock.stock().save_pretrained(tmp_path)
    save_file({**load_file(path), "unknown": tensors["unknown"]}, path, {"format": "pt"})  # not needed, as in diffusers
    assert ImaginePipeline.from_pretrained(tmp_path).unet is not None


def test_a_pipeline_without_a_needed_part_is_not_saved(tmp_path: Path):
    pipe = tiny_stock.personal(tiny_stock.stock())
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(pipe, name)
        setattr(pipe, name, None)
        with pytest.raises(WeightsError, match=f"has no {name}, so what is saved could not be loaded"):
            pipe.save_pretrained(tmp_path)
        setattr(pipe, name, part)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_with_several_variants_but_not_the_plain_one_asks_for_one(tmp_path: Path):
    adapter = tiny.identity_adapter(tiny.denoiser())
    metadata = dict.fromkeys(("base", "encoder", "feature_layer", "tokens", "licence"), "-")
    adapter.save(tmp_path, metadata, "fp16")
    assert Adapter.load(tmp_path, tiny.denoiser()).metadata["base"] == "-"  # the only one
    adapter.save(tmp_path, metadata, "bf16")
    assert Adapter.load(tmp_path, tiny.denoiser(), variant="bf16").metadata["base"] == "-"
    with pytest.raises(WeightsError, match=r"adapter.bf16.safetensors, adapter.fp16.safetensors\): give variant="):
        Adapter.load(tmp_path, tiny.denoiser())


def test_folders_of_bin_files_load_as_in_diffusers(xl: bool, tmp_path: Path):
    stock = tiny_stock.stock(xl)
    stock.save_pretrained(tmp_path / "stock", safe_serialization=False)
    assert not list((tmp_path / "stock" / "unet").glob("*.safetensors"))
    encoder = tiny_ip.encoder()
    (tmp_path / "encoder").mkdir()
    encoder.config.save_pretrained(tmp_path / "encoder")
    torch.save(encoder.state_dict(), tmp_path / "encoder" / "pytorch_model.bin")
    pipe = ImaginePipeline.from_pretrained(tmp_path / "stock", vision_encoder=tmp_path / "encoder")
    pipe.set_progress_bar_config(disable=True)
    assert same(draw(pipe), draw(stock)) and fingerprint(pipe.vision_encoder) == fingerprint(encoder)
    with pytest.raises(WeightsError, match="safetensors"):
        ImaginePipeline.from_pretrained(tmp_path / "stock", use_safetensors=True)


def test_code_in_a_bin_file_does_not_run(tmp_path: Path):
    stock, ran = tiny_stock.stock(), tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    stock.save_pretrained(tmp_path / "stock", safe_serialization=False)
    file = tmp_path / "stock" / "unet" / "diffusion_pytorch_model.bin"
    torch.save({**torch.load(file), "trap": Trap()}, file)
    with pytest.raises(WeightsError, match="cannot be loaded"):
        ImaginePipeline.from_pretrained(tmp_path / "stock")
    assert not ran.exists()
