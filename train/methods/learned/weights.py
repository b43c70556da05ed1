"""Additions to a denoiser's weights: LoRA, singular values, gated values; each leaves the base as it was if detached.

Trained parameters that live inside the denoiser are also listed in a `Collected` module, so that a checkpoint and the
file of a person hold them alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from train.methods.learned.layer_text import cross_layers

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA_NAME = "default"


class Collected(nn.Module):
    """Parameters that belong to another module, under their names there."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "|"), parameter)


def add_lora(unet: Any, rank: int, targets: Sequence[str] = LORA_TARGETS) -> Collected:
    """Add peft's LoRA (arXiv 2106.09685) to the attention's linear layers and return its parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    inject_adapter_in_model(config, unet, LORA_NAME)
    found = {name: parameter for name, parameter in unet.named_parameters() if ".lora_" in name}
    return Collected(found)


def lora_layers(unet: Any) -> dict[str, Tensor]:
    """Return the LoRA's tensors under peft's names, as `save_lora_weights` of diffusers takes them."""
    from peft import get_peft_model_state_dict

    return cast("dict[str, Tensor]", get_peft_model_state_dict(unet, adapter_name=LORA_NAME))


def remove_lora(unet: Any) -> None:
    """Undo `add_lora`."""
    for name, module in list(unet.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            parent, _, last = name.rpartition(".")
            setattr(unet.get_submodule(parent), last, module.base_layer)


def cross_keys_values(unet: Any) -> dict[str, nn.Parameter]:
    """Return the key and value weights of all cross-attention layers (Custom Diffusion, arXiv 2212.04488)."""
    found: dict[str, nn.Parameter] = {}
    for name, attn in cross_layers(unet).items():
        for part in ("to_k", "to_v"):
            found[f"{name}.{part}.weight"] = attn.get_submodule(part).get_parameter("weight")
    return found


# --- singular values (SVDiff, arXiv 2303.11305) -----------------------------------------------------------------------
class Spectral(nn.Module):
    """Shift the singular values of a weight: W + U (relu(s + d) - s) V'. With d = 0 it is W, bit for bit."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(weight.detach().flatten(1).float(), full_matrices=False)
        self.u: Tensor
        self.s: Tensor
        self.v: Tensor
        for name, value in (("u", u), ("s", s), ("v", v)):
            self.register_buffer(name, value, persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(s))

    def forward(self, weight: Tensor) -> Tensor:
        change = F.relu(self.s + self.shift) - self.s
        return weight + ((self.u * change) @ self.v).view_as(weight).to(weight.dtype)


def add_spectral(unet: nn.Module) -> tuple[Collected, Collected]:
    """Parametrise every matrix and kernel; return the shifts, and the 1-D weights (gains and biases)."""
    shifts: dict[str, nn.Parameter] = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            spectral = Spectral(module.weight).to(module.weight.device)
            parametrize.register_parametrization(module, "weight", spectral)
            shifts[name] = spectral.shift
    small = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if parameter.ndim == 1 and ".parametrizations." not in name
    }
    return Collected(shifts), Collected(small)


def remove_spectral(unet: nn.Module) -> None:
    """Undo `add_spectral`: every matrix and kernel is the original again."""
    for module in unet.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def added_shifts(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge two subjects by adding their shifts (SVDiff, section 3.3)."""
    return {name: one[name] + other[name] for name in one}


# --- gated values and locked keys (Perfusion, arXiv 2305.01644) -------------------------------------------------------
class Direction(nn.Module):
    """A subject's mean text feature i* (width,), and how other features are measured along it.

    `inverse` is the inverse covariance of text features. sim(x) = i*' C^-1 x; sim(i*) is the energy.
    """

    def __init__(self, width: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.mean: Tensor
        self.inverse: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("inverse", torch.eye(width))

    @torch.no_grad()
    def observe(self, feature: Tensor) -> None:
        """Move the mean towards a feature (width,); the first one is taken as it is."""
        first = not bool(self.mean.any())
        self.mean.copy_(feature if first else self.mean.lerp(feature, 1 - self.decay))

    def along(self, states: Tensor) -> Tensor:
        """Return sim(x) / energy for states (..., width): 1 for the subject's own feature."""
        towards = self.inverse @ self.mean
        return (states @ towards) / (self.mean @ towards).clamp(min=1e-8)


class GatedLinear(nn.Module):
    """A linear layer whose output for the subject's direction is replaced: W(x - a i*) + gate(a) o*.

    a is `Direction.along(x)`, and gate(a) = sigmoid((a - beta) / tau).
    """

    def __init__(self, layer: nn.Module, direction: Direction, output: nn.Parameter | Tensor, gate: "Gate") -> None:
        super().__init__()
        self.layer = layer
        self._shared = (direction, gate)  # in a tuple, so that they are not submodules of every layer
        self.output: Tensor
        if isinstance(output, nn.Parameter):
            self.output = output
        else:
            self.register_buffer("output", output)

    def forward(self, states: Tensor) -> Tensor:
        direction, gate = self._shared
        along = direction.along(states).unsqueeze(-1)
        rest = states - along * direction.mean
        return cast(Tensor, self.layer(rest) + gate(along) * self.output)


class Gate:
    """The gate's bias and temperature; a smaller bias in use than in training lets more of the subject through."""

    def __init__(self, beta: float = 0.75, tau: float = 0.1) -> None:
        self.beta, self.tau = beta, tau

    def __call__(self, along: Tensor) -> Tensor:
        return torch.sigmoid((along - self.beta) / self.tau)


def add_gated(unet: Any, direction: Direction, gate: Gate, noun: Tensor) -> Collected:
    """Replace the keys and values of all cross-attention layers; return the value outputs o*, (inner,) per layer.

    Keys are locked to those of `noun`, the text feature (width,) of the subject's class; values start as its values.
    """
    outputs: dict[str, nn.Parameter] = {}
    for name, attn in cross_layers(unet).items():
        with torch.no_grad():
            key, value = attn.to_k(noun), attn.to_v(noun)
        outputs[name] = nn.Parameter(value.clone())
        attn.to_k = GatedLinear(attn.to_k, direction, key.clone(), gate)
        attn.to_v = GatedLinear(attn.to_v, direction, outputs[name], gate)
    return Collected(outputs)


def remove_gated(unet: Any) -> None:
    """Undo `add_gated`."""
    for attn in cross_layers(unet).values():
        for part in ("to_k", "to_v"):
            layer = getattr(attn, part)
            if isinstance(layer, GatedLinear):
                setattr(attn, part, layer.layer)
