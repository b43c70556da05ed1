"""Native reference images and the adapter together, in whole pipelines that take both."""

from typing import Any

import pytest
import torch
from torch import Tensor

from imagine.transformer_bases.families import sites_of
from tests import tiny
from tests import tiny_transformer_pipelines as tiny_pipelines
from tests.tiny_transformer_pipelines import personal, stock

NAMES = ("flux2", "qwen", "flux")
SIDES = {"qwen": 256}  # of the pictures in pixels; one cell of this autoencoder is 32 pixels
PERSON, NATIVE = tiny.photo(1), tiny.photo(5)


def pipeline(name: str) -> Any:
    """Return a pipeline of diffusers that takes native references: klein, Qwen-Image-Edit-Plus, Kontext."""
    if name == "qwen":
        torch.manual_seed(0)
        made = tiny_pipelines.qwen_edit()
        made.set_progress_bar_config(disable=True)
        return made
    return stock("kontext" if name == "flux" else name)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str) -> Any:
    return personal(pipeline(name))


def draw(pipe: Any, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the latents of a picture after one step, with words and, unless the options differ, a native reference.

    Also return the image tokens (tokens, width) that the first attention returns, with what the adapter adds.
    """
    side = SIDES.get(name, 8)
    given = {"prompt": tiny_pipelines.PROMPT, "height": side, "width": side, "num_inference_steps": 1, "image": NATIVE}
    given |= {"output_type": "latent", "generator": tiny.generator(7)}
    own: dict[str, dict[str, Any]] = {
        "flux2": {"text_encoder_out_layers": (1, 2, 3), "guidance_scale": 1.0}, "qwen": {"true_cfg_scale": 1.0},
        "flux": tiny_pipelines.native("kontext"),
    }  # fmt: skip
    seen = list[Tensor]()
    site = next(iter(sites_of(pipe.transformer).values()))
    handle = site.attention.register_forward_hook(lambda _, __, output: seen.append(output[0][0].clone()))
    drawn: Tensor = pipe(**{**given, **own[name], **options}).images
    handle.remove()
    assert drawn.isfinite().all()
    return drawn, seen[0]


def test_native_references_and_the_adapter_together(name: str, pipe: Any) -> None:
    """Each changes the picture, also beside the other; the adapter adds to the tokens of the drawn picture only."""
    both, with_person = draw(pipe, name, reference=PERSON)
    native_only, without = draw(pipe, name)
    other, _ = draw(pipe, name, reference=PERSON, image=tiny.photo(6).resize((16, 16) if name == "flux" else (64, 64)))
    assert (both - native_only).abs().max() > 1e-5 and (both - other).abs().max() > 1e-5
    changed, targets = (with_person != without).any(-1), 16
    assert changed[:targets].all() and not changed[targets:].any() and len(changed) > targets


def test_several_native_references_stand_beside_the_person() -> None:
    pipe = personal(pipeline("flux2"))
    two, one = (draw(pipe, "flux2", reference=PERSON, image=[NATIVE] * count)[0] for count in (2, 1))
    assert (two - one).abs().max() > 1e-6
