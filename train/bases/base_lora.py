"""LoRA on the layers of a diffusion transformer, by peft, as a module of its own.

peft puts the LoRA layers into the transformer, where they always act. This module holds the same layers by their path,
so that a stage trains, averages and saves them without the transformer's own weights:

    transformer_blocks.0.attn.to_q.lora_A.weight
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagine.errors import ConfigError

NAME = "base_lora"  # the part
_ADAPTER = "default"


class BaseLora(nn.Module):
    """The LoRA layers of a transformer, in float32. Building it puts them into the transformer.

    rank: of each layer; its scale is 1, and its output starts at zero. targets: names of linear layers. Raises
    ConfigError if peft is missing or no layer has such a name.
    """

    def __init__(self, transformer: Any, rank: int, targets: Sequence[str]) -> None:
        super().__init__()
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraLayer
        except ImportError:
            raise ConfigError(
                "LoRA on a transformer needs peft: run `pip install peft`, or set lora_rank to 0."
            ) from None
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), _ADAPTER)
        for path, layer in transformer.named_modules():
            if isinstance(layer, LoraLayer):
                place = self._place(path)
                place.add_module("lora_A", layer.lora_A[_ADAPTER])
                place.add_module("lora_B", layer.lora_B[_ADAPTER])
        self.to(torch.float32)

    def _place(self, path: str) -> nn.Module:
        """Return the module at `path` below this one, made if necessary."""
        place: nn.Module = self
        for name in path.split("."):
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        return place

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` of the base's pipeline reads."""
        from diffusers.loaders import FluxLoraLoaderMixin  # its file is that of all transformers

        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        FluxLoraLoaderMixin.save_lora_weights(folder, transformer_lora_layers=tensors)
