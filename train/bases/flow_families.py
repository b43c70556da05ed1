"""How each family of diffusion transformers is called in training: one entry per family of `imagine`'s table.

An entry says how noisy latents become the arguments of `forward`, and its output a velocity; how the sentence is
encoded; and which layers of the base take LoRA. Arguments, position ids and signs are those of the pipelines of
diffusers 0.42.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagine.networks.diffusion import pack_latents, unpack_latents
from imagine.records import Tokens
from train.bases import prompts
from train.bases.flow import Mu, mu_by_tokens, mu_of_flux2
from train.bases.prompts import POOLED, TEXT

Arguments = dict[str, Any]
TIMESTEPS = 1000  # what a time of 1 is for transformers that count steps


@dataclass(frozen=True)
class Inputs:
    """What a transformer is called with: noisy latents (B, C, h, w), times (B,), the sentence, and a guidance scale."""

    noisy: Tensor
    times: Tensor
    states: Mapping[str, Tokens]
    guidance: float

    @property
    def text(self) -> Tensor:
        """The states of the sentence (B, L, width)."""
        return self.states[TEXT].values.to(self.noisy.dtype)

    @property
    def pooled(self) -> Tensor:
        """The pooled vector of the sentence (B, width)."""
        return self.states[POOLED].values[:, 0].to(self.noisy.dtype)

    def guided(self, transformer: Any) -> Tensor | None:
        """Return the guidance scale (B,) if the transformer has an embedding for it."""
        if not getattr(transformer.config, "guidance_embeds", False):
            return None
        return torch.full_like(self.times, self.guidance)


@dataclass(frozen=True)
class FlowFamily:
    """One family. model: the transformer's class. patch: cells in each direction that it joins to one token.

    arguments, velocity: of `forward`; velocity gets its output and the latents. encode, counted, overhead: as in
    `StockTextEncoders`. text_tokens, most: of a sentence by default, and of the states beside those. widths: of the
    states by name, from the transformer's config. mu: as in `Times`. lora: names of the layers that take LoRA.
    """

    model: str
    patch: int
    arguments: Callable[[Any, Inputs], Arguments]
    velocity: Callable[[Any, Tensor], Tensor]
    encode: prompts.Encode
    widths: Callable[[Mapping[str, Any]], dict[str, int]]
    text_tokens: int
    lora: tuple[str, ...]
    mu: Mu = mu_by_tokens
    further_tokens: int = 0
    counted: str = "tokenizer"
    overhead: int = 0


# --- FLUX.2: latents come joined; four coordinates per token --------------------------------------------------------


def _flux2(transformer: Any, given: Inputs) -> Arguments:
    rows, (height, width), length = len(given.noisy), given.noisy.shape[-2:], given.text.shape[1]
    device = given.noisy.device
    image = _coordinates(1, height, width, 1, device=device)
    text = _coordinates(1, 1, 1, length, device=device)
    return {
        "hidden_states": _as_tokens(given.noisy), "timestep": given.times, "guidance": given.guided(transformer),
        "encoder_hidden_states": given.text, "img_ids": image.expand(rows, -1, -1),
        "txt_ids": text.expand(rows, -1, -1),
    }  # fmt: skip


def _coordinates(*lengths: int, device: torch.device) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(length, device=device) for length in lengths))


def _as_tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def _from_tokens(output: Any, latents: Tensor) -> Tensor:
    tokens: Tensor = output[0]
    return tokens.transpose(1, 2).reshape(latents.shape)


# --- FLUX.1 and Qwen-Image: 2 x 2 cells of the latents are one token ------------------------------------------------


def _flux(transformer: Any, given: Inputs) -> Arguments:
    height, width = (side // 2 for side in given.noisy.shape[-2:])
    ids = torch.zeros(height, width, 3, device=given.noisy.device)
    ids[..., 1] += torch.arange(height, device=ids.device)[:, None]
    ids[..., 2] += torch.arange(width, device=ids.device)
    return {
        "hidden_states": _as_tokens(pack_latents(given.noisy, 2)), "timestep": given.times,
        "guidance": given.guided(transformer), "pooled_projections": given.pooled, "encoder_hidden_states": given.text,
        "img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(given.text.shape[1], 3, device=ids.device),
    }  # fmt: skip


def _qwen(transformer: Any, given: Inputs) -> Arguments:
    height, width = (side // 2 for side in given.noisy.shape[-2:])
    return {
        "hidden_states": _as_tokens(pack_latents(given.noisy, 2)), "timestep": given.times,
        "guidance": given.guided(transformer), "encoder_hidden_states": given.text,
        "encoder_hidden_states_mask": given.states[TEXT].mask, "img_shapes": [[(1, height, width)]] * len(given.noisy),
    }  # fmt: skip


def _unpacked(output: Any, latents: Tensor) -> Tensor:
    return unpack_latents(_from_tokens(output, pack_latents(latents, 2)), 2)


# --- Z-Image: lists of pictures and sentences; its time runs towards the picture, and so does its velocity -----------


def _z_image(_: Any, given: Inputs) -> Arguments:
    states = given.states[TEXT]
    rows = given.text.unbind(0)
    words = rows if states.mask is None else [row[mask] for row, mask in zip(rows, states.mask, strict=True)]
    return {"x": list(given.noisy.unsqueeze(2).unbind(0)), "t": 1 - given.times, "cap_feats": list(words)}


def _towards_noise(output: Any, _: Tensor) -> Tensor:
    return -torch.stack(list(output[0])).squeeze(2)


# --- Stable Diffusion 3 and Sana: latents as they are, times as steps ------------------------------------------------


def _sd3(_: Any, given: Inputs) -> Arguments:
    return {
        "hidden_states": given.noisy, "timestep": given.times * TIMESTEPS, "pooled_projections": given.pooled,
        "encoder_hidden_states": given.text,
    }  # fmt: skip


def _sana(transformer: Any, given: Inputs) -> Arguments:
    arguments = {
        "hidden_states": given.noisy, "encoder_hidden_states": given.text,
        "timestep": given.times * TIMESTEPS * float(transformer.config.timestep_scale),
        "encoder_attention_mask": given.states[TEXT].mask,
    }  # fmt: skip
    guidance = given.guided(transformer)
    return arguments if guidance is None else {**arguments, "guidance": guidance}


def _as_it_is(output: Any, _: Tensor) -> Tensor:
    found: Tensor = output[0]
    return found


# --- the table ------------------------------------------------------------------------------------------------------


def _one_width(name: str) -> Callable[[Mapping[str, Any]], dict[str, int]]:
    return lambda config: {TEXT: int(config[name])}


def _with_pooled(config: Mapping[str, Any]) -> dict[str, int]:
    return {TEXT: int(config["joint_attention_dim"]), POOLED: int(config["pooled_projection_dim"])}


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FLOW_FAMILIES: Mapping[str, FlowFamily] = {
    family.model: family for family in (
        FlowFamily(
            "Flux2Transformer2DModel", 1, _flux2, _from_tokens, prompts.encode_flux2,
            _one_width("joint_attention_dim"), 512, (*_ATTENTION, "to_qkv_mlp_proj"), mu_of_flux2, overhead=64,
        ),
        FlowFamily(
            "ZImageTransformer2DModel", 2, _z_image, _towards_noise, prompts.encode_z_image,
            _one_width("cap_feat_dim"), 512, _ATTENTION, overhead=32,
        ),
        FlowFamily(
            "QwenImageTransformer2DModel", 2, _qwen, _unpacked, prompts.encode_qwen,
            _one_width("joint_attention_dim"), 1024, (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj"),
            overhead=32,
        ),
        FlowFamily(
            "FluxTransformer2DModel", 2, _flux, _unpacked, prompts.encode_flux, _with_pooled, 512, _ATTENTION,
            counted="tokenizer_2",
        ),
        FlowFamily(
            "SD3Transformer2DModel", 2, _sd3, _as_it_is, prompts.encode_sd3, _with_pooled, 256, _ATTENTION,
            further_tokens=77, counted="tokenizer_3",
        ),
        FlowFamily(
            "SanaTransformer2DModel", 1, _sana, _as_it_is, prompts.encode_sana, _one_width("caption_channels"), 300,
            _ATTENTION,
        ),
    )
}  # fmt: skip
