"""Find numbers that are not finite (NaN and infinity) in weights. One of them makes every picture black."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imagine.errors import WeightsError


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite. Tensors on the meta device count as finite, since they hold none."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values  # torch computes nothing in 8-bit floats
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())  # NaN propagates to both; needs no second copy


def first_bad_tensor(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a number that is not finite."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError for the file or folder `where` if a number in its tensors is not finite."""
    if (name := first_bad_tensor(tensors)) is not None:
        raise WeightsError(
            f"{where} holds a number that is not finite, in {name}, which would make every picture black: download it "
            "again, or take an earlier checkpoint."
        )


def first_bad_part(parts: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the name of the first component with a number that is not finite, and the tensor's name."""
    for part, module in parts.items():
        if isinstance(module, nn.Module):
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            if (name := first_bad_tensor(tensors)) is not None:
                return part, name
    return None


def why_not_finite(parts: Mapping[str, Any]) -> str:
    """Return one sentence on why a picture made with these components is not finite, and what to do."""
    found = first_bad_part(parts)
    if found is not None:
        return (
            f"The picture would be black: {found[0]} holds a number that is not finite, in {found[1]}. Load other "
            f"weights for {found[0]}, or leave it out."
        )
    return (
        "The picture would be black: numbers that are not finite arose while it was drawn, although those of all "
        "weights are finite. Use torch.float32 or torch.bfloat16 instead of torch.float16, for the autoencoder at "
        "least, and lower a scale that is very high."
    )
