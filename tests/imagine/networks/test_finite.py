"""Numbers that are not finite are found in every precision, and named."""

import pytest
import torch

from imagine.errors import WeightsError
from imagine.networks.finite import check_finite, first_bad_part, is_finite, why_not_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found_in_every_precision(dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((3, 50), 2.0)
    assert is_finite(tensor.to(dtype))
    if dtype == torch.float8_e4m3fn:  # has no infinity, and torch rounds it to the largest number
        value = float("nan")
    tensor[1, 17] = value
    assert not is_finite(tensor.to(dtype))


@pytest.mark.parametrize(
    "tensor", [torch.empty(0), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool),
               torch.empty(3, device="meta"), torch.tensor(65504.0, dtype=torch.float16)]
)  # fmt: skip
def test_tensors_without_a_bad_number_pass(tensor: torch.Tensor) -> None:
    assert is_finite(tensor)


def test_the_first_bad_part_and_tensor_are_named() -> None:
    good, bad = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with torch.no_grad():
        bad.bias[1] = float("nan")
    assert first_bad_part({"a": good, "b": None, "c": "text"}) is None
    assert first_bad_part({"a": good, "b": bad}) == ("b", "bias")
    assert "b holds a number that is not finite, in bias" in why_not_finite({"a": good, "b": bad})
    assert "torch.bfloat16" in why_not_finite({"a": good})
    with pytest.raises(WeightsError, match=r"file\.safetensors holds a number that is not finite, in bias"):
        check_finite("file.safetensors", bad.state_dict())
