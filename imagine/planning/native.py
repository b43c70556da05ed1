"""Compare what k photos of a person cost as native reference images and as references of the adapter.

A native reference adds its image tokens to the sequence of every pass: up to 1024 x 1024 pixels, so 4,096 tokens in
FLUX.2 and Qwen-Image-Edit. The adapter reads a photo once; its tokens are keys and values of small branches. The cost
of encoding (by the autoencoder, by the vision encoder) is left out on both sides: it comes once per picture.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from imagine.bases.tiling import compression
from imagine.blueprints.blueprint import Blueprint
from imagine.errors import ConfigError
from imagine.planning.denoisers import REFERENCE_SIDE, first_output, is_guided, kind_of, step_inputs
from imagine.planning.inference import (
    Sides,
    build_conditioning,
    latent_side,
    prepare,
    vision_token_count,
)
from imagine.planning.meter import Meter, planned_kernels
from imagine.planning.networks import VISION, Networks, build, is_text_encoder

COUNTS = (0, 1, 2, 4, 8)


def compare_native(base: Blueprint, resolution: int, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """Return the tokens and the arithmetic of a step for each number of photos, in both ways, as plain numbers.

    Raises ConfigError if the base takes no native references.
    """
    kind = kind_of(base.denoiser.kind)
    if not kind.native:
        raise ConfigError(
            f"{base.name} takes no native reference images, so there is nothing to compare: choose flux2-klein-4b, "
            "flux2-dev, qwen-image-edit or another base that does."
        )
    networks = build(base, leave_out=[name for name in base.components if is_text_encoder(name)])
    for module in networks.modules().values():
        torch.nn.Module.to(module, torch.bfloat16)
    vae = networks.models["vae"]
    side, reference = latent_side(vae, networks.denoiser, resolution), REFERENCE_SIDE // compression(vae)
    passes = 2 if is_guided(base) and kind.two_passes else 1
    rows = list(_rows(networks, (side, side), (reference, reference), counts, passes))
    return {"base": base.name, "resolution": resolution, "passes": passes, "rows": rows}


def _rows(
    networks: Networks, sides: Sides, reference: Sides, counts: Sequence[int], passes: int
) -> Iterator[dict[str, Any]]:
    kind = kind_of(type(networks.denoiser).__name__)
    image = sides[0] * sides[1] // kind.patch**2
    each = reference[0] * reference[1] // kind.patch**2 + kind.native_text
    bare = _step(networks, sides, []) * passes
    for count in counts:
        native = bare if count == 0 else _step(networks, sides, [reference] * count) * passes
        # Only the pass with the sentence shows the person; a native reference is in both.
        ours = bare if count == 0 else _step(networks, sides, [], count) + bare // passes * (passes - 1)
        yield {
            "photos": count, "native_tokens": image + kind.text + count * each, "adapter_tokens": image + kind.text,
            "vision_tokens": _vision_tokens(networks, count), "native_flops": native, "adapter_flops": ours,
        }  # fmt: skip


def _step(networks: Networks, sides: Sides, native: Sequence[Sides], references: int = 0) -> int:
    """Return the arithmetic of one pass, after the first, in which the adapter computes keys and values."""
    inputs = step_inputs(networks.denoiser, 1, sides, native=native)
    conditioning = None
    if references:
        conditioning = prepare(networks, build_conditioning(networks, 1, references, _features(networks)))
    with torch.no_grad(), planned_kernels():
        if conditioning is not None:
            first_output(networks.denoiser, inputs, conditioning)
        with Meter() as meter:
            first_output(networks.denoiser, inputs, conditioning)
    return meter.flops


def _features(networks: Networks) -> int:
    assert networks.vision_encoder is not None
    return vision_token_count(networks.models[networks.vision_encoder])


def _vision_tokens(networks: Networks, references: int) -> int:
    """Return the number of tokens that the adapter's branches attend to."""
    if references == 0:
        return 0
    tokens = build_conditioning(networks, 1, references, _features(networks)).branches[VISION]
    return int(tokens.values.shape[1])
