"""Guidance passes and their sums, and batches of tokens of different lengths."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from imagine.adapter.adapter import Adapter
from imagine.pipeline.sampling import (
    TEXT_AND_IDENTITY,
    TEXT_ONLY,
    UNCONDITIONAL,
    Guidance,
    GuidedDenoiser,
    Inputs,
    NoisyPictures,
    text_rows,
)
from imagine.records import Tokens, join, repeat
from tests import tiny


@pytest.mark.parametrize(
    ("guidance", "people", "passes"),
    [
        (Guidance(1.0), True, (TEXT_AND_IDENTITY,)),
        (Guidance(0.0), True, (TEXT_AND_IDENTITY,)),
        (Guidance(1.0), False, (TEXT_ONLY,)),
        (Guidance(3.0), True, (UNCONDITIONAL, TEXT_AND_IDENTITY)),
        (Guidance(3.0), False, (UNCONDITIONAL, TEXT_ONLY)),
        (Guidance(3.0, 3.0), True, (UNCONDITIONAL, TEXT_AND_IDENTITY)),
        (Guidance(3.0, 1.5), True, (UNCONDITIONAL, TEXT_ONLY, TEXT_AND_IDENTITY)),
        (Guidance(1.0, 2.0), True, (UNCONDITIONAL, TEXT_ONLY, TEXT_AND_IDENTITY)),
        (Guidance(3.0, 1.5), False, (UNCONDITIONAL, TEXT_ONLY)),
    ],
)
def test_passes(guidance: Guidance, people: bool, passes: tuple[tuple[bool, bool], ...]) -> None:
    assert guidance.passes(people) == passes


def test_predictions_are_combined_as_classifier_free_guidance() -> None:
    nothing, sentence, full = torch.randn(3, 2, 1, 2, 2)
    assert torch.equal(Guidance(1.0).combine([full]), full)
    torch.testing.assert_close(Guidance(3.0).combine([nothing, full]), nothing + 3 * (full - nothing))
    wanted = nothing + 3 * (sentence - nothing) + 2 * (full - sentence)
    torch.testing.assert_close(Guidance(3.0, 2.0).combine([nothing, sentence, full]), wanted)


def test_joining_pads_the_shorter_and_masks_the_padding() -> None:
    long, short = Tokens(torch.ones(1, 3, 2)), Tokens(torch.ones(2, 2, 2), torch.tensor([[True, False], [True, True]]))
    joined = join([long, short])
    assert joined.values.shape == (3, 3, 2) and joined.mask is not None
    assert joined.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert not joined.values[1:, 2].any()
    assert join([long, long]).mask is None


def test_copies_of_an_item_are_adjacent() -> None:
    tokens = Tokens(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[True], [False]]))
    copied = repeat(tokens, 2)
    assert copied.values.flatten().tolist() == [1, 1, 2, 2] and copied.mask is not None
    assert copied.mask.flatten().tolist() == [True, True, False, False]


def test_every_pass_has_the_groups_of_its_rows() -> None:
    text = (Tokens(torch.ones(2, 3, 4)), {"t5": Tokens(torch.ones(2, 2, 4))})
    groups = torch.tensor([[True, True], [True, False]])
    inputs = Inputs(text, text, Tokens(torch.ones(2, 6, 4)), groups=groups)
    for passes in ((TEXT_AND_IDENTITY,), (UNCONDITIONAL, TEXT_ONLY, TEXT_AND_IDENTITY)):
        _, conditioning = inputs.stacked(passes, torch.ones(2))
        assert conditioning.groups["vision"].tolist() == groups.tolist() * len(passes)
    assert not inputs.stacked((UNCONDITIONAL, TEXT_ONLY), torch.ones(2))[1].groups
    one = inputs.rows(torch.tensor([1, 0, 0]), Tokens(torch.ones(3, 3, 4)))  # a second pass has one person per row
    assert one.groups is None and not one.stacked((TEXT_AND_IDENTITY,), torch.ones(3))[1].groups


@torch.no_grad()
def test_groups_reach_the_routers_in_every_kind_of_guidance() -> None:
    pipe = tiny.pipeline()
    torch.manual_seed(0)
    assert pipe.adapter is not None
    spec = replace(pipe.adapter.branch_specs[0], router=True)
    adapter = Adapter(pipe.unet, [spec])
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipe.load_adapter(adapter)
    people = [[pipe.enroll(tiny.photo(1)), pipe.enroll(tiny.photo(2))], [pipe.enroll(tiny.photo(3))]]
    text, vision, groups = (
        pipe.encode_prompt(["a", "b"]),
        pipe._vision_tokens(people, 1),
        pipe._vision_groups(people, 1),
    )
    latents = torch.randn(2, 4, 4, 4, generator=tiny.generator(1))

    def velocity(rows: list[int], vision: Tokens | None, groups: torch.Tensor | None, guidance: Guidance) -> Any:
        inputs = Inputs(text_rows(text, rows), text_rows(text, rows), vision, groups=groups)
        strength = torch.ones(len(rows))
        wanted = NoisyPictures(inputs, latents[rows], torch.tensor(500.0), strength, guidance)
        return GuidedDenoiser(pipe.unet).velocity(wanted)

    for guidance in (Guidance(1.0), Guidance(3.0), Guidance(3.0, 1.5)):
        together = velocity([0, 1], vision, groups, guidance)
        pair = velocity([0], pipe._vision_tokens(people[:1], 1), pipe._vision_groups(people[:1], 1), guidance)
        one = velocity([1], pipe._vision_tokens(people[1:], 1), None, guidance)
        torch.testing.assert_close(together, torch.cat((pair, one)), atol=1e-4, rtol=1e-4)
        ungrouped = velocity([0, 1], vision, None, guidance)
        assert (together[0] - ungrouped[0]).abs().max() > 1e-3
        torch.testing.assert_close(together[1], ungrouped[1], atol=1e-4, rtol=1e-4)


def test_the_identity_scale_is_zero_in_passes_without_people() -> None:
    text = (Tokens(torch.ones(2, 3, 4)), {"t5": Tokens(torch.ones(2, 2, 4))})
    nothing = (Tokens(torch.zeros(2, 3, 4)), {"t5": Tokens(torch.zeros(2, 2, 4))})
    inputs = Inputs(text, nothing, Tokens(torch.ones(2, 5, 4)))
    clip, conditioning = inputs.stacked((UNCONDITIONAL, TEXT_ONLY, TEXT_AND_IDENTITY), torch.tensor([0.5, 1.0]))
    assert clip.values[:, 0, 0].tolist() == [0, 0, 1, 1, 1, 1]
    assert conditioning.branches["t5"].values[:, 0, 0].tolist() == [0, 0, 1, 1, 1, 1]
    scales = conditioning.scales["vision"]
    assert isinstance(scales, torch.Tensor) and scales.tolist() == [0, 0, 0, 0, 0.5, 1.0]
    assert "vision" not in inputs.stacked((UNCONDITIONAL, TEXT_ONLY), torch.ones(2))[1].branches


class CountReads(TorchFunctionMode):
    """Counts how often the values of one tensor are read, which synchronises with its device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func in (torch.equal, torch.Tensor.equal, torch.Tensor.any)
        self.count += reads and any(each is self.tensor for each in args)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_strengths_are_read_only_when_they_may_have_changed() -> None:
    pipe = tiny.pipeline()
    text, vision = pipe.encode_prompt(["a person"]), pipe._vision_tokens([[pipe.enroll(tiny.photo(1))]], 1)
    denoiser, inputs = GuidedDenoiser(pipe.unet), Inputs(text, text, vision)
    strength, latents = torch.ones(1), torch.randn(1, 4, 4, 4, generator=tiny.generator(1))

    def velocity() -> torch.Tensor:
        return denoiser.velocity(NoisyPictures(inputs, latents, torch.tensor(500.0), strength, Guidance(2.0)))

    first = velocity()
    with CountReads(strength) as reads:
        assert torch.equal(velocity(), first) and reads.count == 0
        strength *= 0.5
        weaker = velocity()
        assert reads.count == 2 and not torch.allclose(weaker, first)
    strength *= 0
    nobody = NoisyPictures(Inputs(text, text, None), latents, torch.tensor(500.0), strength, Guidance(2.0))
    wanted = GuidedDenoiser(pipe.unet).velocity(nobody)
    assert torch.allclose(velocity(), wanted, atol=1e-5)
