"""Public identity adapters: where their files and encoders are, and two presets of settings for each.

The strengths come from what their authors and diffusers publish, and nobody here has measured their pictures:

- IP-Adapter's README: 1.0 for the picture alone, 0.5 as a good value together with a sentence; its code takes 30 steps.
- diffusers' guide (using-diffusers/ip_adapter): 1.0 is full strength, 0.5 balances; its examples of faces take 0.6.
- InstantID's code: 0.8 by default, guidance 5, 30 steps.

"balanced" leaves room for the sentence, "likeness" favours the person.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagine.errors import ConfigError

VIT_H, BIG_G = "h94/IP-Adapter:models/image_encoder", "h94/IP-Adapter:sdxl_models/image_encoder"
PRESETS = ("balanced", "likeness")
DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class Preset:
    """Settings that are known to work: the IP-Adapter's scale, and arguments of a call."""

    scale: float
    guidance_scale: float
    steps: int = 30

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a call; the scale belongs to `set_ip_adapter_scale`."""
        return {"guidance_scale": self.guidance_scale, "num_inference_steps": self.steps}


@dataclass(frozen=True)
class PublicAdapter:
    """One public file: its short name, repository and place there, its base, its image encoder, and its presets.

    `needs` is a sentence on what the adapter is not complete without.
    """

    name: str
    repository: str
    file: str
    base: str  # "sd15" or "sdxl"
    encoder: str | None
    presets: Mapping[str, Preset] = field(default_factory=dict)
    needs: str = ""


def _presets(base: str, balanced: float, likeness: float) -> dict[str, Preset]:
    guidance = 5.0 if base == "sdxl" else 7.5  # the defaults of diffusers' pipelines
    return {"balanced": Preset(balanced, guidance), "likeness": Preset(likeness, guidance)}


def _public(
    name: str,
    base: str,
    file: str,
    encoder: str | None,
    strengths: tuple[float, float],
    repository: str,
    needs: str = "",
) -> PublicAdapter:
    return PublicAdapter(name, repository, file, base, encoder, _presets(base, *strengths), needs)


_PICTURE, _FACE, _FACE_ID, _INSTANT = (0.5, 0.8), (0.6, 0.9), (0.7, 1.0), (0.8, 1.0)
_IP, _FACES = "h94/IP-Adapter", "h94/IP-Adapter-FaceID"
PUBLIC_ADAPTERS = (
    _public("base-sd15", "sd15", "models/ip-adapter_sd15.safetensors", VIT_H, _PICTURE, _IP),
    _public("plus-sd15", "sd15", "models/ip-adapter-plus_sd15.safetensors", VIT_H, _PICTURE, _IP),
    _public("plus-face-sd15", "sd15", "models/ip-adapter-plus-face_sd15.safetensors", VIT_H, _FACE, _IP),
    _public("full-face-sd15", "sd15", "models/ip-adapter-full-face_sd15.safetensors", VIT_H, _FACE, _IP),
    _public("base-sdxl", "sdxl", "sdxl_models/ip-adapter_sdxl.safetensors", BIG_G, _PICTURE, _IP),
    _public("base-vit-h-sdxl", "sdxl", "sdxl_models/ip-adapter_sdxl_vit-h.safetensors", VIT_H, _PICTURE, _IP),
    _public("plus-sdxl", "sdxl", "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", VIT_H, _PICTURE, _IP),
    _public("plus-face-sdxl", "sdxl", "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors", VIT_H, _FACE, _IP),
    _public("faceid-sd15", "sd15", "ip-adapter-faceid_sd15.bin", None, _FACE_ID, _FACES),
    _public("faceid-plusv2-sd15", "sd15", "ip-adapter-faceid-plusv2_sd15.bin", VIT_H, _FACE_ID, _FACES),
    _public("faceid-sdxl", "sdxl", "ip-adapter-faceid_sdxl.bin", None, _FACE_ID, _FACES),
    _public("faceid-plusv2-sdxl", "sdxl", "ip-adapter-faceid-plusv2_sdxl.bin", VIT_H, _FACE_ID, _FACES),
    _public(
        "instantid-sdxl", "sdxl", "ip-adapter.bin", None, _INSTANT, "InstantX/InstantID",
        "InstantID was trained together with a ControlNet on the face's landmarks, which is not used here; without it "
        "the likeness is weaker.",
    ),
)  # fmt: skip


def public_adapter(name: str) -> PublicAdapter | None:
    """Return the adapter with this short name, or whose file is named so in any folder; None if it is no public one.

    A path or "repository:place" is known by its file's name. InstantID's file has a name that says too little, so only
    its repository tells.
    """
    last = name.replace(":", "/").rpartition("/")[2].rpartition(".")[0]
    for each in PUBLIC_ADAPTERS:
        file = each.file.rpartition("/")[2].rpartition(".")[0]
        if name == each.name or (last == file and (last != "ip-adapter" or each.repository in name)):
            return each
    return None


def preset_of(adapter: PublicAdapter | None, name: str | None) -> Preset | None:
    """Return the preset of an adapter; None without a name for an adapter that is not public.

    Raises ConfigError for a name where the adapter has no presets.
    """
    if adapter is None and name is None:
        return None
    if adapter is None:
        raise ConfigError("--preset needs a public IP-Adapter, and this file is none: give --identity-scale instead.")
    if (name or DEFAULT_PRESET) not in adapter.presets:
        raise ConfigError(f"There is no preset {name!r}: choose {' or '.join(PRESETS)}.")
    return adapter.presets[name or DEFAULT_PRESET]
