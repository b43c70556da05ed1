"""Personalised stock pipelines: without a reference they equal diffusers' own bit for bit, with one they differ."""

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.errors import ConfigError, PromptError, WeightsError
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import Tokens
from imagine.stock.pipelines import PersonalisationMixin, personalised_class
from tests import tiny, tiny_ip, tiny_stock
from tests.tiny_stock import OTHER, PROMPT, draw, same


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_a_reference_or_at_strength_zero_it_is_the_stock_picture(stock: Any, pipe: Any, guidance: float):
    wanted = draw(stock, guidance_scale=guidance)
    assert torch.equal(draw(pipe, guidance_scale=guidance), wanted)
    off = draw(pipe, guidance_scale=guidance, reference=tiny.photo(1), identity_scale=0.0)
    assert torch.equal(off, wanted)
    shown = draw(pipe, guidance_scale=guidance, reference=tiny.photo(1))
    assert not same(shown, wanted) and not same(shown, draw(pipe, guidance_scale=guidance, reference=tiny.photo(2)))


def test_two_people_in_one_batch_come_out_as_one_by_one(pipe: Any):
    prompts, references = [PROMPT, OTHER, PROMPT], [tiny.photo(1), [tiny.photo(2), tiny.photo(3)], tiny.photo(4)]
    generators = [tiny.generator(seed) for seed in (1, 2, 3)]
    together = draw(pipe, prompts, reference=references, generator=generators)
    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        assert same(together[row : row + 1], draw(pipe, prompt, reference=reference, seed=row + 1))


def test_copies_of_two_people_have_the_order_of_the_stock_batch(pipe: Any):
    prompts, references = [PROMPT, OTHER], [tiny.photo(1), tiny.photo(2)]
    generators = [tiny.generator(seed) for seed in range(4)]
    options: dict[str, Any] = {"guidance_scale": 4.0}
    together = draw(pipe, prompts, reference=references, num_images_per_prompt=2, generator=generators, **options)
    for row in range(4):
        alone = draw(pipe, prompts[row // 2], reference=references[row // 2], seed=row, **options)
        assert same(together[row : row + 1], alone)


def test_personalised_classes_have_stock_names_and_are_cached(stock: Any, pipe: Any):
    assert type(pipe) is personalised_class(type(stock)) is personalised_class(type(pipe))
    assert (
        isinstance(pipe, PersonalisationMixin)
        and isinstance(pipe, type(stock))
        and type(pipe).__name__ == type(stock).__name__
    )


def test_names_in_the_sentence_and_every_other_form_of_prompt(stock: Any, pipe: Any):
    ann, bob = tiny.photo(1), tiny.photo(2)
    named = draw(pipe, "{ann} in a red hat, looking to {bob}", reference={"ann": ann, "bob": bob})
    words = "the first person in a red hat, looking to the second person"
    assert torch.equal(named, draw(pipe, words, reference={"ann": ann, "bob": bob}))
    assert torch.equal(draw(pipe, ""), draw(stock, "")) and not same(draw(pipe, "", reference=ann), draw(stock, ""))
    embeds = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = dict(zip(names, embeds, strict=False))
    assert torch.equal(draw(pipe, None, reference=[ann, bob], **given), draw(pipe, reference=[ann, bob]))


def test_strength_may_differ_by_prompt_and_by_layer(stock: Any, pipe: Any):
    generators = [tiny.generator(7), tiny.generator(7)]
    both = draw(pipe, [PROMPT] * 2, reference=tiny.photo(1), identity_scale=[0.0, 1.0], generator=generators)
    assert same(both[:1], draw(stock)) and same(both[1:], draw(pipe, reference=tiny.photo(1)))
    layers = {name: 1.0 for name, layer in pipe.adapter.layers().items() if layer.branches() and "up" in name}
    some = draw(pipe, reference=tiny.photo(1), identity_scale=layers)
    assert layers and not same(some, draw(stock)) and not same(some, draw(pipe, reference=tiny.photo(1)))


def test_the_stock_result_has_the_faces_used(pipe: Any):
    out = pipe(PROMPT, reference=tiny.photo(1), num_inference_steps=1)
    assert [face.box for face in out.faces] == [tiny.BOX] and out.images[0].size == (tiny_stock.SIDE,) * 2
    whole = pipe(PROMPT, reference=tiny.photo(1), num_inference_steps=1, return_dict=False)
    assert isinstance(whole, tuple) and len(whole) == (1 if hasattr(pipe, "text_encoder_2") else 2)


def test_a_persona_stands_for_the_photo_and_survives_the_encoders(pipe: Any, tmp_path: Path):
    persona = pipe.enroll([tiny.photo(1), tiny.photo(2)])
    persona.save(tmp_path / "me.safetensors")
    wanted = draw(pipe, reference=[tiny.photo(1), tiny.photo(2)])
    assert torch.equal(draw(pipe, reference=persona), wanted)
    assert torch.equal(draw(pipe, reference=tmp_path / "me.safetensors"), wanted)


@pytest.mark.parametrize("absent", ["off", "zeros"])
def test_encoders_can_be_freed_when_all_is_encoded(xl: bool, absent: str):
    pipe = tiny_stock.personal(tiny_stock.stock(xl), **tiny_stock.readers())
    pipe.load_adapter(tiny_stock.identity(pipe.unet, absent=absent))
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    persona, wanted = pipe.enroll(tiny.photo(1)), draw(pipe, reference=tiny.photo(1))
    embeds = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = dict(zip(names, embeds, strict=False))
    given |= {"branch_embeds": pipe.encode_branches(PROMPT), "negative_branch_embeds": pipe.encode_branches("")}
    encoders = ("text_encoder", "text_encoder_2", "vision_encoder", "t5_encoder", "byt5_encoder")
    gone = [weakref.ref(each) for name in encoders if (each := getattr(pipe, name, None)) is not None]
    del each
    pipe.free_encoders()
    assert gone and not any(each() is not None for each in gone)
    assert torch.equal(draw(pipe, None, reference=persona, **given), wanted)
    with pytest.raises(WeightsError, match="freed"):
        draw(pipe, None, reference=tiny.photo(1), **given)


def test_rows_without_a_person_may_use_the_features_of_an_empty_picture(stock: Any):
    pipe = tiny_stock.personal(tiny_stock.stock(hasattr(stock, "text_encoder_2")))
    off, persona = draw(pipe, reference=tiny.photo(1)), pipe.enroll(tiny.photo(1))
    unguided = draw(pipe, reference=persona, guidance_scale=1.0)
    pipe.load_adapter(tiny_stock.identity(pipe.unet, absent="zeros"))
    assert not same(draw(pipe, reference=persona), off)
    assert same(draw(pipe, reference=persona, guidance_scale=1.0), unguided) and not same(unguided, off)
    assert torch.equal(draw(pipe), draw(stock))  # without any person: the stock picture
    assert torch.equal(draw(pipe, reference=persona, identity_scale=0.0), draw(stock))
    generators = [tiny.generator(1), tiny.generator(2)]
    both = draw(pipe, [PROMPT] * 2, reference=[None, persona], generator=generators)
    assert same(both[:1], draw(pipe, seed=1)) and same(both[1:], draw(pipe, reference=persona, seed=2))


@pytest.mark.parametrize("projection", ["linear", "plus"])
def test_other_projections_give_the_same_in_a_batch_as_alone(projection: str):
    pipe = tiny_stock.personal(tiny_stock.stock())
    shape = {"input_width": 16} if projection == "linear" else {"inner_width": 64, "tokens": 3}
    pipe.load_adapter(tiny_stock.identity(pipe.unet, projection=projection, absent="zeros", **shape))
    references = [tiny.photo(1), [tiny.photo(2), tiny.photo(3)], None]
    generators = [tiny.generator(seed) for seed in range(3)]
    together = draw(pipe, [PROMPT] * 3, reference=references, generator=generators)
    for row, reference in enumerate(references):
        assert same(together[row : row + 1], draw(pipe, reference=reference, seed=row))
    assert not same(draw(pipe, reference=tiny.photo(2)), draw(pipe, reference=references[1]))


@pytest.mark.parametrize(
    ("router", "absent", "people"),
    [
        (True, "off", "separate"), (True, "zeros", "separate"), (False, "zeros", "separate"),
        (False, "zeros", "concatenate"),
    ],
)  # fmt: skip
def test_pictures_of_several_people_are_in_a_batch_as_alone(router: bool, absent: str, people: str):
    pipe = tiny_stock.personal(tiny_stock.stock())
    pipe.load_adapter(tiny_stock.identity(pipe.unet, absent=absent, router=router, people=people))
    for routing in pipe.adapter.parts().get("vision_router", []):
        torch.nn.init.normal_(routing, std=0.5)
    prompts = ["{a} hugs {b}", "{a} smiles", "a tree"]
    two = {"a": tiny.photo(1), "b": [tiny.photo(2), tiny.photo(3)]}
    references = [two, {"a": tiny.photo(1)}, None]
    generators = [tiny.generator(seed) for seed in range(3)]
    together = draw(pipe, prompts, reference=references, generator=generators)
    for row, reference in enumerate(references):
        assert same(together[row : row + 1], draw(pipe, prompts[row], reference=reference, seed=row))
    exchanged = draw(pipe, prompts[0], reference={"a": two["b"], "b": two["a"]}, seed=0)
    # A router tells people apart by their order, and columns by their place; one softmax does not.
    assert same(exchanged, together[:1]) == (people == "concatenate")


def test_the_stock_image_encoder_encodes_references_without_a_vision_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=24, intermediate_size=48, **sizes)
    ).eval()
    pipe = tiny_stock.personal(tiny_stock.stock(), image_encoder=image_encoder)
    pipe.vision_encoder = None
    assert pipe.reference_encoder is image_encoder and pipe.enroll(tiny.photo(1)).features.shape == (5, 24)
    assert not same(draw(pipe, reference=tiny.photo(1)), draw(pipe))
    pipe.image_encoder = None
    with pytest.raises(WeightsError, match="vision_encoder="):
        draw(pipe, reference=tiny.photo(1))


def test_letters_and_sentence_reach_the_text_branches(stock: Any):
    xl = hasattr(stock, "text_encoder_2")
    pipe = tiny_stock.personal(tiny_stock.stock(xl), **tiny_stock.readers())
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    assert pipe.text_adapter is not None and pipe.adapter is not None
    read = draw(pipe, OTHER)
    assert not same(read, draw(stock, OTHER)) and not same(draw(pipe, OTHER, reference=tiny.photo(1)), read)
    assert not same(read, draw(pipe, OTHER, negative_branch_embeds=pipe.encode_branches("a red hat")))
    two = draw(
        pipe, [PROMPT, OTHER], generator=[tiny.generator(1), tiny.generator(2)], negative_prompt=["a red hat"] * 2
    )
    assert same(two[1:], draw(pipe, OTHER, seed=2, negative_prompt="a red hat"))
    copies = draw(pipe, OTHER, num_images_per_prompt=2)
    assert same(copies[:1], read)
    pipe.unload_adapter("text_adapter")
    assert torch.equal(draw(pipe, OTHER), draw(stock, OTHER))


def test_encoders_run_once_each_in_the_order_of_offloading(xl: bool):
    pipe = tiny_stock.personal(tiny_stock.stock(xl), **tiny_stock.readers())
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    order: list[str] = []
    names = ("t5_encoder", "byt5_encoder", "vision_encoder", "text_encoder", "unet")
    for name in names:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
    draw(pipe, [OTHER, PROMPT], reference=tiny.photo(1), guidance_scale=3.0, num_inference_steps=1)
    ran = list(dict.fromkeys(order))
    assert ran == [name for name in type(pipe).model_cpu_offload_seq.split("->") if name in names]
    assert all(order.count(name) == 1 for name in ran[:3])


def test_branch_embeds_are_converted_to_the_denoiser_or_raise():
    pipe = tiny_stock.personal(tiny_stock.stock(), **tiny_stock.readers())
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    wanted, embeds = draw(pipe, OTHER), pipe.encode_branches(OTHER)
    double = {name: Tokens(each.values.double(), each.mask) for name, each in embeds.items()}
    assert same(draw(pipe, OTHER, branch_embeds=double), wanted)
    for given, message in (
        ({"branch_embeds": {"t5": embeds["t5"]}}, "branch_embeds lacks byt5"),
        ({"negative_branch_embeds": {"byt5": embeds["byt5"]}}, "negative_branch_embeds lacks t5"),
        ({"branch_embeds": pipe.encode_branches([OTHER, PROMPT])}, "2 rows of t5 for 1 prompts"),
    ):
        with pytest.raises(PromptError, match=message):
            draw(pipe, OTHER, **given)


def test_diffusers_own_ip_adapter_still_works_and_can_be_unloaded():
    parts = tiny_ip.components(False)
    stock = diffusers.StableDiffusionPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16}
    plain = draw(stock, **size)
    file = tiny_ip.nested(tiny_ip.tensors("plus", stock.unet, 0))
    stock.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)
    image_encoder, shown = stock.image_encoder, draw(stock, ip_adapter_image=tiny.photo(1), **size)
    pipe = ImaginePipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, ip_adapter_image=tiny.photo(1), **size), shown)
    for load in (lambda: pipe.load_ip_adapter(file), lambda: pipe.load_adapter(tiny_stock.identity(pipe.unet))):
        with pytest.raises(WeightsError, match="unload_ip_adapter"):
            load()
    pipe.unload_ip_adapter()
    assert torch.equal(draw(pipe, **size), plain)
    pipe.register_modules(image_encoder=image_encoder)
    pipe.load_ip_adapter(file)
    assert same(draw(pipe, ip_adapter_image=tiny.photo(1), **size), shown)


def test_scales_of_an_ip_adapter_that_diffusers_loaded_also_change_in_mid_picture():
    stock = diffusers.StableDiffusionPipeline(**tiny_ip.components(False))
    file = tiny_ip.nested(tiny_ip.tensors("plus", stock.unet, 0))
    stock.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)
    pipe = ImaginePipeline.from_pipe(stock)
    given: dict[str, Any] = {"ip_adapter_image": tiny.photo(1), "height": 16, "width": 16}
    drawn = {}
    for each in (stock, pipe):
        each.set_progress_bar_config(disable=True)
        each.set_ip_adapter_scale(0.4)
        weaker = draw(each, **given)
        cutoff = diffusers.callbacks.IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        each.set_ip_adapter_scale(1.0)
        drawn[each] = weaker, draw(each, callback_on_step_end=cutoff, **given), draw(each, **given)
    assert all(map(torch.equal, drawn[stock], drawn[pipe])) and not same(*drawn[pipe][:2])
    with pytest.raises(ConfigError, match="do not fit the IP-Adapters"):
        pipe.set_ip_adapter_scale([0.1, 0.2])


@pytest.mark.parametrize("by_diffusers", [False, True])
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("strong", "scale='strong' must be a finite number"), ([None], "scale=None must be"), (True, "scale=True must"),
        (float("nan"), "scale=nan must be"), ({"down": {"block_1": "x"}}, "scale='x' must be"),
        ({"nowhere": 1.0}, "blocks 'nowhere': choose down, mid or up"),
        ({"up": {"block_9": 1.0}}, "'block_9' of 'up'.* blocks with attention are block_1, block_2"),
        ({"mid": [0.1, 0.2]}, "These scales do not fit"), ([0.1, 0.2], "scales .* IP-Adapters"),
    ],
)  # fmt: skip
def test_scales_that_cannot_act_raise_and_change_nothing(by_diffusers: bool, scale: Any, message: str):
    stock = diffusers.StableDiffusionPipeline(**tiny_ip.components(False))
    pipe = stock if by_diffusers else ImaginePipeline.from_pipe(stock)
    file = tiny_ip.nested(tiny_ip.tensors("plus", pipe.unet, 0))
    pipe.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)
    pipe = ImaginePipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"ip_adapter_image": tiny.photo(1), "height": 16, "width": 16}
    pipe.set_ip_adapter_scale({"down": {"block_1": 0.3}, "mid": 0.2, "up": {"block_1": [0.1, 0.2]}})
    before = draw(pipe, **given)
    with pytest.raises(ConfigError, match=message):
        pipe.set_ip_adapter_scale(scale)
    assert torch.equal(draw(pipe, **given), before)
    pipe.set_ip_adapter_scale(torch.tensor(0.9))  # a tensor is a number too
    tensor = draw(pipe, **given)
    pipe.set_ip_adapter_scale((0.9,))
    assert same(draw(pipe, **given), tensor) and not same(tensor, before)


def test_a_scale_without_ip_adapters_has_no_effect_as_in_diffusers(pipe: Any, stock: Any):
    wanted = draw(pipe, reference=tiny.photo(1))
    for each in (stock, pipe):
        each.set_ip_adapter_scale(0.3)
    assert torch.equal(draw(pipe, reference=tiny.photo(1)), wanted)


def test_components_of_a_stock_pipeline_are_those_of_the_stock_class(stock: Any, xl: bool):
    pipe = ImaginePipeline.from_pipe(stock)
    assert pipe.components.keys() == stock.components.keys()
    name = f"StableDiffusion{'XL' if xl else ''}Img2ImgPipeline"
    for cls in (getattr(diffusers, name), personalised_class(getattr(diffusers, name))):
        assert cls(**pipe.components).unet is stock.unet
    personal = tiny_stock.personal(tiny_stock.stock(xl))
    assert set(personal.components) - set(stock.components) == {"vision_encoder"}


def test_diffusers_ip_adapter_on_a_denoiser_with_our_adapter_raises_one_sentence():
    stock = diffusers.StableDiffusionPipeline(**tiny_ip.components(False))
    stock.set_progress_bar_config(disable=True)
    pipe = tiny_stock.personal(stock)
    wanted = draw(pipe, reference=tiny.photo(1), height=16, width=16)
    file = tiny_ip.nested(tiny_ip.tensors("plus", stock.unet, 0))
    with pytest.raises(WeightsError, match=r"load_ip_adapter and unload_ip_adapter of imagine.*or unload_adapter\(\)"):
        stock.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)
    with pytest.raises(WeightsError, match=r"unload_adapter\(\) first"):
        stock.unload_ip_adapter()
    assert torch.equal(draw(pipe, reference=tiny.photo(1), height=16, width=16), wanted)
    pipe.unload_adapter()
    stock.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)


def test_a_pipeline_for_prompts_only_encodes_them_and_takes_a_denoiser_later(xl: bool, tmp_path: Path):
    whole = tiny_stock.personal(tiny_stock.stock(xl), **tiny_stock.readers())
    whole.load_adapter(tiny.text_adapter(whole.unet))
    wanted = draw(whole, OTHER, reference=tiny.photo(1))
    whole.save_pretrained(tmp_path)
    pipe = ImaginePipeline.from_pretrained(tmp_path, unet=None, vae=None, finder=whole.finder)
    for name, tokens in whole.encode_branches(OTHER).items():
        assert torch.allclose(pipe.encode_branches(OTHER)[name].values, tokens.values, atol=1e-5)
    assert same(pipe.enroll(tiny.photo(1)).features, whole.enroll(tiny.photo(1)).features)
    for load in (
        lambda: pipe.load_adapter(whole.adapter),
        lambda: pipe.load_ip_adapter(tmp_path),
        lambda: pipe.set_attention_backend("native"),
        pipe.reset_attention_backend,
    ):
        with pytest.raises(ConfigError, match=r"^This pipeline was made without a unet"):
            load()
    with pytest.raises(ConfigError, match="without unet and vae"):
        draw(pipe, OTHER)
    other = tiny_stock.unet(xl)
    other.load_state_dict(whole.unet.state_dict())
    pipe = ImaginePipeline.from_pipe(pipe, unet=other, vae=whole.vae)
    pipe.set_progress_bar_config(disable=True)
    assert same(draw(pipe, OTHER, reference=tiny.photo(1)), wanted)


def test_keys_and_values_are_computed_once_per_picture(pipe: Any):
    counts: Counter[str] = Counter()
    watched = {name: module for name, module in pipe.unet.named_modules() if name.endswith("attn2.to_k")}
    branches = {
        name: layer.branches()["vision"].to_v for name, layer in pipe.adapter.layers().items() if layer.branches()
    }
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in {**watched, **branches}.items()
    ]
    draw(pipe, reference=tiny.photo(1), num_inference_steps=3)
    for hook in hooks:
        hook.remove()
    assert watched and branches and counts == dict.fromkeys([*watched, *branches], 1)


def test_from_pipe_shares_everything_and_casts_nothing(tmp_path: Path):
    stock = tiny_stock.stock()
    stock.unet.to(torch.bfloat16)
    pipe = ImaginePipeline.from_pipe(stock)
    assert all(getattr(pipe, name) is part for name, part in stock.components.items())
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    tiny_stock.encoder().save_pretrained(tmp_path)
    again = ImaginePipeline.from_pipe(pipe, vision_encoder=tmp_path)
    assert again.unet is stock.unet and again.vision_encoder.dtype == torch.bfloat16


def test_references_that_cannot_be_used_raise_one_sentence():
    stock = tiny_stock.stock()
    with pytest.raises(ConfigError, match="VQDiffusionPipeline"):
        personalised_class(type("VQDiffusionPipeline", (diffusers.DiffusionPipeline,), {}))
    with pytest.raises(ConfigError, match="controlnet"):
        personalised_class(diffusers.StableDiffusionControlNetPipeline).from_pipe(stock)
    pipe = ImaginePipeline.from_pipe(stock)
    for given in ({"reference": tiny.photo(1)}, {"ip_adapter_image": tiny.photo(1)}):
        with pytest.raises(WeightsError, match="load_adapter or load_ip_adapter"):
            pipe(PROMPT, **given)
    pipe.load_adapter(tiny.text_adapter(pipe.unet))
    with pytest.raises(WeightsError, match="t5_tokenizer"):
        pipe(PROMPT)
    with pytest.raises(WeightsError, match="no identity adapter"):
        pipe(PROMPT, reference=tiny.photo(1))
    with pytest.raises(WeightsError, match="load_ip_adapter"):
        pipe.load_adapter(Adapter(pipe.unet, [BranchSpec("pose", 8)]))
    ready = tiny_stock.personal(tiny_stock.stock())
    ready.load_adapter(tiny_stock.identity(ready.unet, input_width=20))
    with pytest.raises(WeightsError, match="width 20, but the vision encoder gives 24"):
        ready(PROMPT, reference=tiny.photo(1))


# --- numbers that are not finite, and notes ---------------------------------------------------------------------------
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("name", ["adapter", "text_encoder", "unet"])
def test_a_picture_that_is_not_finite_raises_and_names_the_part(xl: bool, name: str, output_type: str):
    pipe = tiny_stock.personal(tiny_stock.stock(xl))
    with torch.no_grad():
        for parameter in getattr(pipe, name).parameters():
            parameter.view(-1)[0] = float("nan")
    with pytest.raises(WeightsError, match=f"would be black: {name} holds a number that is not finite"):
        pipe(PROMPT, reference=tiny.photo(1), num_inference_steps=1, output_type=output_type)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_an_autoencoder_that_is_not_finite_is_named(xl: bool, with_adapter: bool):
    pipe = tiny_stock.personal(tiny_stock.stock(xl))
    if not with_adapter:
        pipe.unload_adapter()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(WeightsError, match=r"vae holds .* in decoder\.conv_out\.bias"):
        pipe(PROMPT, num_inference_steps=1)


def test_notations_of_other_programs_are_in_the_notes(pipe: Any):
    for reference in (None, tiny.photo(1)):
        out = pipe("a person (smiling:1.4)", reference=reference, negative_prompt="<lora:x:1>", num_inference_steps=1)
        assert "(smiling:1.4)" in out.notes[0] and "<lora:x:1>" in out.notes[1] and len(out.notes) == 2
    assert pipe(PROMPT, num_inference_steps=1).notes == []


@pytest.mark.parametrize("adapted", [True, False])
def test_results_record_how_each_picture_came_about(adapted: bool) -> None:
    pipe = tiny_stock.personal(tiny_stock.stock())
    reference: Any = {"Ann Miller": tiny.photo(1)}
    if not adapted:
        pipe.unload_adapter()
        reference = None
    generators = [tiny.generator(3), tiny.generator(4)]
    out = pipe(
        "{Ann Miller} on a beach" if adapted else "a beach", reference=reference, negative_prompt="grey",
        num_inference_steps=2, generator=generators, num_images_per_prompt=2,
    )  # fmt: skip
    first, second = out.records
    assert (first.seed, second.seed, first.steps, first.guidance_scale) == (3, 4, 2, 7.5)
    assert first.prompt == ("{a} on a beach" if adapted else "a beach") and first.negative_prompt == "grey"
    assert len(first.people) == (1 if adapted else 0) and len(first.weights) == 10
    assert "Ann" not in str(first)
    other = pipe("a beach", num_inference_steps=2, output_type="latent")
    assert not hasattr(other, "records")
