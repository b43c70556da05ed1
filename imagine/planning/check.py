"""Compare plans with networks that run: parameters, arithmetic and memory of small networks on this machine's CPU."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from imagine.adapter.adapter import BranchSpec
from imagine.bases.tiling import compression
from imagine.blueprints.blueprint import AdapterShape, Blueprint, Component
from imagine.planning.denoisers import kind_of
from imagine.planning.inference import decode, step_twice
from imagine.planning.meter import Meter, parameter_count, planned_kernels, profiled_peak
from imagine.planning.networks import Networks, build
from imagine.planning.training import backward, checkpoint, choose_parts, set_trainable

TOLERANCE = 0.15  # the largest relative difference between planned and measured memory


def small_base() -> Blueprint:
    """Return a base like SDXL with two levels and our branches, small enough to be measured in a second or two."""
    unet = {
        "sample_size": 32, "block_out_channels": [64, 128], "layers_per_block": 1, "attention_head_dim": [2, 4],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": 64,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 128,
    }  # fmt: skip
    vae = {
        "block_out_channels": [32, 64, 64], "down_block_types": ["DownEncoderBlock2D"] * 3, "layers_per_block": 1,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 4, "sample_size": 128,
    }  # fmt: skip
    vision_encoder = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_width": 32}
    text = AdapterShape((BranchSpec("t5", 48), BranchSpec("byt5", 32)))
    vision = BranchSpec("vision", 64, projection="full", input_width=64)
    return Blueprint(
        "a small base",
        {
            "unet": Component("UNet2DConditionModel", unet),
            "vae": Component("AutoencoderKL", vae),
            "vision_encoder": Component("VisionEncoder", vision_encoder),
        },
        {"text_adapter": text, "adapter": AdapterShape((vision,), lora_rank=4)},
    )


_T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32, "vocab_size": 100}
_SMALL_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2": ("Flux2Transformer2DModel", {
        "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32,
        "joint_attention_dim": 64, "in_channels": 16, "axes_dims_rope": [8, 8, 8, 8], "guidance_embeds": False,
    }),
    "z-image": ("ZImageTransformer2DModel", {
        "n_layers": 3, "n_refiner_layers": 1, "dim": 128, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 64,
        "in_channels": 4, "axes_dims": [8, 12, 12], "axes_lens": [1024, 64, 64],
    }),
    "qwen-image": ("QwenImageTransformer2DModel", {
        "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "joint_attention_dim": 64,
        "in_channels": 16, "out_channels": 4, "axes_dims_rope": [8, 12, 12],
    }),
    "flux1": ("FluxTransformer2DModel", {
        "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32,
        "joint_attention_dim": 64, "pooled_projection_dim": 32, "in_channels": 16, "axes_dims_rope": [8, 12, 12],
    }),
    "sd3": ("SD3Transformer2DModel", {
        "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "joint_attention_dim": 64,
        "pooled_projection_dim": 32, "caption_projection_dim": 128, "in_channels": 4, "out_channels": 4,
        "pos_embed_max_size": 32, "sample_size": 32, "qk_norm": "rms_norm", "dual_attention_layers": [0, 1],
    }),
    "sana": ("SanaTransformer2DModel", {
        "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 32, "cross_attention_dim": 128, "caption_channels": 64, "in_channels": 4,
        "out_channels": 4, "sample_size": 32,
    }),
    "pixart": ("PixArtTransformer2DModel", {
        "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128,
        "caption_channels": 64, "in_channels": 4, "out_channels": 8, "sample_size": 32,
        "use_additional_conditions": False,
    }),
}  # fmt: skip
SMALL_BASES = ("unet", *_SMALL_TRANSFORMERS)
USUAL_BASES = ("unet", "flux2", "z-image", "sana")  # what `imagine plan --check` runs: one of each kind of attention


def small_transformer(name: str) -> Blueprint:
    """Return a base with a small transformer of one family and an adapter, to be measured in a few seconds."""
    kind, config = _SMALL_TRANSFORMERS[name]
    parts = small_base().components
    vision = BranchSpec("vision", 64, projection="full", input_width=64)
    return Blueprint(
        f"a small {name}",
        {
            "transformer": Component(kind, config), "vae": parts["vae"], "vision_encoder": parts["vision_encoder"],
            "text_encoder": Component("T5EncoderModel", _T5),
        },
        {"adapter": AdapterShape((vision,), heads=2)},
    )  # fmt: skip


def check(batch: int = 2, resolution: int = 128, bases: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare plans of small networks with the same networks that run on this machine's CPU, in float32.

    bases: which of `SMALL_BASES`, by default `USUAL_BASES`. Parameters and arithmetic (by torch's FlopCounterMode on
    real tensors) must be equal. The memory of steps, decoding and training (by the events of the allocator) must agree
    within `TOLERANCE`. Raises RuntimeError if they do not, because that is a bug of the planner.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in USUAL_BASES if bases is None else bases:
        base = small_base() if name == "unet" else small_transformer(name)
        rows |= {f"{name}, {key}": row for key, row in compare(base, batch, resolution).items()}
    _check_rows(rows)
    return {"tolerance": TOLERANCE, "rows": rows}


def compare(base: Blueprint, batch: int, resolution: int) -> dict[str, dict[str, Any]]:
    """Return the planned and the measured numbers of a base, and by which share they differ."""
    planned, real = build(base), build(base, "cpu")
    counts = [sum(map(parameter_count, each.modules().values())) for each in (planned, real)]
    rows = {"parameters": _row(*counts)}
    side = resolution // compression(real.models["vae"])
    for name, work in _works(real, batch, side).items():
        rows |= {f"{name}, {key}": row for key, row in _compare(name, work, planned, real).items()}
    return rows


def _row(planned: int, measured: int) -> dict[str, Any]:
    return {"planned": planned, "measured": measured, "off": abs(planned - measured) / max(measured, 1)}


def _check_rows(rows: Mapping[str, Mapping[str, Any]]) -> None:
    for name, row in rows.items():
        if row["off"] > (TOLERANCE if name.endswith("memory") else 0):
            raise RuntimeError(f"{name}: planned {row['planned']}, measured {row['measured']}")


Work = Callable[[Networks], Any]


def _works(networks: Networks, batch: int, side: int) -> dict[str, Work]:
    """Return what is run: a decoding is the same on all bases, and is run on the U-Net's."""
    sides, kind = (side, side), kind_of(type(networks.denoiser).__name__)
    native = [sides] if kind.native else []

    @torch.no_grad()
    def steps(networks: Networks) -> None:
        step_twice(networks, batch, sides, 1)

    @torch.no_grad()
    def native_steps(networks: Networks) -> None:
        step_twice(networks, batch, sides, 1, native=native, people=2)

    @torch.no_grad()
    def decoding(networks: Networks) -> None:
        decode(networks.models["vae"], batch, sides)

    def training(networks: Networks) -> None:
        backward(networks, batch, side)

    works: dict[str, Work] = {"drawing": steps, "training": training, "training, recomputed": training}
    if networks.denoiser_name == "unet":
        works["decoding"] = decoding
    if native:
        works["two people and a native reference"] = native_steps
    return works


def _compare(name: str, work: Work, planned: Networks, real: Networks) -> dict[str, dict[str, Any]]:
    """Return the planned and the measured arithmetic and memory of one kind of work."""
    for networks in (planned, real):
        if name.startswith("training"):
            set_trainable(networks, choose_parts(networks, ()), torch.float32)
            checkpoint(networks, name.endswith("recomputed"))
    with planned_kernels(), Meter() as meter:
        work(planned)
    with FlopCounterMode(display=False) as counter:
        work(real)
    _clear_gradients(planned, real)
    peak = profiled_peak(lambda: work(real))
    _clear_gradients(real)
    return {"FLOP": _row(meter.flops, int(counter.get_total_flops())), "memory": _row(meter.peak, peak)}


def _clear_gradients(*networks: Networks) -> None:
    for each in networks:
        for module in each.modules().values():
            for parameter in module.parameters():
                parameter.grad = None
