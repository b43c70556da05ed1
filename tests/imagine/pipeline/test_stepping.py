"""Steps that several calls share: every picture equals the one drawn alone, whoever joins or leaves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from imagine.adapter.adapter import Adapter
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.drawing import Drawing
from imagine.pipeline.output import ImagineOutput
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.pipeline.stepping import Denoising, Stepper
from imagine.records import FaceBox
from tests import tiny

SMALL = FaceBox(8.0, 10.0, 6.0, 8.0, 1.0)


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    """Return a pipeline with a router, which draws several people."""
    from dataclasses import replace

    pipe = tiny.pipeline()
    assert pipe.adapter is not None
    adapter = Adapter(pipe.unet, [replace(pipe.adapter.branch_specs[0], router=True)], lora_rank=2)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe.load_adapter(adapter)
    return pipe


@pytest.fixture(scope="module")
def calls(pipe: ImaginePipeline) -> list[dict[str, Any]]:
    """Return the arguments of calls that differ in everything but the size of their pictures."""
    ann, bob, cat = (pipe.enroll(tiny.photo(seed)) for seed in (1, 2, 3))
    usual = {"height": 32, "width": 32, "output_type": "np"}
    return [
        {"prompt": "a person smiling on a beach", "reference": ann, "num_inference_steps": 4, **usual},
        {
            "prompt": "{a} smiling, {b} in a red hat", "reference": {"a": bob, "b": cat}, "guidance_scale": 3.0,
            "identity_guidance_scale": 1.5, "num_inference_steps": 3, **usual,
        },
        {"prompt": "an old woman in a blue shirt", "guidance_scale": 1.0, "num_inference_steps": 6, **usual},
        {
            "prompt": 'a person with the letters "OK", looking to the left', "reference": cat, "identity_scale": 0.4,
            "identity_window": (0.3, 1.0), "num_images_per_prompt": 2, "guidance_rescale": 0.5, **usual,
        },
    ]  # fmt: skip


def generators(number: int, call: dict[str, Any]) -> list[torch.Generator]:
    return [tiny.generator(10 * number + copy) for copy in range(call.get("num_images_per_prompt", 1))]


def together(
    pipe: ImaginePipeline, drawings: Sequence[Drawing], joins: Sequence[int], most: int | None = None
) -> list[ImagineOutput]:
    """Draw all, where drawing N joins in step joins[N] and those that are done leave."""
    stepper, waiting = Stepper(pipe), dict(enumerate(joins))
    iterators, runs = [iter(each) for each in drawings], dict[int, Denoising]()
    for step in range(100):
        for number in [number for number, join in waiting.items() if join == step]:
            del waiting[number]
            runs[number] = next(iterators[number])
        if not waiting and not runs:
            break
        if runs:
            stepper.step(list(runs.values()), most)
        for number in [number for number, run in runs.items() if run.done]:
            following = next(iterators[number], None)
            if following is None:
                del runs[number]
            else:
                runs[number] = following
    return [each.result() for each in drawings]


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("joins", [(0, 0, 0, 0), (3, 0, 1, 2)])
def test_pictures_of_different_calls_equal_those_drawn_alone(
    pipe: ImaginePipeline, calls: list[dict[str, Any]], joins: tuple[int, ...], most: int | None
) -> None:
    alone = [pipe(**call, generator=generators(number, call)) for number, call in enumerate(calls)]
    drawings = [pipe.drawing(**call, generator=generators(number, call)) for number, call in enumerate(calls)]
    for one, other in zip(together(pipe, drawings, joins, most), alone, strict=True):
        assert np.abs(one.images - other.images).max() < 1e-4
        assert one.people_found == other.people_found and one.faces == other.faces
    assert np.abs(alone[0].images[0] - alone[3].images[0]).max() > 1e-2


def test_a_second_pass_shares_steps_with_other_first_passes(pipe: ImaginePipeline, calls: list[dict[str, Any]]) -> None:
    pipe.finder, before = KnownBoxesFinder([SMALL]), pipe.finder
    try:
        call = {**calls[0], "refine_faces": True}
        alone = [pipe(**call, generator=tiny.generator(1)), pipe(**calls[2], generator=tiny.generator(2))]
        drawings = [pipe.drawing(**call, generator=tiny.generator(1))]
        drawings.append(pipe.drawing(**calls[2], generator=tiny.generator(2)))
        shared = together(pipe, drawings, (0, 2))
    finally:
        pipe.finder = before
    assert [out.refined for out in shared] == [out.refined for out in alone] == [1, 0]
    for one, other in zip(shared, alone, strict=True):
        assert np.abs(one.images - other.images).max() < 1e-4


def test_a_stopped_drawing_ends_and_the_others_go_on(pipe: ImaginePipeline, calls: list[dict[str, Any]]) -> None:
    alone = pipe(**calls[0], generator=tiny.generator(1))
    drawings = [pipe.drawing(**calls[number], generator=tiny.generator(number + 1)) for number in (0, 2)]
    first, second = (iter(each) for each in drawings)
    runs, stepper = [next(first), next(second)], Stepper(pipe)
    stepper.step(runs)
    drawings[1].stop()
    assert runs[1].done and not runs[0].done
    while not runs[0].done:
        stepper.step(runs[:1])
    assert next(first, None) is None
    assert np.abs(drawings[0].result().images - alone.images).max() < 1e-4


def test_an_error_in_a_pass_leaves_everything_as_it_was(
    pipe: ImaginePipeline, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = pipe.drawing(**calls[0], generator=tiny.generator(1))
    run, stepper = next(iter(drawing)), Stepper(pipe)
    stepper.step([run])
    before = run.latents.clone()
    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", _out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            stepper.step([run])
    assert run.number == 1 and torch.equal(run.latents, before)
    stepper.step([run])
    assert run.number == 2


def test_the_clean_estimate_ends_at_the_picture(pipe: ImaginePipeline, calls: list[dict[str, Any]]) -> None:
    drawing = pipe.drawing(**calls[0], generator=tiny.generator(1))
    run, stepper = next(iter(drawing)), Stepper(pipe)
    assert torch.equal(run.clean_estimate(), run.latents)
    distances, estimates = [], []
    while not run.done:
        stepper.step([run])
        estimates.append(run.clean_estimate())
    distances = [float((each - run.latents).norm()) for each in estimates]
    assert distances[-1] == 0 and distances[0] > distances[-2]


def test_pictures_of_other_sizes_do_not_fit(pipe: ImaginePipeline, calls: list[dict[str, Any]]) -> None:
    one, other = (next(iter(pipe.drawing(**calls[number]))) for number in (0, 2))
    wide = next(iter(pipe.drawing(**{**calls[2], "width": 64})))
    coarse = next(iter(pipe.drawing(**{**calls[0], "identity_blocks": "down"})))
    placed = next(iter(pipe.drawing(**{**calls[1], "layout": "left to right"})))
    assert one.fits(other) and not one.fits(wide) and not one.fits(coarse) and not one.fits(placed)


def _out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")
