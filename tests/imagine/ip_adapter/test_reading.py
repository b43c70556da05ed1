"""Import and export of standard files: predictions equal diffusers', nothing is lost, and misfits raise a sentence."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagine.adapter.adapter import Adapter, BranchSpec, prepare, saved_specs
from imagine.adapter.projections import Kind
from imagine.errors import WeightsError
from imagine.ip_adapter.export import ExportReport, export_adapter
from imagine.ip_adapter.layout import (
    COMFYUI,
    INVOKEAI,
    KOHYA_FILE,
    PLUS_DEPTH,
    PLUS_HEAD,
    WEBUI,
    Layout,
    projection_shapes,
    read_layout,
)
from imagine.ip_adapter.reading import check_encoder, import_adapter, read_ip_adapter
from imagine.records import Conditioning, Tokens
from tests import tiny, tiny_ip

Flat = dict[str, Tensor]
CLOSE = 1e-5


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def xl(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def base(xl: bool) -> Any:
    return tiny_ip.unet(xl)


def inputs(unet: Any, rows: int = 2) -> dict[str, Any]:
    """Return latents, time and text for one call, without cross_attention_kwargs."""
    random = torch.Generator().manual_seed(11)
    call: dict[str, Any] = {
        "sample": torch.randn(rows, 4, 8, 8, generator=random),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": torch.randn(rows, 7, unet.config.cross_attention_dim, generator=random),
    }
    if unet.config.addition_embed_type == "text_time":
        pooled = torch.randn(rows, unet.config.projection_class_embeddings_input_dim - 6 * 4, generator=random)
        call["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.rand(rows, 6, generator=random)}
    return call


def features(kind: str, images: int, rows: int = 2, length: int = 5) -> Tensor:
    random = torch.Generator().manual_seed(12)
    shape = (rows, images, tiny_ip.POOLED) if kind == "linear" else (rows, images, length, tiny_ip.TOKENS)
    return torch.randn(shape, generator=random)


@torch.no_grad()
def theirs(unet: Any, files: list[Flat], seen: list[Tensor], low: bool, extra: dict[str, Any] | None = None) -> Tensor:
    """Return the prediction of diffusers' own IP-Adapter on a copy of the base."""
    unet = copy.deepcopy(unet)
    unet._load_ip_adapter_weights([tiny_ip.nested(file) for file in files], low_cpu_mem_usage=low)
    call = inputs(unet)
    added = {**call.pop("added_cond_kwargs", {}), "image_embeds": seen}
    return unet(**call, added_cond_kwargs=added, **(extra or {}), return_dict=False)[0]


@torch.no_grad()
def ours(unet: Any, adapter: Adapter, seen: Tensor, name: str = "vision") -> Tensor:
    with adapter.attach(unet):
        conditioning = prepare(unet, Conditioning({name: adapter.tokens(name, seen)}))
        return unet(**inputs(unet), cross_attention_kwargs={"conditioning": conditioning}, return_dict=False)[0]


@torch.no_grad()
def bare(unet: Any) -> Tensor:
    return unet(**inputs(unet), return_dict=False)[0]


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE)


def trained(unet: Any, kind: Any, lora_rank: int = 0) -> Adapter:
    """Return an adapter like a trained one: gates and LoRA are nonzero and differ between layers."""
    spec = BranchSpec(
        "vision", unet.config.cross_attention_dim, projection=kind, absent="zeros",
        input_width=tiny_ip.POOLED if kind == "linear" else tiny_ip.TOKENS,
        tokens=3 if kind == "plus" else None, inner_width=64 if kind == "plus" else None,
    )  # fmt: skip
    adapter = Adapter(unet, [spec], lora_rank)
    for name, parameter in adapter.named_parameters():
        if name.endswith("gate") or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapter.eval()


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("kind", tiny_ip.KINDS)
def test_an_imported_file_predicts_the_same_as_in_diffusers(base: Any, kind: str, low: bool, tmp_path: Path) -> None:
    file = tiny_ip.tensors(kind, base)
    save_file(file, tmp_path / "ip.safetensors")
    adapter, report = import_adapter(read_ip_adapter(tmp_path, weight_name="ip.safetensors"), base)
    for images in (1, 3):
        seen = features(kind, images)
        expected = theirs(base, [file], [seen], low)
        assert near(ours(base, adapter, seen), expected)
        assert (expected - bare(base)).abs().max() > 0.01
    assert set(report.used) == set(file) and report.parameters == sum(each.numel() for each in file.values())
    assert report.variant == {"linear": "base"}.get(kind, kind)
    json.dumps(report.as_dict())


def test_an_imported_branch_can_be_trained(base: Any, tmp_path: Path) -> None:
    adapter, _ = import_adapter(read_ip_adapter(tiny_ip.tensors("plus", base)), base)
    adapter.save(tmp_path, adapter.metadata)
    again = Adapter.load(tmp_path, base)
    assert again.branch_specs == adapter.branch_specs and again.branch_specs[0].absent == "zeros"
    seen = features("plus", 1)
    expected = ours(base, adapter, seen)
    assert torch.equal(ours(base, again, seen), expected)
    text = Adapter(base, [BranchSpec("t5", 12), BranchSpec("byt5", 10)])
    words = {"t5": Tokens(torch.randn(2, 9, 12)), "byt5": Tokens(torch.randn(2, 4, 10))}
    with again.attach(base), text.attach(base), torch.no_grad():
        conditioning = prepare(base, Conditioning({**words, "vision": again.tokens("vision", seen)}))
        both = base(**inputs(base), cross_attention_kwargs={"conditioning": conditioning}, return_dict=False)[0]
    assert torch.equal(both, expected)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_pickles_are_read_without_running_their_code(base: Any, tmp_path: Path) -> None:
    file = tiny_ip.tensors("full", base)
    torch.save(tiny_ip.nested(file), tmp_path / "ip.bin")
    read = read_ip_adapter(tmp_path / "ip.bin")
    assert all(torch.equal(read.tensors[name], each) for name, each in file.items()) and set(read.tensors) == set(file)

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**tiny_ip.nested(file), "trap": Trap()}, tmp_path / "trap.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "ip.bin").read_bytes()[:1000])
    for name in ("trap.bin", "cut.bin"):
        with pytest.raises(WeightsError, match="pickle that is truncated or holds more than tensors"):
            read_ip_adapter(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def without(name: str) -> Callable[[Flat], Any]:
    return lambda file: file.pop(name)


def renumbered(file: Flat) -> None:
    for name in [name for name in file if name.startswith("ip_adapter.")]:
        number, rest = name.removeprefix("ip_adapter.").split(".", 1)
        file[f"ip_adapter.x{int(number) // 2}.{rest}"] = file.pop(name)
    for name in [name for name in file if ".x" in name]:
        file[name.replace(".x", ".")] = file.pop(name)


def deeper(file: Flat) -> None:
    for name in [name for name in file if ".layers.3." in name]:
        file[name.replace(".layers.3.", ".layers.4.")] = file[name].clone()


def narrow_heads(file: Flat) -> None:
    for layer in range(PLUS_DEPTH):
        look = f"image_proj.layers.{layer}.0"
        file[f"{look}.to_q.weight"] = file[f"{look}.to_q.weight"][:96]
        file[f"{look}.to_kv.weight"] = file[f"{look}.to_kv.weight"][:192]
        file[f"{look}.to_out.weight"] = file[f"{look}.to_out.weight"][:, :96]


def eight_tokens(file: Flat) -> None:
    for name in ("image_proj.proj.weight", "image_proj.proj.bias"):
        file[name] = file[name].repeat(2, *[1] * (file[name].dim() - 1))


def unnamed_layers(file: Flat) -> None:
    for name in [name for name in file if name.startswith("ip_adapter.")]:
        file[name.replace("ip_adapter.", "ip_adapter.layer.")] = file.pop(name)


def other_shape(file: Flat) -> None:
    file["ip_adapter.3.to_v_ip.weight"] = file["ip_adapter.3.to_v_ip.weight"][:-1]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("plus", deeper, "of 5 layers, but diffusers supports exactly 4"),
        ("plus", narrow_heads, "whose heads are not 64 wide"),
        ("linear", eight_tokens, "makes 8 tokens per picture"),
        ("full", renumbered, "as Flux files do"),
        ("full", unnamed_layers, r"no layer ip_adapter.N.to_k_ip.weight, but ip_adapter.layer.\d+.to_k"),
        ("full", other_shape, "ip_adapter.3.to_v_ip.weight of shape"),
        ("full", without("image_proj.proj.3.bias"), "lacks image_proj.proj.3.bias"),
        ("plus", without("ip_adapter.5.to_k_ip.weight"), "lacks ip_adapter.5.to_k_ip.weight"),
        ("plus", lambda file: file.update({"image_proj.extra": torch.zeros(1)}), "unknown image_proj.extra, which"),
        ("full", lambda file: file.update({"ip_adapter.1.to_q_lora.down.weight": torch.zeros(1)}), "lacks|shape"),
        ("full", lambda file: file.update({"more": torch.zeros(1)}), "holds more besides image_proj"),
        ("linear", lambda file: file.update({"ip_adapter.0.to_q_lora.up.weight": torch.zeros(1)}), "lacks|shape"),
        ("full", lambda file: [file.pop(name) for name in list(file) if "image_proj" in name], "no tensors named"),
    ],
)  # fmt: skip
def test_what_diffusers_would_drop_or_misread_raises_one_sentence(
    kind: str, change: Callable[[Flat], Any], message: str
) -> None:
    file = tiny_ip.tensors(kind, tiny_ip.unet())
    change(file)
    with pytest.raises(WeightsError, match=message) as caught:
        read_ip_adapter(file)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        {"proj.0.weight": (8, 8), "proj.2.weight": (64, 8), "norm.weight": (16,)},
        {"perceiver_resampler.proj_in.weight": (8, 8), "norm.weight": (16,)},
    ],
)
def test_broken_face_id_files_raise(names: dict[str, tuple[int, ...]]) -> None:
    file = {f"image_proj.{name}": torch.zeros(shape) for name, shape in names.items()}
    with pytest.raises(WeightsError, match=r"lacks image_proj.proj.0.bias|has a FaceID Plus projection of 0 layers"):
        read_ip_adapter({**file, "ip_adapter.1.to_k_ip.weight": torch.zeros(4, 4)})


def test_another_base_raises(tmp_path: Path) -> None:
    small, large = tiny_ip.unet(), tiny_ip.unet(xl=True)
    file = tiny_ip.tensors("linear", small)
    with pytest.raises(WeightsError, match=r"\(7 layers that read text of width 16\), but this denoiser has 10 layers"):
        import_adapter(read_ip_adapter(file), large)
    places = [1, 3, 13, 5, 7, 9, 11]  # down, middle, up
    swapped = {name: each for name, each in file.items() if name.startswith("image_proj")}
    for number, place in enumerate(places):
        for each in ("to_k_ip", "to_v_ip"):
            swapped[f"ip_adapter.{2 * number + 1}.{each}.weight"] = file[f"ip_adapter.{place}.{each}.weight"]
    with pytest.raises(WeightsError, match="in the order down, middle, up"):
        import_adapter(read_ip_adapter(swapped), small)
    for each in ("to_k_ip", "to_v_ip"):
        name = f"ip_adapter.3.{each}.weight"
        file[name] = torch.cat([file[name], file[name]])
    with pytest.raises(WeightsError, match=r"gives layer 3 the width 32, but .* has 16"):
        import_adapter(read_ip_adapter(file), small)
    taken = copy.deepcopy(small)
    taken._load_ip_adapter_weights([tiny_ip.nested(tiny_ip.tensors("plus", small))])
    with pytest.raises(WeightsError, match="unload_ip_adapter"):
        import_adapter(read_ip_adapter(tiny_ip.tensors("plus", small)), taken)


@pytest.mark.parametrize(
    ("kind", "width", "tokens", "pooled", "message"),
    [
        ("plus", 1280, 1664, 1280, r"of width 1280 \(OpenCLIP ViT-H/14\), .* are 1664 wide \(OpenCLIP ViT-bigG/14\)"),
        ("linear", 1024, 1664, 1280, r"pooled embeddings of width 1024 \(OpenCLIP ViT-H/14\), .* 1280 .*bigG"),
        ("full", 1664, 1024, 768, r"bigG/14\), .* are 1024 wide \(CLIP ViT-L/14\)"),
    ],
)
def test_another_encoder_raises(kind: str, width: int, tokens: int, pooled: int, message: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        config = CLIPVisionConfig(hidden_size=tokens, projection_dim=pooled, num_hidden_layers=1, num_attention_heads=8)
        other = CLIPVisionModelWithProjection(config)
    layout = Layout(kind, 16, width, 2048, 1280, 1280, 2048, (), "")
    with pytest.raises(WeightsError, match=message):
        check_encoder(layout, other)


def test_unavailable_files_raise(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for arguments, message in (
        (("nobody/nothing", "models", "ip.safetensors"), "models/ip.safetensors of the hub .* pass the local folder"),
        (("nobody/nothing", "models"), "choose one of its files"),
        ((tmp_path / "no.safetensors",), "no file or folder"),
        ((tmp_path, "models", "ip.safetensors"), "no file ip.safetensors"),
        ((tmp_path, "models"), "holds no weights file"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_ip_adapter(*arguments)
    (tmp_path / "models" / "x.safetensors").write_bytes(b"cut")
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        read_ip_adapter(tmp_path, "models")


def test_production_bases_are_numbered_as_published() -> None:
    from diffusers import UNet2DConditionModel

    sd15: dict[str, Any] = {"cross_attention_dim": 768}
    sdxl: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    }  # fmt: skip
    known = {
        "Stable Diffusion 1.5": (sd15, 16, {1: "down_blocks.0", 13: "up_blocks.1.attentions.0", 31: "mid_block"}),
        "Stable Diffusion XL": (
            sdxl, 70,
            {29: "down_blocks.2.attentions.1", 69: "up_blocks.0.attentions.1", 87: "up_blocks.0.attentions.1",
             119: "up_blocks.1.attentions.2", 121: "mid_block", 139: "mid_block"},
        ),
    }  # fmt: skip
    for family, (config, layers, places) in known.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
            file = tiny_ip.tensors_on_meta("plus", unet, 1280, 16, 1280, 1280)
        _, report = import_adapter(read_ip_adapter(file), unet)
        assert (report.base, report.encoder, report.tokens) == (family, "OpenCLIP ViT-H/14", 16)
        assert len(report.used) == 2 * layers + 51
        for number, place in places.items():
            assert report.used[f"ip_adapter.{number}.to_k_ip.weight"].startswith(place)
    assert report.parameters == 423_748_864  # the size of ip-adapter-plus_sdxl_vit-h


# --- export -----------------------------------------------------------------------------------------------------------


def test_projection_shapes_match_the_projections() -> None:
    for kind in get_args(Kind):
        face = 12 if kind == "faceid-plus" else None
        spec = BranchSpec("v", 16, projection=kind, input_width=10, tokens=4, inner_width=64, attention_width=128,
                          face_width=face)  # fmt: skip
        projection = spec.build_projection()
        assert projection is not None
        found = {name: tuple(each.shape) for name, each in projection.state_dict().items()}
        assert found == projection_shapes(kind, 4, 10, 16, 64, 128, face)
    assert PLUS_HEAD == 64


@pytest.mark.parametrize("kind", tiny_ip.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_import_then_export_is_bit_identical(base: Any, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file = {name: each.to(dtype) for name, each in tiny_ip.tensors(kind, base).items()}
    adapter, _ = import_adapter(read_ip_adapter(file), base)
    export_adapter(adapter, base, tmp_path / "ip.safetensors")
    out = load_file(tmp_path / "ip.safetensors")
    assert set(out) == set(file) and all(torch.equal(out[name], each) for name, each in file.items())
    assert {each.dtype for each in out.values()} == {dtype}
    again, _ = import_adapter(read_ip_adapter(tmp_path), base)
    first, second = adapter.state_dict(), again.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("kind", tiny_ip.KINDS)
def test_a_trained_branch_predicts_the_same_in_diffusers(base: Any, kind: str, low: bool, tmp_path: Path) -> None:
    adapter = trained(base, kind)
    report = export_adapter(adapter, base, tmp_path / "ip.safetensors")
    assert report.layout.kind == kind and report.lora is None
    file, seen = load_file(tmp_path / "ip.safetensors"), features(kind, 2)
    expected = ours(base, adapter, seen)
    assert near(theirs(base, [file], [seen], low), expected) and not near(bare(base), expected)
    again, _ = import_adapter(read_ip_adapter(tmp_path / "ip.safetensors"), base)
    assert near(ours(base, again, seen), expected)


def test_lora_is_exported_to_separate_files(xl: bool, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = tiny_ip.components(xl)
    unet = parts["unet"]
    adapter, seen = trained(unet, "full", lora_rank=2), features("full", 1)
    report = export_adapter(adapter, unet, tmp_path / "ip.safetensors", tiny_ip.encoder())
    assert report.lora is not None and report.lora.is_file()
    expected, plain = ours(unet, adapter, seen), ours(unet, trained(unet, "full"), seen)
    assert not near(plain, expected)
    assert set(load_file(tmp_path / KOHYA_FILE)) == {
        f"lora_unet_{f'{layer}.{target}'.replace('.', '_')}.{part}"
        for layer in adapter.layers()
        for target in adapter.lora_targets
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    for name in (report.lora.name, KOHYA_FILE):  # peft's tensor names, and the names that ComfyUI reads
        pipe: Any = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline)(
            **{**parts, "unet": copy.deepcopy(unet)}
        )
        pipe.load_lora_weights(tmp_path, weight_name=name)
        pipe.load_ip_adapter(tmp_path, subfolder="", weight_name="ip.safetensors")
        with torch.no_grad():
            call = inputs(unet)
            added = {**call.pop("added_cond_kwargs", {}), "image_embeds": [seen]}
            assert near(pipe.unet(**call, added_cond_kwargs=added, return_dict=False)[0], expected)


def test_what_the_standard_format_cannot_hold_is_listed(base: Any, tmp_path: Path) -> None:
    width = base.config.cross_attention_dim
    specs = [
        BranchSpec("vision", width, scale=0.7, projection="full", input_width=tiny_ip.TOKENS, router=True),
        BranchSpec("t5", 12),
        BranchSpec("bare", 12),
        BranchSpec("joined", width, projection="full", input_width=8, fusion="concatenated"),
        BranchSpec("eight", width, projection="linear", input_width=8, tokens=8),
    ]
    adapter = Adapter(base, specs, lora_rank=1)
    adapter.metadata = {"licence": "cc0-1.0"}
    report = export_adapter(adapter, base, tmp_path / "ip.safetensors", metadata={"title": "mine"})
    notes = " ".join(report.not_carried)
    for part in (
        "'t5'",
        "LoRA is in separate files",
        "router, which keeps several people in one picture apart, is not exported",
        "set_ip_adapter_scale(0.7)",
        "off in rows without a person",
        "image encoder",
        "Masks",
    ):
        assert part in notes
    assert "not a well-known one" in notes
    with safe_open(report.file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["licence"] == "cc0-1.0" and metadata["variant"] == "full" and metadata["title"] == "mine"
    json.dumps(report.as_dict())
    for name, message in (
        ("none", "no branch"),
        ("bare", "no projection"),
        ("joined", "softmax"),
        ("eight", "8 tokens"),
    ):
        with pytest.raises(WeightsError, match=message):
            export_adapter(adapter, base, tmp_path / "x.safetensors", name=name)
    with pytest.raises(WeightsError, match="another denoiser"):
        export_adapter(adapter, tiny.denoiser(), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="float64"):
        export_adapter(copy.deepcopy(adapter).double(), base, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def portrait(tmp_path: Path) -> tuple[Any, ExportReport]:
    pipe = tiny.pipeline()
    assert pipe.adapter is not None
    return pipe, export_adapter(pipe.adapter, pipe.unet, tmp_path / "ip.safetensors", pipe.image_encoder)


def test_the_portrait_worlds_adapter_is_exported_with_its_encoder(tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    pipe, report = portrait(tmp_path)
    assert report.encoder is not None and "not a well-known one" in " ".join(report.not_carried)
    encoder = CLIPVisionModelWithProjection.from_pretrained(report.encoder, local_files_only=True).eval()
    crops = torch.rand(2, 3, tiny.CROP, tiny.CROP)
    with torch.no_grad():
        seen = pipe.image_encoder(crops)
        pixels = (crops - pipe.image_encoder.mean) / pipe.image_encoder.std
        assert near(encoder(pixels, output_hidden_states=True).hidden_states[-2], seen)
    bare_unet = tiny.pipeline(with_adapter=False).unet
    pipe.text_adapter.detach(pipe.unet)
    pipe.unload_adapter()
    low_rank = tiny.identity_adapter(bare_unet)  # only for the names of the exported LoRA tensors
    assert report.lora is not None and set(load_file(report.lora)) == {
        f"unet.{name}" for name in low_rank.state_dict() if ".lora_" in name
    }
    without_lora = export_adapter(pipe_adapter_without_lora(pipe), pipe.unet, tmp_path / "plain.safetensors")
    file = load_file(without_lora.file)
    call: dict[str, Any] = {
        "sample": torch.randn(2, 4, 4, 4), "timestep": torch.tensor(300.0),
        "encoder_hidden_states": torch.randn(2, 6, 16), "class_labels": torch.randn(2, 32),
    }  # fmt: skip
    adapter, _ = import_adapter(read_ip_adapter(without_lora.file), pipe.unet)
    with torch.no_grad():
        with adapter.attach(pipe.unet):
            conditioning = Conditioning({"vision": adapter.tokens("vision", seen)})
            expected = pipe.unet(**call, cross_attention_kwargs={"conditioning": conditioning}, return_dict=False)[0]
        plain = pipe.unet(**call, return_dict=False)[0]
        pipe.unet._load_ip_adapter_weights([tiny_ip.nested(file)])
        found = pipe.unet(**call, added_cond_kwargs={"image_embeds": [seen[:, None]]}, return_dict=False)[0]
    assert near(found, expected) and not near(plain, expected)


def pipe_adapter_without_lora(pipe: Any) -> Adapter:
    adapter = Adapter(pipe.unet, [BranchSpec("vision", 16, projection="full", input_width=24)])
    for name, parameter in adapter.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def test_what_other_programs_cannot_load_is_reported() -> None:
    def layout(kind: str, width: int, **sizes: int) -> Layout:
        seen, inner, heads = sizes.get("seen", 1280), sizes.get("inner", 1280), sizes.get("heads", 20)
        shapes = projection_shapes(kind, sizes.get("tokens", 16), seen, width, inner, heads * 64)
        named = {f"image_proj.{name}": shape for name, shape in shapes.items()}
        for each in ("to_k_ip", "to_v_ip"):
            named[f"ip_adapter.1.{each}.weight"] = (320, width)
        found = read_layout(named)
        assert not found.problem
        return found

    for everywhere in (
        layout("plus", 2048), layout("plus", 768, inner=768, heads=12),
        layout("full", 768), layout("linear", 2048, tokens=4),
    ):  # fmt: skip
        assert everywhere.unsupported == {} and everywhere.unsupported_sentences() == []
    assert set(layout("full", 2048).unsupported) == {COMFYUI, WEBUI}
    assert set(layout("plus", 2048, seen=1664).unsupported) == {WEBUI}
    assert set(layout("plus", 768, inner=768, heads=12, seen=1024).unsupported) == {WEBUI}
    assert set(layout("plus", 1024, inner=1024, heads=12).unsupported) == {INVOKEAI}
    assert set(layout("plus", 2048, tokens=8).unsupported) == {COMFYUI, WEBUI}
    assert set(layout("plus", 2048, heads=10).unsupported) == {COMFYUI, WEBUI, INVOKEAI}
    (sizes, heads) = layout("plus", 2048, inner=2048, heads=32).unsupported_sentences()
    assert sizes.startswith("ComfyUI_IPAdapter_plus and sd-webui-controlnet cannot load") and "width 1280" in sizes
    assert heads.startswith("InvokeAI cannot load") and "20 heads" in heads


@pytest.mark.parametrize(("width", "inner"), [(2048, 1280), (768, 768)])
def test_a_default_plus_projection_loads_in_every_program(width: int, inner: int) -> None:
    spec = BranchSpec("vision", width, projection="plus", input_width=1280)
    assert (spec.inner_width, spec.attention_width) == (inner, inner)
    with torch.device("meta"):
        projection = spec.build_projection()
    assert projection is not None
    shapes = {f"image_proj.{name}": tuple(each.shape) for name, each in projection.state_dict().items()}
    shapes |= {f"ip_adapter.1.to_{each}_ip.weight": (320, width) for each in "kv"}
    found = read_layout(shapes)
    assert not found.problem and found.unsupported == {}


def test_an_older_adapter_whose_inner_width_is_its_width_still_loads(tmp_path: Path) -> None:
    base = tiny_ip.unet()
    saved = Adapter(base, [BranchSpec("vision", 128, projection="plus", input_width=24)])
    saved.save(tmp_path, dict.fromkeys(("base", "encoder", "feature_layer", "tokens", "licence"), "-"))
    file = tmp_path / "adapter.safetensors"
    older = {"inner_width": None, "attention_width": None}
    described = [{**each, **older} for each in json.loads(saved.metadata["branches"])]
    save_file(load_file(file), file, {**saved.metadata, "branches": json.dumps(described)})
    assert Adapter.load(file, base).branch_specs == saved.branch_specs
    for_sdxl = saved_specs({"branches": json.dumps([{**described[0], "width": 2048}])})
    assert (for_sdxl[0].inner_width, for_sdxl[0].attention_width) == (2048, 2048)
