"""Common diffusers features on SD 1.5 and SDXL: each works as before, and together with a reference.

Each combination is set up on diffusers' own pipeline and on ours. Without a reference and at strength zero, both must
draw the same picture bit for bit. With a reference the picture must differ, and differ again for another person.
docs/backbones.md lists the combinations.
"""

import ast
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_stock
from tests.root import ROOT

BASES = {"sd15": False, "sdxl": True}
PROMPT = "a person smiling on a beach"


@dataclass(frozen=True)
class Combination:
    """How a pipeline is built, set up and called."""

    kind: str = ""
    arrange: Callable[[Any, Path], None] = lambda pipe, folder: None
    call: dict[str, Any] = field(default_factory=dict)


def small(seed: int, mode: str = "RGB") -> Image.Image:
    return tiny.photo(seed).resize((tiny_stock.SIDE, tiny_stock.SIDE)).convert(mode)


def is_xl(pipe: Any) -> bool:
    return hasattr(pipe, "text_encoder_2")


def lora(pipe: Any, folder: Path) -> None:
    """Save a random LoRA for the denoiser's attention, and load it like one from the hub."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(11)
    donor = tiny_stock.unet(is_xl(pipe))
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    stock = diffusers.StableDiffusionXLPipeline if is_xl(pipe) else diffusers.StableDiffusionPipeline
    stock.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(donor))
    pipe.load_lora_weights(folder)


def inversion(pipe: Any, _: Path) -> None:
    """Load a textual inversion token into every tokenizer and text encoder."""
    learnt = torch.randn(2, 16, generator=tiny.generator(12))
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.load_textual_inversion(learnt, token="<friend>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    if is_xl(pipe):
        pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer_2)
        more = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
        pipe.load_textual_inversion(learnt.repeat(1, 2)[:, :24], token="<friend>", **more)


def scheduler(name: str, **options: Any) -> Callable[[Any, Path], None]:
    def arrange(pipe: Any, _: Path) -> None:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)

    return arrange


def few_steps(name: str, **options: Any) -> Callable[[Any, Path], None]:
    """Return the set-up of a LoRA distilled for few steps, with its scheduler."""

    def arrange(pipe: Any, folder: Path) -> None:
        lora(pipe, folder)
        scheduler(name, **options)(pipe, folder)

    return arrange


def leave_guidance(pipe: Any, _: Path) -> None:
    """Do nothing; the call's callback ends guidance after the first step."""


def tiled(pipe: Any, _: Path) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8


def sequential_offload(pipe: Any, _: Path) -> None:
    """Run the loop of diffusers' enable_sequential_cpu_offload on the CPU.

    The method itself passes "cpu:0", which accelerate considers another device than that of the weights; it then loses
    the weights.
    """
    from accelerate import cpu_offload

    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module) and name not in pipe._exclude_from_cpu_offload:
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    pipe._offload_device = torch.device("cpu")
    assert pipe.unet.device.type == "meta"


def leaf_offload(pipe: Any, _: Path) -> None:
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def change_latents(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * (0.9 if step == 0 else 1.0)}


SIDE = {"height": tiny_stock.SIDE, "width": tiny_stock.SIDE}
PAINTING = {"image": small(21), "strength": 0.9, "num_inference_steps": 3}
MASK = {"mask_image": small(22, "L")}
CONTROL = {"control_image": small(23)}
COMBINATIONS = {
    "guided": Combination(call={"guidance_scale": 4.0}),
    "unguided": Combination(call={"guidance_scale": 1.0}),
    "several-images": Combination(call={"num_images_per_prompt": 2, "guidance_scale": 4.0}),
    "guidance-rescale": Combination(call={"guidance_rescale": 0.7}),
    "clip-skip": Combination(call={"clip_skip": 1}),
    "negative-prompt": Combination(call={"negative_prompt": "a red hat"}),
    "img2img": Combination("Img2Img", call=PAINTING),
    "inpaint": Combination("Inpaint", call={**PAINTING, **MASK, **SIDE}),
    "controlnet": Combination("ControlNet", call={"image": small(23)}),
    "controlnet-img2img": Combination("ControlNetImg2Img", call={**PAINTING, **CONTROL}),
    "controlnet-inpaint": Combination("ControlNetInpaint", call={**PAINTING, **MASK, **CONTROL, **SIDE}),
    "lora": Combination(arrange=lora),
    "lora-scale": Combination(arrange=lora, call={"cross_attention_kwargs": {"scale": 0.5}}),
    "textual-inversion": Combination(arrange=inversion, call={"prompt": "a person with <friend>"}),
    "euler": Combination(arrange=scheduler("EulerDiscreteScheduler")),
    "dpm-solver": Combination(arrange=scheduler("DPMSolverMultistepScheduler")),
    "unipc": Combination(arrange=scheduler("UniPCMultistepScheduler")),
    "lcm": Combination(arrange=few_steps("LCMScheduler"), call={"guidance_scale": 1.0}),
    "lightning": Combination(
        arrange=few_steps("EulerDiscreteScheduler", timestep_spacing="trailing"), call={"guidance_scale": 0.0}
    ),
    "freeu": Combination(arrange=lambda pipe, _: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)),
    "callback": Combination(call={"callback_on_step_end": change_latents, "num_inference_steps": 3}),
    "guidance-cutoff": Combination(arrange=leave_guidance, call={"guidance_scale": 4.0, "num_inference_steps": 3}),
    "model-offload": Combination(arrange=lambda pipe, _: pipe.enable_model_cpu_offload(device="cpu")),
    "sequential-offload": Combination(arrange=sequential_offload),
    "group-offload": Combination(arrange=leaf_offload),
    "vae-tiling": Combination(arrange=tiled),
    "bfloat16": Combination(arrange=lambda pipe, _: pipe.to(torch.bfloat16)),
}
NOT_STOCK = ("sd15-clip-skip",)  # diffusers 0.42 uses text_encoder.text_model, which transformers 5.6 removed
CASES = [case for base in BASES for name in COMBINATIONS if (case := f"{base}-{name}") not in NOT_STOCK]


def draw(pipe: Any, call: dict[str, Any], reference: Any = None, **options: Any) -> torch.Tensor:
    given = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt", **call, **options}
    if reference is not None:
        given["reference"] = reference
    pictures = pipe(generator=tiny.generator(7), **given).images
    assert isinstance(pictures, torch.Tensor) and pictures.isfinite().all()
    return pictures


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() > 1e-4)


def assert_identity_acts(stock: Any, pipe: Any, call: dict[str, Any]) -> None:
    wanted = draw(stock, call)
    assert torch.equal(draw(pipe, call), wanted)
    assert torch.equal(draw(pipe, call, tiny.photo(1), identity_scale=0.0), wanted)
    shown = draw(pipe, call, tiny.photo(1))
    assert differ(shown, wanted) and differ(shown, draw(pipe, call, tiny.photo(2)))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2, in some schedulers
@pytest.mark.parametrize("case", CASES)
def test_identity_acts(case: str, tmp_path: Path):
    base, _, name = case.partition("-")
    xl, chosen = BASES[base], COMBINATIONS[name]
    more = {"controlnet": tiny_stock.controlnet(xl)} if "ControlNet" in chosen.kind else {}
    stock = tiny_stock.stock(xl, chosen.kind, **more)
    pipe = tiny_stock.personal(tiny_stock.stock(xl, chosen.kind, **more))
    for each in (stock, pipe):
        chosen.arrange(each, tmp_path)
    call = dict(chosen.call)
    if xl and name == "guidance-cutoff":
        call["callback_on_step_end"] = diffusers.callbacks.SDXLCFGCutoffCallback(None, cutoff_step_index=0)
    elif name == "guidance-cutoff":
        call["callback_on_step_end"] = diffusers.callbacks.SDCFGCutoffCallback(None, cutoff_step_index=0)
    assert_identity_acts(stock, pipe, call)


def test_a_lora_may_come_before_the_adapter(tmp_path: Path):
    stock = tiny_stock.stock()
    lora(stock, tmp_path)
    wanted = draw(stock, {})
    pipe = tiny_stock.personal(stock)
    assert torch.equal(draw(pipe, {}), wanted) and differ(draw(pipe, {}, tiny.photo(1)), wanted)
    pipe.unload_lora_weights()
    assert differ(draw(pipe, {}, tiny.photo(1)), draw(pipe, {}))


@pytest.mark.parametrize("base", BASES)
def test_identity_acts_from_a_single_file(base: str, tmp_path: Path):
    from safetensors.torch import save_file

    xl = BASES[base]
    stock = tiny_stock.stock(xl)
    stock.save_pretrained(tmp_path / "config")
    for file in (tmp_path / "config").rglob("*.safetensors"):
        file.unlink()  # only the single file may provide weights
    tensors = {f"model.diffusion_model.{original(name)}": each for name, each in stock.unet.state_dict().items()}
    place = "conditioner.embedders.0.transformer" if xl else "cond_stage_model.transformer"
    text = {name.removeprefix("text_model."): each for name, each in stock.text_encoder.state_dict().items()}
    tensors |= {f"{place}.text_model.{name}": each for name, each in text.items()}
    if xl:
        tensors |= open_clip(stock.text_encoder_2.state_dict())
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "model.safetensors")
    parts = {"vae": stock.vae, **({} if xl else {"safety_checker": None})}
    pipe = personalised_class(type(stock)).from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "config"), **parts
    )
    if not xl:
        tiny_stock.encoder().save_pretrained(tmp_path / "encoder")
        given: dict[str, Any] = {"vision_encoder": tmp_path / "encoder", "torch_dtype": torch.bfloat16}
        half = type(pipe).from_single_file(
            tmp_path / "model.safetensors", config=str(tmp_path / "config"), **parts, **given
        )
        assert half.vision_encoder.dtype == half.unet.dtype == torch.bfloat16
    for part in ("unet", "text_encoder", *(["text_encoder_2"] if xl else [])):
        read = getattr(pipe, part).state_dict()
        assert all(torch.equal(each, read[name]) for name, each in getattr(stock, part).state_dict().items())
    assert_identity_acts(stock, tiny_stock.personal(pipe), {})


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    # The tiny denoiser has two levels with one layer each; an up block has one more layer.
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
}  # fmt: skip


def original(name: str) -> str:
    """Return a tensor's name in the original Stable Diffusion format, for the tiny denoiser."""
    block = next(each for each in sorted(OUTSIDE, key=len, reverse=True) if name.startswith(f"{each}."))
    rest = name.removeprefix(f"{block}.")
    if ".resnets." in f"{block}.":
        layer, _, kind = rest.rpartition(".")
        rest = f"{RESNET[layer]}.{kind}"
    return f"{OUTSIDE[block]}.{rest}"


def open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return SDXL's second text encoder in its original format, which joins queries, keys and values."""
    known = {
        "text_projection.weight": "text_projection",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight", "text_model.final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    words = {"text_model.encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
             ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", ".self_attn": ".attn"}  # fmt: skip
    named: dict[str, torch.Tensor] = {}
    for name, each in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        new = known.get(name, name)
        for word, other in words.items():
            new = new.replace(word, other)
        if ".q_proj." in name:
            each = torch.cat([tensors[name.replace(".q_proj.", f".{kind}_proj.")] for kind in "qkv"])
            new = new.replace(".q_proj.", ".in_proj_")
        named[f"conditioner.embedders.1.model.{new}"] = each.T if new == "text_projection" else each
    return named


@pytest.mark.filterwarnings("ignore")  # torch's compiler emits unrelated warnings
def test_identity_acts_in_a_compiled_denoiser():
    stock, pipe = tiny_stock.stock(), tiny_stock.personal(tiny_stock.stock())
    call = {"guidance_scale": 1.0}
    wanted, eager = draw(stock, call), draw(pipe, call, tiny.photo(1))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    shown = draw(pipe, call, tiny.photo(1))
    assert differ(shown, wanted) and not differ(shown, eager)
    call["num_inference_steps"] = 1
    assert torch.equal(draw(pipe, call, tiny.photo(1), identity_scale=0.0), draw(stock, call))
    torch._dynamo.reset()


def test_every_row_of_the_table_names_a_test_that_exists():
    text = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    support, tests = text.partition("## Tests behind the table")[::2]
    rows = dict(re.findall(r"^\| (.+?) \| ((?:yes|no)\S* \| (?:yes|no)\S*) \|$", support, re.MULTILINE))
    cells = []
    for section in tests.split("\n### ")[1:]:
        file = section.split("`")[1]
        found = re.findall(r"^\| (.+?) \| `(\w+)` \| (.*?) ?\| (.*?) ?\|$", section, re.MULTILINE)
        assert found, f"{file} has no row"
        cells += [(row, file, function, [each.strip("`") for each in cases]) for row, function, *cases in found]
    assert len(cells) > 30
    assert sorted(cell[0] for cell in cells) == sorted(re.sub(r"\[\^[\w-]+\]", "", row) for row in rows)
    known = {*CASES, *BASES, ""}
    trees = {file: ast.parse((ROOT / file).read_text("utf-8")) for _, file, _, _ in cells}
    names = {file: {each.name for each in ast.walk(tree) if hasattr(each, "name")} for file, tree in trees.items()}
    for _, file, function, cases in cells:
        assert function in names[file], f"{file} has no {function}"
        assert known.issuperset(cases), f"{function} has not all of the cases {cases}"
    listed = {case for _, _, function, cases in cells if function == "test_identity_acts" for case in cases if case}
    assert listed == set(CASES)
