"""Pipelines of diffusion transformers with `reference=`: as stock without one, and one person per picture with one."""

import inspect
import threading
from typing import Any

import pytest
import torch

from imagine import ImaginePipeline, Persona
from imagine.errors import ConfigError, PromptError, WeightsError
from imagine.transformer_bases import TRANSFORMER_PIPELINES
from imagine.transformer_bases.pipelines import class_by_name
from tests import tiny, tiny_stock, tiny_transformers
from tests import tiny_transformer_pipelines as tiny_pipelines
from tests.tiny_transformer_pipelines import draw, native, personal, stock

NAMES = tuple(tiny_pipelines.PIPELINES)
ONE, OTHER = tiny.photo(1), tiny.photo(2)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str) -> Any:
    return personal(stock(name))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-4)


@pytest.mark.parametrize("stock_name", TRANSFORMER_PIPELINES)
def test_every_stock_argument_is_kept(stock_name: str):
    import diffusers

    theirs, ours = getattr(diffusers, stock_name), class_by_name(stock_name)
    assert issubclass(ours, theirs) and ours.__name__ == stock_name and class_by_name(stock_name) is ours
    wanted = inspect.signature(theirs.__call__).parameters
    found = inspect.signature(ours.__call__).parameters
    assert list(found)[: len(wanted)] == list(wanted) and {"reference", "identity_scale"} <= set(found)
    assert all(found[each].default == wanted[each].default for each in wanted)
    assert {"joint_attention_kwargs", "attention_kwargs"} & set(wanted)


def test_without_a_reference_and_at_scale_zero_it_is_the_stock_pipeline(name: str, pipe: Any):
    more = native(name)
    wanted = draw(stock(name), name, count=2, **more)
    assert torch.equal(draw(pipe, name, count=2, **more), wanted)
    assert torch.equal(draw(pipe, name, count=2, reference=ONE, identity_scale=0.0, **more), wanted)
    drawn = draw(pipe, name, count=2, reference=ONE, **more)
    assert not same(drawn, wanted)


def test_people_of_a_batch_do_not_mix(name: str, pipe: Any):
    more = native(name)
    people: list[Any] = [ONE, OTHER]
    batch = draw(pipe, name, count=2, reference=people, **more)
    for number, each in enumerate(people):
        alone = draw(pipe, name, count=2, reference=[each, each], **more)
        assert same(batch[number], alone[number])
    assert not same(batch, draw(pipe, name, count=2, reference=people[::-1], **more))


def test_results_record_how_each_picture_came_about(name: str, pipe: Any):
    side, more = tiny_pipelines.SIDES.get(name, 8), native(name)
    out = pipe(
        **{**tiny_pipelines.words(name, 1), **more}, reference=ONE, height=side, width=side, num_inference_steps=2,
        generator=tiny.generator(3), output_type="pt",
    )  # fmt: skip
    (record,) = out.records
    assert (record.seed, record.steps, len(record.people), len(record.weights)) == (3, 2, 1, 10)
    assert record.model and record.settings["identity_scale"] == 1.0


def test_without_guidance_and_in_a_window(name: str, pipe: Any):
    more = native(name)
    bare = draw(pipe, name, guided=False, **more)
    drawn = draw(pipe, name, guided=False, reference=ONE, **more)
    never = draw(pipe, name, guided=False, reference=ONE, identity_window=(1.0, 1.0), **more)
    late = draw(pipe, name, guided=False, reference=ONE, identity_window=(0.5, 1.0), **more)
    assert torch.equal(never, bare)
    assert not same(drawn, bare) and not same(late, bare) and not same(late, drawn)


def test_guidance_strengthens_the_person(name: str, pipe: Any):
    """The half without the prompt draws nobody: it is the stock pipeline's, whose text it has."""
    seen = list[tuple[int, bool]]()
    transformer = pipe.transformer

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        from imagine.transformer_bases.passing import current_pass

        current = current_pass()
        strength = None if current is None else current.conditioning.scales["vision"]
        rows = [] if strength is None else torch.as_tensor(strength).tolist()
        seen.append((len(rows), all(rows)))

    handle = transformer.register_forward_pre_hook(watch, with_kwargs=True)
    draw(pipe, name, reference=ONE, **native(name))
    handle.remove()
    stacked = name in ("z_image", "sd3", "sana")
    assert seen == ([(2, False)] * 2 if stacked else [(1, True), (0, True)] * 2)


def test_copies_do_not_mix(name: str, pipe: Any):
    if name == "sd3":
        pytest.skip("diffusers does not repeat encoded prompts for copies here")
    two = draw(pipe, name, num_images_per_prompt=2, reference=ONE, **native(name))
    assert same(two[:1], draw(pipe, name, reference=ONE, **native(name)))


def test_threads_share_one_transformer():
    """Each thread has a pipeline of its own, as diffusers requires, around the same transformer."""
    first = personal(stock("z_image"))
    second = ImaginePipeline.from_pipe(first, scheduler=type(first.scheduler).from_config(first.scheduler.config))
    second.set_progress_bar_config(disable=True)
    wanted = [draw(first, "z_image", reference=each) for each in (ONE, OTHER)]
    drawn: dict[int, torch.Tensor] = {}

    def run(number: int, pipe: Any, photo: Any) -> None:
        drawn[number] = draw(pipe, "z_image", reference=photo)

    threads = [threading.Thread(target=run, args=each) for each in ((0, first, ONE), (1, second, OTHER))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(drawn[number], want) for number, want in enumerate(wanted))


@pytest.mark.parametrize("name", ["flux2"])
def test_native_references_beside_the_adapter(name: str):
    pipe = personal(stock(name))
    picture = tiny.photo(5)  # diffusers takes no smaller one
    drawn = [
        draw(pipe, name, **more)
        for more in ({}, {"image": picture}, {"reference": ONE}, {"image": [picture] * 2, "reference": ONE})
    ]
    assert all(not same(one, other) for number, one in enumerate(drawn) for other in drawn[:number])


def test_several_people_and_a_persona(tmp_path: Any):
    pipe = personal(stock("flux"), router=True)
    persona = pipe.enroll(ONE)
    persona.save(tmp_path / "me.safetensors")
    prompt: dict[str, Any] = {"prompt": "a {a} with {b} on the beach", "guided": False, "negative_prompt": None}
    both = draw(pipe, "flux", reference={"a": Persona.load(tmp_path / "me.safetensors"), "b": OTHER}, **prompt)
    placed = draw(
        pipe, "flux", reference={"a": ONE, "b": OTHER}, layout={"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}, **prompt
    )
    swapped = draw(
        pipe, "flux", reference={"a": OTHER, "b": ONE}, layout={"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}, **prompt
    )
    assert not same(both, placed) and not same(placed, swapped)
    plain = personal(stock("flux"))
    given = {"height": 8, "width": 8, "num_inference_steps": 1, "output_type": "pt"}
    out = plain("{a} with {b}", reference={"a": ONE, "b": OTHER}, **given)
    assert len(out.faces) == 2 and "left to right" in out.notes[0]


def test_save_and_load_the_pipeline(tmp_path: Any):
    pipe = personal(stock("flux2"))
    wanted = draw(pipe, "flux2", reference=ONE)
    pipe.save_pretrained(tmp_path)
    assert type(pipe.vae).__name__ == "AutoencoderKLFlux2"
    loaded: Any = ImaginePipeline.from_pretrained(tmp_path)
    loaded.finder = pipe.finder
    loaded.set_progress_bar_config(disable=True)
    assert loaded.adapter.metadata["family"] == "FLUX.2"
    assert torch.equal(draw(loaded, "flux2", reference=ONE), wanted)


@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_group_offload"])
def test_offload_modes(mode: str):
    """On a machine without a GPU the modes of diffusers run with the CPU as the device."""
    pipe = personal(stock("flux2"))
    wanted = draw(pipe, "flux2", reference=ONE)
    if mode == "enable_group_offload":
        cpu = torch.device("cpu")
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipe, "flux2", reference=ONE), wanted)


def test_lora_files_and_another_transformer(tmp_path: Any):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = personal(stock("flux2"))
    wanted = draw(pipe, "flux2", reference=ONE)
    donor = tiny_transformers.transformer("flux2", joint_attention_dim=48)
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor))
    pipe.load_lora_weights(tmp_path)
    assert not same(draw(pipe, "flux2", reference=ONE), wanted)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, "flux2", reference=ONE), wanted)
    before = pipe.transformer
    pipe.transformer = tiny_transformers.transformer("flux2", seed=5, joint_attention_dim=48)
    assert pipe.adapter.is_attached(pipe.transformer) and not pipe.adapter.is_attached(before)
    assert not same(draw(pipe, "flux2", reference=ONE), wanted)


def test_callbacks_keep_working():
    pipe, steps = personal(stock("flux2")), list[int]()

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        assert set(tensors) == {"latents"}
        return tensors

    draw(pipe, "flux2", reference=ONE, callback_on_step_end=callback)
    assert steps == [0, 1]


def test_mistakes_are_sentences():
    pipe = personal(stock("flux2"))
    with pytest.raises(ConfigError, match="takes no 'refernce'; is it reference"):
        draw(pipe, "flux2", refernce=ONE)
    with pytest.raises(PromptError, match="3 references"):
        draw(pipe, "flux2", count=2, reference=[ONE] * 3)
    with pytest.raises(WeightsError, match=r"was made for Z-Image, but this transformer is FLUX\.2"):
        pipe.load_adapter(tiny_transformers.adapter(tiny_transformers.transformer("z_image")))
    wrong = tiny_transformers.adapter(pipe.transformer)
    wrong.metadata["encoder_fingerprint"] = "0" * 16
    with pytest.raises(WeightsError, match="trained with the vision encoder 0000000000000000"):
        pipe.load_adapter(wrong)
    narrow = tiny_transformers.adapter(pipe.transformer, spec={"input_width": 20})
    pipe.load_adapter(narrow)
    with pytest.raises(WeightsError, match="features of width 20, but the vision encoder gives 24"):
        draw(pipe, "flux2", reference=ONE)
    with pytest.raises(WeightsError, match="adapter for a U-Net"):
        pipe.load_adapter(tiny_stock.identity(tiny_stock.unet(False)))
    with pytest.raises(WeightsError, match=r"No IP-Adapter file is known for FLUX\.2"):
        pipe.load_ip_adapter({})
    pipe.unload_adapter()
    with pytest.raises(WeightsError, match="No adapter is attached"):
        draw(pipe, "flux2", reference=ONE)
