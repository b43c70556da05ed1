"""diffusers' IP-Adapter interface gives diffusers' own pictures for the same base, files and arguments."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers.image_processor import IPAdapterMaskProcessor
from safetensors.torch import save_file

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.errors import ConfigError, ImagineError, WeightsError
from imagine.ip_adapter.export import export_adapter
from imagine.ip_adapter.reading import import_adapter, read_ip_adapter
from imagine.people.faces import KnownBoxesFinder, crop_face
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_ip, tiny_stock

CLOSE = 1e-5
PROMPT = tiny.SENTENCES[0]


def pair(xl: bool) -> tuple[Any, Any]:
    """Return diffusers' pipeline and ours, each with its own copy of one base."""
    import diffusers

    stock = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    parts = tiny_ip.components(xl)
    pipes = stock(**parts), personalised_class(stock)(**{**parts, "unet": copy.deepcopy(parts["unet"])})
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def pipes(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return pair(request.param)


def load(pipes: tuple[Any, Any], *kinds: str) -> None:
    """Load the same IP-Adapters into both pipelines."""
    files = [tiny_ip.nested(tiny_ip.tensors(kind, pipes[0].unet, seed)) for seed, kind in enumerate(kinds)]
    for pipe in pipes:
        pipe.load_ip_adapter(files, subfolder=[""], weight_name=[""] * len(files), image_encoder_folder=None)


def draw(pipe: Any, guidance: float = 3.0, seed: int = 5, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    size = {"height": 16, "width": 16}
    options = {"output_type": "np", **size, **options}
    return torch.as_tensor(
        pipe(
            prompt, num_inference_steps=2, guidance_scale=guidance, generator=tiny.generator(seed), **options
        ).images
    )  # fmt: skip


def assert_same(pipes: tuple[Any, Any], **options: Any) -> torch.Tensor:
    """Assert that both pipelines draw the same picture, and return it."""
    first, second = (draw(pipe, **options) for pipe in pipes)
    assert first.shape == second.shape and (first - second).abs().max() <= CLOSE
    return second


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", tiny_ip.KINDS)
def test_one_image_and_three(pipes: tuple[Any, Any], kind: str, guidance: float) -> None:
    load(pipes, kind)
    one = assert_same(pipes, guidance=guidance, ip_adapter_image=tiny.photo(1))
    three = assert_same(pipes, guidance=guidance, ip_adapter_image=[[tiny.photo(number) for number in (1, 2, 3)]])
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.4)
    weaker = assert_same(pipes, guidance=guidance, ip_adapter_image=tiny.photo(1))
    assert (one - three).abs().max() > 1e-3 and (one - weaker).abs().max() > 1e-3


def test_scale_0_is_no_adapter_bit_for_bit(pipes: tuple[Any, Any]) -> None:
    _, ours = pipes
    ours.unload_ip_adapter()
    before = draw(ours)
    assert ours.image_encoder is None and not ours.ip_adapters
    ours.register_modules(image_encoder=pipes[0].image_encoder or tiny_ip.encoder())
    load(pipes, "plus")
    assert not torch.equal(draw(ours, ip_adapter_image=tiny.photo(1)), before)
    assert torch.equal(draw(ours), before)  # loaded, but not used
    ours.set_ip_adapter_scale(0.0)
    assert torch.equal(draw(ours, ip_adapter_image=tiny.photo(1)), before)
    ours.set_ip_adapter_scale({"down": 0.0})
    assert torch.equal(draw(ours, ip_adapter_image=tiny.photo(1)), before)


def test_two_adapters_with_scales_of_blocks(pipes: tuple[Any, Any]) -> None:
    load(pipes, "plus", "linear")
    images = [[tiny.photo(1), tiny.photo(2)], tiny.photo(3)]
    scales: list[Any] = [
        [0.5, 0.8],
        [{"up": {"block_1": [0.0, 1.0]}}, 0.7],
        [{"down": 0.3, "mid": 1.0}, {"down": {"block_0": 0.9}, "up": {"block_2": [0.2, 0.6]}}],
    ]
    drawn = []
    for scale in scales:
        for pipe in pipes:
            pipe.set_ip_adapter_scale(scale)
        drawn.append(assert_same(pipes, ip_adapter_image=images))
    assert all((drawn[0] - each).abs().max() > 1e-3 for each in drawn[1:])


def test_masks_with_a_scale_for_each_image(pipes: tuple[Any, Any]) -> None:
    load(pipes, "plus", "full")
    left = torch.zeros(1, 1, 16, 16)
    left[..., :8] = 1
    masks = IPAdapterMaskProcessor(do_resize=False).preprocess(torch.cat([left, 1 - left]))
    both, whole = masks.reshape(1, 2, 16, 16), torch.ones(1, 1, 16, 16)
    images = [[tiny.photo(1), tiny.photo(2)], [tiny.photo(3)]]
    for pipe in pipes:
        pipe.set_ip_adapter_scale([[0.9, 0.4], 0.6])
    drawn = []
    for each in ([both, whole], [both.flip(1), whole], [both, whole * 0.5]):
        options = {"cross_attention_kwargs": {"ip_adapter_masks": each}}
        drawn.append(assert_same(pipes, ip_adapter_image=images, **options))
    assert all((drawn[0] - each).abs().max() > 1e-3 for each in drawn[1:])
    for pipe in pipes:
        pipe.set_ip_adapter_scale([0.5, {"mid": 1.0, "up": 0.5}])
    assert_same(pipes, ip_adapter_image=images, cross_attention_kwargs={"ip_adapter_masks": [both, whole]})


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_precomputed_embeds(pipes: tuple[Any, Any], guidance: float) -> None:
    load(pipes, "linear", "plus")
    theirs, ours = pipes
    images = [[tiny.photo(1), tiny.photo(2)], tiny.photo(3)]
    embeds = theirs.prepare_ip_adapter_image_embeds(images, None, torch.device("cpu"), 1, guidance > 1)
    from_images = draw(ours, guidance=guidance, ip_adapter_image=images)
    assert torch.equal(assert_same(pipes, guidance=guidance, ip_adapter_image_embeds=embeds), from_images)


def test_a_batch_of_prompts_and_pictures(pipes: tuple[Any, Any]) -> None:
    load(pipes, "full")
    assert_same(
        pipes, prompt=list(tiny.SENTENCES), num_images_per_prompt=2, ip_adapter_image=tiny.photo(1)
    )  # fmt: skip
    theirs, ours = pipes
    one, other = (
        theirs.prepare_ip_adapter_image_embeds(tiny.photo(seed), None, torch.device("cpu"), 1, True)[0]
        for seed in (1, 2)
    )
    mixed = torch.cat([torch.cat([side, more]) for side, more in zip(one.chunk(2), other.chunk(2), strict=True)])
    each = draw(ours, prompt=[PROMPT, PROMPT], ip_adapter_image_embeds=[mixed])
    assert (each[0] - draw(ours, prompt=[PROMPT, PROMPT], ip_adapter_image_embeds=[one])[0]).abs().max() <= CLOSE
    assert (each[1] - draw(ours, prompt=[PROMPT, PROMPT], ip_adapter_image_embeds=[other])[1]).abs().max() <= CLOSE


def test_beside_our_own_text_adapter(pipes: tuple[Any, Any]) -> None:
    """A new text adapter next to an IP-Adapter changes nothing, and each can be detached separately."""
    _, ours = pipes
    load(pipes, "full")
    before = draw(ours, ip_adapter_image=tiny.photo(1))
    ours.register_modules(**{name: each for name, each in tiny_stock.readers().items() if name.startswith("t5")})
    ours.load_adapter(Adapter(ours.unet, [BranchSpec("t5", 16)]))
    assert torch.equal(draw(ours, ip_adapter_image=tiny.photo(1)), before)
    ours.load_adapter(Adapter(ours.unet, [BranchSpec("t5", 16, zero_init=False)]))
    assert (draw(ours, ip_adapter_image=tiny.photo(1)) - before).abs().max() > 1e-3
    ours.unload_adapter("text_adapter")
    assert torch.equal(draw(ours, ip_adapter_image=tiny.photo(1)), before)
    ours.register_modules(t5_encoder=None, t5_tokenizer=None)


def test_latents_and_half_precision(pipes: tuple[Any, Any]) -> None:
    load(pipes, "plus")
    options: dict[str, Any] = {"ip_adapter_image": tiny.photo(1), "output_type": "latent"}
    assert assert_same(pipes, **options).shape == (1, 4, 8, 8)
    half = pair(hasattr(pipes[0], "text_encoder_2"))
    for pipe in half:
        pipe.to(torch.bfloat16)
    load(half, "plus")
    first, second = (draw(pipe, ip_adapter_image=tiny.photo(1)) for pipe in half)
    assert (first - second).abs().max() < 0.02 < (draw(half[1]) - second).abs().max()


@pytest.mark.parametrize("low", [True, False])
def test_an_exported_adapter_draws_the_same_picture_in_diffusers(low: bool, tmp_path: Path) -> None:
    """Load file, image encoder and LoRA as in docs/ip_adapter.md, and use the face crop of our finder."""
    theirs, ours = pair(False)
    ours.register_modules(vision_encoder=tiny_stock.encoder())
    ours.finder = KnownBoxesFinder([tiny.BOX])
    plain = draw(ours, 1.0)
    ours.load_adapter(tiny_stock.identity(ours.unet))
    export_adapter(ours.adapter, ours.denoiser, tmp_path / "ip.safetensors", ours.vision_encoder)
    crop = crop_face(tiny.photo(1), ours.finder, tiny.CROP).image
    theirs.register_modules(image_encoder=None, feature_extractor=None)
    theirs.load_lora_weights(tmp_path)
    theirs.load_ip_adapter(tmp_path, subfolder="", weight_name="ip.safetensors", low_cpu_mem_usage=low)
    shown = draw(ours, 1.0, reference=tiny.photo(1))
    assert (draw(theirs, 1.0, ip_adapter_image=crop) - shown).abs().max() < 1e-4 < (plain - shown).abs().max()


@pytest.mark.parametrize("kind", tiny_ip.KINDS)
def test_an_imported_branch_draws_a_reference_as_diffusers_does(kind: str) -> None:
    """The identity adapter gets the same features, and the same empty picture in the unconditional pass."""
    theirs, ours = pair(False)
    file = tiny_ip.tensors(kind, ours.unet)
    adapter, _ = import_adapter(read_ip_adapter(file), ours.unet)
    before = draw(ours)
    ours.load_adapter(adapter)
    ours.finder = KnownBoxesFinder([tiny.BOX])
    persona = ours.enroll(tiny.photo(1))
    shown = draw(ours, reference=persona, identity_scale=0.8)
    theirs.load_ip_adapter(tiny_ip.nested(file), subfolder="", weight_name="", image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.8)
    nobody = theirs.prepare_ip_adapter_image_embeds(tiny.photo(2), None, torch.device("cpu"), 1, True)[0][:1]
    features = persona.features[None] if kind == "linear" else persona.features[None, None]
    expected = draw(theirs, ip_adapter_image_embeds=[torch.cat([nobody, features])])
    assert (shown - expected).abs().max() <= CLOSE and (shown - before).abs().max() > 1e-3
    assert torch.equal(draw(ours, reference=persona, identity_scale=0.0), before)


# --- files and components --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the layout of IP-Adapter repositories."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "models").mkdir()
    for seed, kind in enumerate(tiny_ip.KINDS):
        save_file(tiny_ip.tensors(kind, tiny_ip.unet(), seed), folder / "models" / f"{kind}.safetensors")
    torch.save(tiny_ip.nested(tiny_ip.tensors("full", tiny_ip.unet(), 1)), folder / "models" / "full.bin")
    tiny_ip.encoder().save_pretrained(folder / "models" / "image_encoder")
    tiny_ip.encoder(tokens=26, pooled=14).save_pretrained(folder / "other" / "image_encoder")
    return folder


def fresh() -> tuple[Any, Any]:
    theirs, ours = pair(False)
    for pipe in (theirs, ours):
        pipe.register_modules(image_encoder=None)
    return theirs, ours


def test_a_folder_is_loaded_as_diffusers_loads_it(repository: Path) -> None:
    pipes = fresh()
    for pipe in pipes:
        pipe.load_ip_adapter(repository, subfolder="models", weight_name=["plus.safetensors", "linear.safetensors"])
    theirs, ours = pipes
    assert type(ours.image_encoder) is type(theirs.image_encoder)
    assert ours.feature_extractor.to_dict() == theirs.feature_extractor.to_dict()
    assert ours.components.keys() >= theirs.components.keys()
    assert_same(pipes, ip_adapter_image=[tiny.photo(1), tiny.photo(2)])
    reports = ours.load_ip_adapter(repository / "models" / "full.bin", low_cpu_mem_usage=False)
    assert [report.variant for report in reports] == ["full"] and len(ours.ip_adapters) == 1
    safe = fresh()[1]
    safe.load_ip_adapter(str(repository), "models", "full.safetensors", image_encoder_folder="models/image_encoder")
    image: dict[str, Any] = {"ip_adapter_image": tiny.photo(1)}
    assert torch.equal(draw(safe, **image), draw(ours, **image))


def test_a_failed_load_leaves_the_pipeline_unchanged(repository: Path) -> None:
    _, ours = fresh()
    ours.load_ip_adapter(repository, subfolder="models", weight_name="full.safetensors")
    before = ours.ip_adapters[0]
    image: dict[str, Any] = {"ip_adapter_image": tiny.photo(1)}
    picture = draw(ours, **image)
    sdxl = tiny_ip.tensors("full", tiny_ip.unet(xl=True))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (repository, {"subfolder": "models", "weight_name": "none.safetensors"}, "no file none"),
        (tiny_ip.nested(sdxl), {"image_encoder_folder": None}, "use the file made for it"),
        ("owner/name", {"subfolder": "models", "weight_name": "x.safetensors"}, "pass the local folder"),
        ([repository] * 3, {"subfolder": "models", "weight_name": ["a", "b"]}, "have different lengths"),
        (repository, {"subfolder": "models", "weight_name": "full.bin", "speed": 1}, "has no argument speed"),
    ]
    for source, options, message in wrong:
        with pytest.raises(ImagineError, match=message):
            ours.load_ip_adapter(source, **options)
    ours.register_modules(image_encoder=None)
    cpu_offload(ours.unet, torch.device("cpu"))
    with pytest.raises(ConfigError, match="before enable_sequential_cpu_offload"):
        ours.load_ip_adapter(repository, subfolder="models", weight_name="full.safetensors")
    remove_hook_from_submodules(ours.unet)
    with pytest.raises(WeightsError, match="of width 24, but the image encoder's are 26 wide"):
        ours.load_ip_adapter(
            repository, subfolder="models", weight_name="plus.safetensors", image_encoder_folder="other/image_encoder"
        )
    with pytest.raises(WeightsError, match="no image encoder in"):
        ours.load_ip_adapter(
            repository, subfolder="models", weight_name="plus.safetensors", image_encoder_folder="nowhere/encoder"
        )
    with pytest.raises(ConfigError, match="A state dict has no image encoder"):
        ours.load_ip_adapter(tiny_ip.nested(tiny_ip.tensors("full", tiny_ip.unet())))
    assert ours.ip_adapters == [before] and ours.image_encoder is None
    with pytest.raises(WeightsError, match="no image_encoder to encode"):
        draw(ours, **image)
    ours.register_modules(image_encoder=tiny_ip.encoder())
    assert torch.equal(draw(ours, **image), picture)


def test_an_encoder_that_does_not_fit_is_replaced_and_offloaded(repository: Path) -> None:
    _, ours = fresh()
    wrong = tiny_ip.encoder(tokens=26, pooled=14)
    ours.register_modules(image_encoder=wrong)
    ours.enable_model_cpu_offload(device="cpu")
    with pytest.raises(WeightsError, match="of width 24, but the image encoder's are 26 wide"):
        ours.load_ip_adapter(repository, "models", "plus.safetensors", image_encoder_folder=None)
    assert ours.image_encoder is wrong
    ours.load_ip_adapter(repository, "models", "plus.safetensors")
    assert ours.image_encoder is not wrong and hasattr(ours.image_encoder, "_hf_hook")
    draw(ours, ip_adapter_image=tiny.photo(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ip_adapter_image": [tiny.photo(1)]}, "1 are given for 2 IP-Adapters"),
        (
            {"ip_adapter_image": [tiny.photo(1)] * 2, "ip_adapter_image_embeds": [torch.zeros(2, 1, 20)] * 2},
            "exactly one",
        ),
        ({"ip_adapter_image_embeds": torch.zeros(2, 1, 20)}, "pass a list with one entry"),
        ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 20), torch.zeros(2, 1, 24)]}, "reads features .* of width 24"),
        ({"ip_adapter_image_embeds": [torch.zeros(3, 1, 20), torch.zeros(2, 1, 5, 24)]}, "has 3 rows"),
        ({"ip_adapter_image": [tiny.photo(1)] * 2, "masks": [torch.ones(1, 1, 16, 16)]}, "1 ip_adapter_masks for 2"),
        ({"ip_adapter_image": [tiny.photo(1)] * 2, "masks": [torch.ones(1, 2, 16, 16), None]}, "2 masks for 1 images"),
        ({"ip_adapter_image": [tiny.photo(1)] * 2, "masks": [torch.ones(16, 16), None]}, "IPAdapterMaskProcessor"),
        ({"ip_adapter_image": [tiny.photo(1)] * 2, "scale": [[0.5, 0.5], 1.0]}, "needs masks"),
        ({"scale": 0.5}, "1 scales for 2 IP-Adapters"),
        ({"scale": [{"down": {"block_0": [1, 2, 3]}}, 1.0]}, "do not fit the denoiser"),
    ],
)
def test_arguments_that_do_not_fit_raise(options: dict[str, Any], message: str) -> None:
    _, ours = pair(False)
    files = [tiny_ip.nested(tiny_ip.tensors(kind, ours.unet)) for kind in ("linear", "plus")]
    ours.load_ip_adapter(files, image_encoder_folder=None)
    masks, scale = options.pop("masks", None), options.pop("scale", None)
    if masks is not None:
        options["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    with pytest.raises(ConfigError, match=message):
        if scale is not None:
            ours.set_ip_adapter_scale(scale)
        draw(ours, **options)
