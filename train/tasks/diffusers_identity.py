"""The identity adapter of a public base: its vision branch with the initial weights, and LoRA.

For a U-Net, LoRA is the adapter's own and acts where a person is. For a transformer, it is peft's (`BaseLora`) and acts
always, so it is a part of its own and is exported beside the adapter.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec
from imagine.errors import ConfigError
from imagine.ip_adapter.reading import import_adapter, read_ip_adapter
from imagine.records import VISION
from imagine.transformer_bases.adapter import TransformerAdapter
from train.bases.contract import PublicBase
from train.bases.transformer import Transformer

if TYPE_CHECKING:
    from train.tasks.diffusers import DiffusersSettings


def identity_adapter(settings: "DiffusersSettings", base: PublicBase, denoiser: Any, vision_width: int) -> Adapter:
    """Build the vision branch with its projection, not attached yet; an IP-Adapter file gives its initial weights.

    vision_width: of the vision encoder's tokens. Raises ConfigError if the file does not take them.
    """
    width = vision_width if isinstance(base, Transformer) else int(denoiser.config.cross_attention_dim)
    router = bool(settings.groups) and settings.people == "router"
    people: Literal["separate", "concatenate"] = "separate"
    if settings.groups and settings.people == "concatenate":
        people = "concatenate"
    spec = BranchSpec(
        VISION, width, 1.0, settings.zero_init is not False, settings.projection or "full", vision_width,
        router=router, people=people,
    )  # fmt: skip
    if isinstance(base, Transformer):
        sizes = base.settings
        return TransformerAdapter(denoiser, [spec], sizes.branch_heads, sizes.branch_every)
    initial_tensors: dict[str, Tensor] = {}
    if settings.ip_adapter is not None:
        imported = import_adapter(read_ip_adapter(settings.ip_adapter), denoiser)[0]
        (given,) = imported.branch_specs
        if given.projection == "linear" or given.input_width != vision_width:
            raise ConfigError(
                f"{settings.ip_adapter} takes {'embeddings' if given.projection == 'linear' else 'tokens'} of "
                f"width {given.input_width}, but the vision encoder returns tokens of width {vision_width}: take a "
                "Plus or Full file, and the image_encoder that belongs to it."
            )
        # Training here switches the branch off in images without a reference, so pictures must do the same.
        spec = replace(given, absent="off", router=router, people=people)
        initial_tensors = imported.state_dict()
    adapter = Adapter(denoiser, [spec], settings.lora_rank, settings.lora_targets)
    if initial_tensors and denoiser.device.type != "meta":
        adapter.load_state_dict({**adapter.state_dict(), **initial_tensors})
    return adapter


def check_for_transformer(settings: "DiffusersSettings", kind: str) -> None:
    """Raise ConfigError for settings that only U-Nets have."""
    reasons = {
        "t5": (settings.t5, "its pipeline feeds only the vision branch"),
        "byt5": (settings.byt5, "its pipeline feeds only the vision branch"),
        "ip_adapter": (settings.ip_adapter, "the vision branch has queries of its own, which no such file has"),
        "drop_clip": (settings.drop_clip, "it has one text branch, which drop_text drops"),
        "min_snr_gamma": (settings.min_snr_gamma, "its times are drawn where the loss counts"),
        "lora_targets": (settings.lora_targets != LORA_TARGETS, "the family determines the layers"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise ConfigError(f"settings: {name} has no effect on {kind}, because {reason}: remove {name}.")
