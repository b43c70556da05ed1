"""IP-Adapter files for FLUX.1 and Stable Diffusion 3.5 draw what diffusers' own loaders draw with them."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imagine.errors import WeightsError
from imagine.inspection import inspect
from imagine.records import Conditioning, Tokens
from imagine.transformer_bases.adapter import TransformerAdapter, prepare
from imagine.transformer_bases.ip_files import read_ip_adapter
from tests import tiny_transformers
from tests.tiny_transformers import predict, transformer

FEATURES = 20


def random(shape: Any, seed: int) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / (shape[-1] if len(shape) > 1 else 4) ** 0.5
    )


def xlabs(model: Any) -> dict[str, Tensor]:
    """Return the tensors of a file of XLabs for FLUX.1, under the names of its authors."""
    text, width = model.config.joint_attention_dim, 32
    shapes = {
        "ip_adapter_proj_model.proj.weight": (4 * text, FEATURES), "ip_adapter_proj_model.proj.bias": (4 * text,),
        "ip_adapter_proj_model.norm.weight": (text,), "ip_adapter_proj_model.norm.bias": (text,),
    }  # fmt: skip
    for block in range(len(model.transformer_blocks)):
        for kind in "kv":
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind}_proj"
            shapes |= {f"{name}.weight": (width, text), f"{name}.bias": (width,)}
    return {name: random(shape, number) for number, (name, shape) in enumerate(shapes.items())}


def instantx(model: Any) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file of InstantX for Stable Diffusion 3.5, under the names of its authors."""
    width, hidden, inner = 32, 24, 64
    projection = {
        "latents": (1, 6, hidden), "proj_in.weight": (hidden, FEATURES), "proj_in.bias": (hidden,),
        "proj_out.weight": (width, hidden), "proj_out.bias": (width,), "norm_out.weight": (width,),
        "norm_out.bias": (width,), "time_embedding.linear_1.weight": (hidden, 16),
        "time_embedding.linear_1.bias": (hidden,), "time_embedding.linear_2.weight": (hidden, hidden),
        "time_embedding.linear_2.bias": (hidden,),
    }  # fmt: skip
    for number in range(4):
        layer = f"layers.{number}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            projection |= {f"{layer}.{norm}.weight": (hidden,), f"{layer}.{norm}.bias": (hidden,)}
        projection |= {
            f"{layer}.0.to_q.weight": (inner, hidden), f"{layer}.0.to_kv.weight": (2 * inner, hidden),
            f"{layer}.0.to_out.weight": (hidden, inner), f"{layer}.1.1.weight": (4 * hidden, hidden),
            f"{layer}.1.3.weight": (hidden, 4 * hidden), f"{layer}.2.1.weight": (4 * hidden, hidden),
            f"{layer}.2.1.bias": (4 * hidden,),
        }  # fmt: skip
    layers: dict[str, tuple[int, ...]] = {}
    for block in range(len(model.transformer_blocks)):
        layers |= {
            f"{block}.norm_ip.linear.weight": (2 * width, hidden), f"{block}.norm_ip.linear.bias": (2 * width,),
            f"{block}.to_k_ip.weight": (width, width), f"{block}.to_v_ip.weight": (width, width),
            **{f"{block}.{norm}.weight": (8,) for norm in ("norm_q", "norm_k", "norm_ip_k")},
        }  # fmt: skip
    return {
        part: {name: random(shape, number) for number, (name, shape) in enumerate(shapes.items())}
        for part, shapes in (("image_proj", projection), ("ip_adapter", layers))
    }


def diffusers_form(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return a file of XLabs in the nested form that diffusers takes from memory."""
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, each in flat.items():
        part = "image_proj" if name.startswith("ip_adapter_proj_model") else "ip_adapter"
        rest = name.partition(".")[2].replace("processor.", "")
        rest = rest.replace("ip_adapter_double_stream_k_proj", "to_k_ip")
        nested[part][rest.replace("ip_adapter_double_stream_v_proj", "to_v_ip")] = each
    return nested


def sd35(seed: int = 0) -> Any:
    return transformer("sd3", seed, dual_attention_layers=())


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_xlabs_files_draw_as_diffusers_does(scale: float):
    model = transformer("flux")
    theirs = copy.deepcopy(model)
    theirs._load_ip_adapter_weights([diffusers_form(xlabs(model))], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    features = random((2, 1, FEATURES), 50)
    given = tiny_transformers.flux_inputs(2)
    wanted = theirs(**given, joint_attention_kwargs={"ip_adapter_image_embeds": [features]}, return_dict=False)[0]
    adapter = read_ip_adapter(xlabs(model), model)
    bare = predict("flux", model)
    with adapter.attach(model):
        tokens = adapter.tokens("vision", features)
        assert tokens.values.shape == (2, 4, 16)
        conditioning = Conditioning({"vision": tokens}, {"vision": scale})
        for each in (conditioning, prepare(model, conditioning)):
            drawn = predict("flux", model, each)
            assert (drawn - wanted).abs().max() <= 1e-5 < (drawn - bare).abs().max()
        model.fuse_qkv_projections()
        assert (predict("flux", model, conditioning) - wanted).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_instantx_files_draw_as_diffusers_does(scale: float):
    model = sd35()
    theirs = copy.deepcopy(model)
    theirs._load_ip_adapter_weights(instantx(model), low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        processor.scale = scale
    features = random((2, 7, FEATURES), 50)
    adapter, bare = read_ip_adapter(instantx(model), model), predict("sd3", model)
    with adapter.attach(model):
        conditioning = Conditioning({"vision": adapter.tokens("vision", features)}, {"vision": scale})
        prepared = prepare(model, conditioning)
        for timestep in (500.0, 20.0):  # the tokens depend on it
            given = {**tiny_transformers.sd3_inputs(2), "timestep": torch.full((2,), timestep), "return_dict": False}
            wanted = theirs(**given, joint_attention_kwargs={"ip_adapter_image_embeds": features})[0]
            for each in (conditioning, prepared):
                drawn = model(**given, joint_attention_kwargs={"conditioning": each})[0]
                assert (drawn - wanted).abs().max() <= 1e-5 < (drawn - bare).abs().max()


@torch.no_grad()
def test_a_row_without_a_person_stays_bare_with_instantx():
    model = sd35()
    adapter = read_ip_adapter(instantx(model), model)
    features = random((2, 7, FEATURES), 50)
    with adapter.attach(model):
        absent = torch.tensor([[True] * 7, [False] * 7])
        drawn = predict("sd3", model, Conditioning({"vision": Tokens(features, absent)}))
        assert torch.equal(drawn[1], predict("sd3", model)[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_files_folders_and_our_own_form(kind: str, tmp_path: Any):
    model = transformer("flux") if kind == "flux" else sd35()
    made: Any = xlabs(model) if kind == "flux" else instantx(model)
    if kind == "flux":
        save_file(made, tmp_path / "ip_adapter.safetensors")
    else:
        torch.save(made, tmp_path / "ip-adapter.bin")
    adapter = read_ip_adapter(tmp_path, model)
    (file,) = tmp_path.iterdir()
    assert adapter.metadata["imported_from"] == file.name
    adapter.save(tmp_path / "ours", adapter.metadata)
    loaded = TransformerAdapter.load(tmp_path / "ours", model)
    assert inspect(tmp_path / "ours" / "adapter.safetensors")["problems"] == []
    tokens = adapter.tokens("vision", random((2, 1 if kind == "flux" else 7, FEATURES), 5))
    drawn = []
    for each in (adapter, loaded):
        with each.attach(model):
            drawn.append(predict(kind, model, Conditioning({"vision": tokens})))
    assert torch.equal(*drawn)
    assert sum(len(each) for each in adapter.parts().values()) == len(list(adapter.parameters()))


def test_files_that_do_not_fit_are_named():
    flux, sd3 = transformer("flux"), sd35()
    with pytest.raises(WeightsError, match="No IP-Adapter file is known for Z-Image"):
        read_ip_adapter({}, transformer("z_image"))
    with pytest.raises(WeightsError, match=r"no projection, but FLUX\.1"):
        read_ip_adapter({}, flux)
    with pytest.raises(WeightsError, match="not a part of an IP-Adapter"):
        read_ip_adapter({"unet.weight": torch.zeros(1)}, flux)
    fewer = dict(list(xlabs(flux).items())[:-1])
    with pytest.raises(WeightsError, match=r"lacks sites.transformer_blocks.1.attn.vision.to_v.bias"):
        read_ip_adapter(fewer, flux)
    with pytest.raises(WeightsError, match=r"also has 2.to_k_ip.bias"):
        read_ip_adapter(xlabs(transformer("flux", num_layers=3)), flux)
    wide = xlabs(transformer("flux", joint_attention_dim=24))
    with pytest.raises(WeightsError, match="instead of"):
        read_ip_adapter({**xlabs(flux), **{name: each for name, each in wide.items() if "k_proj" in name}}, flux)
    with pytest.raises(WeightsError, match=r"lacks proj_in\.weight: use an IP-Adapter for Stable Diffusion 3\.5"):
        read_ip_adapter(xlabs(flux), sd3)
    with pytest.raises(WeightsError, match="two attentions"):
        read_ip_adapter(instantx(sd3), transformer("sd3"))


@torch.no_grad()
def test_references_over_a_loaded_file():
    """`load_ip_adapter` of the pipeline, then `reference=`: the face is cropped, and encoded by the image encoder."""
    from imagine import ImaginePipeline
    from imagine.people.faces import KnownBoxesFinder
    from tests import tiny, tiny_ip
    from tests import tiny_transformer_pipelines as tiny_pipelines

    pipe = ImaginePipeline.from_pipe(tiny_pipelines.stock("flux"), image_encoder=tiny_ip.encoder(pooled=FEATURES))
    pipe.finder = KnownBoxesFinder([tiny.BOX])
    pipe.set_progress_bar_config(disable=True)
    bare = tiny_pipelines.draw(pipe, "flux")
    pipe.load_ip_adapter(xlabs(pipe.transformer))
    drawn = tiny_pipelines.draw(pipe, "flux", reference=tiny.photo(1))
    assert (drawn - bare).abs().max() > 1e-3
    pipe.unload_ip_adapter()
    assert torch.equal(tiny_pipelines.draw(pipe, "flux"), bare)
