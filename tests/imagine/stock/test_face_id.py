"""FaceID files load and draw through diffusers' own code, as in diffusers' own pipelines, and only completely."""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imagine.adapter.adapter import is_attached
from imagine.errors import WeightsError
from imagine.people.faces import KnownBoxesFinder
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_ip, tiny_stock
from tests.imagine.stock.test_second_pass import SMALL
from tests.tiny_stock import draw, same

File = dict[str, dict[str, Tensor]]

FACE = 20  # width of the face recogniser's features
SIZE = {"height": 16, "width": 16}
PLACE: dict[str, Any] = {"subfolder": "", "weight_name": "", "image_encoder_folder": None}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"]),
]


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = tiny.generator(seed)
    return {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def mlp(width: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the part that reads the recogniser's features, and of the norm after it."""
    return {
        "proj.0.weight": (2 * FACE, FACE), "proj.0.bias": (2 * FACE,), "proj.2.weight": (outputs, 2 * FACE),
        "proj.2.bias": (outputs,), "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip


def lora(denoiser: Any, seed: int) -> dict[str, Tensor]:
    """Return LoRA of rank 2 for all attention of a denoiser, which diffusers numbers 0, 1, 2, ..."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(denoiser.attn_processors):
        attn = denoiser.get_submodule(name.removesuffix(".processor"))
        for part, layer in {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}.items():
            shapes[f"{number}.to_{part}_lora.down.weight"] = (2, layer.in_features)
            shapes[f"{number}.to_{part}_lora.up.weight"] = (layer.out_features, 2)
    return random_tensors(shapes, seed)


def face_id(denoiser: Any, seed: int = 2, with_lora: bool = True) -> File:
    """Return a FaceID file, which diffusers reads as an IPAdapterFaceIDImageProjection."""
    width = denoiser.config.cross_attention_dim
    branches = tiny_ip.nested(tiny_ip.tensors("linear", denoiser, seed))["ip_adapter"]
    projection = random_tensors(mlp(width, 4 * width), seed + 1)
    return {"image_proj": projection, "ip_adapter": branches | (lora(denoiser, seed + 2) if with_lora else {})}


def face_id_plus(denoiser: Any, seed: int = 2) -> File:
    """Return a FaceID Plus file, whose projection also reads the tokens of a CLIP encoder."""
    width = denoiser.config.cross_attention_dim
    shapes: dict[str, tuple[int, ...]] = {
        "proj_in.weight": (width, tiny_ip.TOKENS), "proj_in.bias": (width,), "proj_out.weight": (width, width),
        "proj_out.bias": (width,), "norm_out.weight": (width,), "norm_out.bias": (width,),
    }  # fmt: skip
    for number in range(4):
        attn, feed = f"layers.{number}.0", f"layers.{number}.1"
        shapes |= {f"{name}.{kind}": (width,) for name in (f"{attn}.norm1", f"{attn}.norm2", f"{feed}.0")
                   for kind in ("weight", "bias")}  # fmt: skip
        shapes |= {f"{attn}.to_q.weight": (64, width), f"{attn}.to_kv.weight": (128, width)}
        shapes |= {f"{attn}.to_out.weight": (width, 64), f"{feed}.1.weight": (4 * width, width)}
        shapes |= {f"{feed}.3.weight": (width, 4 * width)}
    resampler = {f"perceiver_resampler.{name}": shape for name, shape in shapes.items()}
    projection = random_tensors({**mlp(width, 4 * width), **resampler}, seed + 1)
    return {**face_id(denoiser, seed), "image_proj": projection}


def pipes(xl: bool) -> tuple[Any, Any]:
    """Return the stock pipeline and ours, with equal weights."""
    stock: Any = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    parts = tiny_ip.components(xl)
    made = stock(**parts), personalised_class(stock)(**{**parts, "unet": copy.deepcopy(parts["unet"])})
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    return made


def show(pipe: Any, seed: int = 3) -> Tensor:
    """Draw from random features of a face, and for FaceID Plus of a picture, the negative ones first."""
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    if hasattr(projection, "clip_embeds"):  # set as in diffusers' documentation
        projection.clip_embeds = torch.randn(2, 1, 5, tiny_ip.TOKENS, generator=tiny.generator(seed + 1))
        projection.shortcut = True
    return draw(pipe, ip_adapter_image_embeds=[torch.randn(2, 1, FACE, generator=tiny.generator(seed))], **SIZE)


@pytest.mark.parametrize("make", [face_id, face_id_plus])
def test_pictures_are_those_of_diffusers(make: Callable[[Any], File], xl: bool):
    stock, ours = pipes(xl)
    plain, drawn = draw(stock, **SIZE), []
    for pipe in (stock, ours):
        pipe.load_ip_adapter(make(pipe.unet), **PLACE)
        drawn += [show(pipe), show(pipe, seed=5)]
        pipe.set_ip_adapter_scale(0.3)
        drawn.append(show(pipe))
    assert type(ours.unet.encoder_hid_proj.image_projection_layers[0]).__name__.startswith("IPAdapterFaceID")
    assert all(map(torch.equal, drawn[:3], drawn[3:]))
    assert not any(torch.allclose(drawn[0], each, atol=1e-3) for each in (drawn[1], drawn[2], plain))


def test_a_file_with_a_base_file_beside_it_is_read_from_any_place(xl: bool, tmp_path: Any):
    stock, ours = pipes(xl)
    file, base = face_id(stock.unet), tiny_ip.nested(tiny_ip.tensors("linear", stock.unet, 7))
    embeds = [torch.randn(2, 1, width, generator=tiny.generator(width)) for width in (FACE, tiny_ip.POOLED)]
    stock.load_ip_adapter([file, base], subfolder=["", ""], weight_name=["", ""], image_encoder_folder=None)
    wanted = draw(stock, ip_adapter_image_embeds=embeds, **SIZE)
    flat = {f"{part}.{name}": tensor for part, each in file.items() for name, tensor in each.items()}
    save_file(flat, tmp_path / "face.safetensors")
    torch.save(file, tmp_path / "face.bin")
    for source in (flat, tmp_path / "face.safetensors", tmp_path / "face.bin"):
        assert ours.load_ip_adapter([source, base], image_encoder_folder=None) == []
        assert torch.equal(draw(ours, ip_adapter_image_embeds=embeds, **SIZE), wanted)
    ours.unload_ip_adapter()
    ours.load_ip_adapter(tmp_path, weight_name="face.bin", image_encoder_folder=None)
    assert show(ours).isfinite().all()


def test_unloading_removes_the_lora_too_and_another_file_brings_its_own(xl: bool, tmp_path: Any):
    """diffusers leaves the LoRA of the first file on, and does not load that of the second."""
    stock, ours = pipes(xl)
    plain, second = draw(ours, **SIZE), face_id(ours.unet, 9)
    weights = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    stock.load_ip_adapter(second, **PLACE)
    ours.load_ip_adapter(face_id(ours.unet), **PLACE)
    ours.load_ip_adapter(second, **PLACE)
    assert torch.equal(show(ours), show(stock))
    ours.unload_ip_adapter()
    after = ours.unet.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)
    assert same(draw(ours, **SIZE), plain)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert same(draw(again, **SIZE), plain)


def test_small_faces_are_redrawn(xl: bool):
    _, ours = pipes(xl)
    ours.load_ip_adapter(face_id(ours.unet), **PLACE)
    ours.finder = KnownBoxesFinder([SMALL])
    embeds = [torch.randn(2, 1, FACE, generator=tiny.generator(3))]
    out = ours(
        "a person", ip_adapter_image_embeds=embeds, height=64, width=64, num_inference_steps=2, refine_faces=True
    )
    assert out.refined == 1 and not out.notes


def test_another_adapter_beside_it_raises_one_sentence_in_either_order(xl: bool):
    _, ours = pipes(xl)
    file = face_id(ours.unet)
    adapter = tiny_stock.identity(ours.unet)
    ours.load_ip_adapter(file, **PLACE)
    with pytest.raises(WeightsError, match=r"unload_ip_adapter\(\) first.*beside the adapter, not a FaceID file\.$"):
        ours.load_adapter(adapter)
    ours.unload_ip_adapter()
    ours.load_adapter(adapter)
    ours.load_adapter(tiny.text_adapter(ours.unet))
    both = r"call unload_adapter\(\) and unload_adapter\('text_adapter'\) first"
    with pytest.raises(WeightsError, match=f"is a FaceID file.*{both}, or use a base, Plus or Full file"):
        ours.load_ip_adapter(file, **PLACE)
    assert ours.adapter is adapter and is_attached(ours.unet, adapter)
    ours.unload_adapter()
    with pytest.raises(WeightsError, match=r"call unload_adapter\('text_adapter'\) first"):
        ours.load_ip_adapter(file, **PLACE)
    ours.unload_adapter("text_adapter")
    ours.load_ip_adapter(file, **PLACE)


def lacking(part: str, name: str) -> Callable[[File], Any]:
    return lambda file: file[part].pop(name)


def changed(part: str, name: str, change: Callable[[Tensor], Tensor]) -> Callable[[File], Any]:
    return lambda file: file[part].update({name: change(file[part][name])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking("image_proj", "proj.2.bias"), "FaceID projection that diffusers cannot load.*download it again"),
        (lacking("image_proj", "proj.0.weight"), "FaceID projection that diffusers cannot load"),
        (lambda file: file["image_proj"].update(extra=torch.zeros(1)), "FaceID projection that diffusers cannot load"),
        (lacking("ip_adapter", "3.to_v_ip.weight"), "lacks ip_adapter.3.to_v_ip.weight"),
        (lacking("ip_adapter", "0.to_q_lora.up.weight"), "lacks ip_adapter.0.to_q_lora.up.weight"),
        (changed("ip_adapter", "1.to_q_lora.up.weight", lambda old: old[:-1]), "1.to_q_lora.up.weight of shape"),
        (lambda file: file["ip_adapter"].update({"99.to_q_lora.up.weight": torch.zeros(1, 1)}), "holds the unknown"),
        (changed("ip_adapter", "3.to_k_ip.weight", lambda old: old * float("nan")), "not finite, in ip_adapter.3.to_k"),
    ],
)
def test_a_file_that_diffusers_would_not_load_completely_changes_nothing(
    spoil: Callable[[File], Any], message: str, xl: bool
):
    _, ours = pipes(xl)
    file = face_id(ours.unet)
    given: dict[str, Any] = {"ip_adapter_image": tiny.photo(1), **SIZE}
    spoil(file)
    ours.load_ip_adapter(tiny_ip.nested(tiny_ip.tensors("plus", ours.unet)), image_encoder_folder=None)
    ours.set_ip_adapter_scale(0.4)
    before = draw(ours, **given)
    with pytest.raises(WeightsError, match=message) as caught:
        ours.load_ip_adapter(file, **PLACE)
    assert "\n" not in str(caught.value)
    assert torch.equal(draw(ours, **given), before)


def test_a_file_for_another_base_changes_nothing_and_no_random_number_is_drawn(xl: bool):
    _, ours = pipes(xl)
    file = face_id_plus(ours.unet)
    ours.load_ip_adapter(file, **PLACE)
    before = show(ours)
    with pytest.raises(WeightsError, match=r"layers that read text of width .* use the file made for it"):
        ours.load_ip_adapter(face_id_plus(tiny_ip.unet(not xl)), **PLACE)
    assert torch.equal(show(ours), before)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ours.unload_ip_adapter()
    ours.load_ip_adapter(face_id(ours.unet, with_lora=False), **PLACE)
    assert torch.equal(torch.get_rng_state(), state)
