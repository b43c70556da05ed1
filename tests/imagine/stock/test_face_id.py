"""FaceID files draw diffusers' pictures, show references, and load only completely."""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imagine.errors import ConfigError, WeightsError
from imagine.people.faces import KnownBoxesFinder
from imagine.people.readings import with_embedding
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_ip, tiny_stock
from tests.imagine.stock.test_second_pass import SMALL
from tests.tiny_stock import draw, same

File = dict[str, dict[str, Tensor]]

CLOSE = 1e-5
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


def features(pipe: Any, seed: int) -> Any:
    """Return random features of a face, the negative ones first; for FaceID Plus those of a picture too.

    diffusers takes the picture's from its projection, where they are set as in its documentation.
    """
    face = torch.randn(2, 1, FACE, generator=tiny.generator(seed))
    vision = torch.randn(2, 1, 5, tiny_ip.TOKENS, generator=tiny.generator(seed + 1))
    if not getattr(pipe, "ip_adapters", ()):
        projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        if hasattr(projection, "clip_embeds"):
            projection.clip_embeds = vision
        return face
    if pipe.ip_adapters[0].branch_specs[0].projection == "faceid":
        return face
    return torch.stack([with_embedding(face[row, 0], vision[row, 0])[None] for row in range(2)])


def show(pipe: Any, seed: int = 3) -> Tensor:
    return draw(pipe, ip_adapter_image_embeds=[features(pipe, seed)], **SIZE)


@pytest.mark.parametrize("shortcut", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("make", [face_id, face_id_plus])
def test_pictures_are_those_of_diffusers(make: Callable[[Any], File], shortcut: bool, xl: bool):
    stock, ours = pipes(xl)
    plain, drawn = draw(stock, **SIZE), []
    for pipe in (stock, ours):
        if pipe is ours:
            ours.load_ip_adapter(make(pipe.unet), **PLACE, shortcut=shortcut)
        else:
            stock.load_ip_adapter(make(pipe.unet), **PLACE)
            stock.unet.encoder_hid_proj.image_projection_layers[0].shortcut = shortcut
        drawn += [show(pipe), show(pipe, seed=5)]
        pipe.set_ip_adapter_scale(0.3)
        drawn.append(show(pipe))
    for one, other in zip(drawn[:3], drawn[3:], strict=True):
        assert (one - other).abs().max() <= CLOSE
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
        reports = ours.load_ip_adapter([source, base], image_encoder_folder=None)
        assert [report.variant for report in reports] == ["FaceID", "base"]
        assert "non-commercial" in " ".join(reports[0].notes) and not reports[1].notes
        assert (draw(ours, ip_adapter_image_embeds=embeds, **SIZE) - wanted).abs().max() <= CLOSE
    ours.unload_ip_adapter()
    ours.load_ip_adapter(tmp_path, weight_name="face.bin", image_encoder_folder=None)
    assert show(ours).isfinite().all()


def test_strength_0_and_unloading_give_the_base_again_and_a_folder_keeps_the_adapter(xl: bool, tmp_path: Any):
    """diffusers leaves the LoRA on in the first case, and refuses nothing in the last, but loses the adapter."""
    _, ours = pipes(xl)
    plain = draw(ours, **SIZE)
    weights = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    ours.load_ip_adapter(face_id(ours.unet), **PLACE)
    shown = show(ours)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert same(show(again), shown) and not same(shown, plain)
    ours.set_ip_adapter_scale(0.0)
    assert torch.equal(show(ours), plain)
    ours.load_ip_adapter(face_id(ours.unet, 9), **PLACE)
    assert not same(show(ours), shown)
    ours.unload_ip_adapter()
    after = ours.unet.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)
    assert torch.equal(draw(ours, **SIZE), plain)


def test_what_diffusers_loaded_before_is_unloaded_with_its_lora(xl: bool):
    stock, _ = pipes(xl)
    plain = draw(stock, **SIZE)
    stock.load_ip_adapter(face_id(stock.unet), **PLACE)
    ours = personalised_class(type(stock)).from_pipe(stock)
    ours.set_progress_bar_config(disable=True)
    with pytest.raises(WeightsError, match=r"takes no reference: call unload_ip_adapter\(\)"):
        draw(ours, reference=tiny.photo(1), **SIZE)
    with pytest.raises(WeightsError, match=r"unload_ip_adapter\(\) first, and load the IP-Adapter again"):
        ours.load_adapter(tiny_stock.identity(ours.unet))
    ours.unload_ip_adapter()
    assert same(draw(ours, **SIZE), plain)


def test_small_faces_are_redrawn(xl: bool):
    _, ours = pipes(xl)
    ours.load_ip_adapter(face_id(ours.unet), **PLACE)
    ours.finder = KnownBoxesFinder([SMALL])
    embeds = [torch.randn(2, 1, FACE, generator=tiny.generator(3))]
    out = ours(
        "a person", ip_adapter_image_embeds=embeds, height=64, width=64, num_inference_steps=2, refine_faces=True
    )
    assert out.refined == 1 and not out.notes


def test_our_own_adapter_stands_beside_it(xl: bool):
    _, ours = pipes(xl)
    ours.load_ip_adapter(face_id(ours.unet), **PLACE)
    alone = show(ours)
    ours.load_adapter(tiny_stock.identity(ours.unet))
    assert same(show(ours), alone)  # nobody is shown by the other adapter
    ours.unload_adapter()
    assert torch.equal(show(ours), alone)


def test_a_picture_is_refused_where_a_face_is_read(xl: bool):
    _, ours = pipes(xl)
    ours.load_ip_adapter(face_id(ours.unet), **PLACE)
    with pytest.raises(ConfigError, match="reads the embedding of a face, not a picture: give the photo as reference"):
        draw(ours, ip_adapter_image=tiny.photo(1), **SIZE)
    wrong = [torch.zeros(2, 1, FACE + 1)]
    with pytest.raises(ConfigError, match="use the face recogniser that belongs to it"):
        draw(ours, ip_adapter_image_embeds=wrong, **SIZE)


def lacking(part: str, name: str) -> Callable[[File], Any]:
    return lambda file: file[part].pop(name)


def changed(part: str, name: str, change: Callable[[Tensor], Tensor]) -> Callable[[File], Any]:
    return lambda file: file[part].update({name: change(file[part][name])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking("image_proj", "proj.2.bias"), "lacks image_proj.proj.2.bias: download it again"),
        (lacking("image_proj", "proj.0.weight"), "lacks tensors of its FaceID projection: download it again"),
        (lambda file: file["image_proj"].update(extra=torch.zeros(1)), "holds the unknown image_proj.extra"),
        (lacking("ip_adapter", "3.to_v_ip.weight"), "lacks ip_adapter.3.to_v_ip.weight"),
        (lacking("ip_adapter", "0.to_q_lora.up.weight"), "lacks ip_adapter.0.to_q_lora.up.weight"),
        (changed("ip_adapter", "1.to_q_lora.up.weight", lambda old: old[:-1]), "1.to_q_lora.up.weight of shape"),
        (
            lambda file: file["ip_adapter"].update({"99.to_q_lora.up.weight": torch.zeros(1, 1)}),
            "lacks ip_adapter.99.to_q_lora.down.weight",
        ),
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
    ours.load_ip_adapter(face_id_plus(ours.unet), **PLACE)
    before = show(ours)
    with pytest.raises(WeightsError, match=r"layers that read text of width .* use the file made for it"):
        ours.load_ip_adapter(face_id_plus(tiny_ip.unet(not xl)), **PLACE)
    assert torch.equal(show(ours), before)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ours.unload_ip_adapter()
    ours.load_ip_adapter(face_id(ours.unet, with_lora=False), **PLACE)
    assert torch.equal(torch.get_rng_state(), state)
