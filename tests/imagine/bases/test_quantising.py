"""Bases that are stored in fewer bits, decoded in tiles and offloaded: families, errors, and what is passed on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from imagine import open_base
from imagine.bases.quantising import QUANTISATIONS, is_quantised, loading_options
from imagine.errors import ConfigError, WeightsError
from imagine.licences import base_names
from imagine.people.faces import KnownBoxesFinder
from tests import tiny, tiny_bases, tiny_transformer_folders, tiny_transformers
from tests.tiny_transformer_pipelines import PROMPT

NAMES = tuple(tiny_transformer_folders.SHORT_NAMES.values())
SIDES = {"qwen": 16, "sana": 512}  # pixels; 8 elsewhere


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base and an adapter for it."""
    folder = tmp_path_factory.mktemp(name)
    base = tiny_transformer_folders.save_base(folder / "base", name)
    return base, tiny_transformer_folders.save_adapter(folder / "adapter", name)


def drawn(folders: tuple[Path, Path], name: str, photo: int | None = 1, **options: Any) -> torch.Tensor:
    pipe = open_base(folders[0], adapter=folders[1], finder=KnownBoxesFinder([tiny.BOX]), device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    side = SIDES.get(name, 8)
    person = {} if photo is None else {"reference": tiny.photo(photo)}
    pictures: torch.Tensor = pipe(
        prompt=PROMPT, height=side, width=side, num_inference_steps=1, output_type="pt", generator=tiny.generator(7),
        **person,
    ).images  # fmt: skip
    return pictures


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4)


def test_a_folder_opens_with_its_adapter_and_every_switch(name: str, folders: tuple[Path, Path]) -> None:
    whole = drawn(folders, name)
    assert not same(whole, drawn(folders, name, photo=2)) and not same(whole, drawn(folders, name, photo=None))
    assert same(drawn(folders, name, offload="model"), whole) and same(drawn(folders, name, offload="group"), whole)
    tiled = drawn(folders, name, tiling=True)
    assert tiled.shape == whole.shape and tiled.isfinite().all()


def test_a_base_in_float8_shows_the_person(name: str, folders: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"quantise": "fp8", "dtype": "bfloat16"}
    shown = drawn(folders, name, **options)
    assert shown.isfinite().all() and not same(shown, drawn(folders, name, photo=2, **options))
    assert same(drawn(folders, name, offload="group", **options), shown)


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_a_unet_in_float8_shows_the_person(xl: bool, tmp_path: Path) -> None:
    base = tiny_bases.save_base(tmp_path / "base", xl)
    file = tiny_bases.save_ip_adapter(
        tmp_path / f"ip-adapter-plus-face_{'sdxl_vit-h' if xl else 'sd15'}.safetensors", xl=xl
    )  # fmt: skip
    pipe = open_base(base, ip_adapter=file, quantise="fp8", device="cpu", finder=KnownBoxesFinder([tiny.BOX]))
    pipe.set_progress_bar_config(disable=True)
    assert any(each.dtype == torch.float8_e4m3fn for each in pipe.unet.parameters())
    given: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16}
    shown = [
        pipe(PROMPT, reference=tiny.photo(number), generator=tiny.generator(7), **given).images for number in (1, 2)
    ]
    assert shown[0].isfinite().all() and not same(*shown)


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "int3"}, "quantise='int3' is unknown: choose from none, int8, fp8, nf4"),
        (
            {"quantise": "fp8", "offload": "sequential"},
            "fp8 cannot be offloaded with sequential: choose none or model or",
        ),
        ({"quantise": "nf4", "offload": "group"}, "nf4 cannot be offloaded with group: choose none or model"),
    ],
)
def test_what_cannot_be_stored_is_one_sentence(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_base(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_bitsandbytes_without_a_gpu_is_one_sentence(quantise: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"Weights in {quantise} need a GPU of NVIDIA: choose fp8"):
        open_base(tmp_path, quantise=quantise)


def test_bitsandbytes_gets_the_large_networks_of_an_index() -> None:
    index = {
        "_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
        "image_encoder": [None, None],
    }  # fmt: skip
    for quantise in ("nf4", "int8"):
        config = loading_options(quantise, index, torch.bfloat16)["quantization_config"]
        assert config.components_to_quantize == ["transformer", "text_encoder_2"]
        assert config.quant_backend == {"nf4": "bitsandbytes_4bit", "int8": "bitsandbytes_8bit"}[quantise]
    assert loading_options("fp8", index, torch.bfloat16) == loading_options("none", index, torch.bfloat16) == {}
    assert is_quantised("unet", "UNet2DConditionModel") and QUANTISATIONS[0] == "none"


@pytest.mark.parametrize("base", base_names())
def test_without_a_network_a_short_name_is_one_sentence(base: str) -> None:
    with pytest.raises(
        WeightsError, match=f"the hub cannot be reached: run `imagine download {base} --output"
    ) as caught:
        open_base(base, adapter="someone/adapter")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_family_size_or_encoder_is_one_sentence(tmp_path: Path) -> None:
    base = tiny_transformer_folders.save_base(tmp_path / "base", "flux2")
    save = tiny_transformer_folders.save_adapter
    other = save(tmp_path / "family", "z_image")
    narrow = save(tmp_path / "encoder", "flux2", spec={"input_width": 20})
    small = tmp_path / "size" / "adapter"
    transformer = tiny_transformers.transformer("flux2", num_layers=1, joint_attention_dim=48)
    tiny_transformers.adapter(transformer).save(small, tiny_transformer_folders.FACTS)
    for adapter, message in (
        (other, r"was made for Z-Image, but this transformer is FLUX\.2"),
        (small, r"was made for a FLUX\.2 transformer of width 32 with 4 branches, but this one has width 32 and place"),
        (narrow, "features of width 20, but the vision encoder gives 24"),
    ):
        with pytest.raises(WeightsError, match=message) as caught:
            drawn((base, adapter), "flux2")
        assert "\n" not in str(caught.value)
