import pytest
import torch

from wan_dist.core.finite import is_finite


def test_every_bf16_number_is_judged_as_torch_does() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert [v for v in every if is_finite(v.reshape(1)) != bool(torch.isfinite(v))] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    numbers = torch.ones(1000, 7, dtype=dtype)
    assert is_finite(numbers)
    assert is_finite(numbers.T)
    numbers[613, 2] = bad
    assert not is_finite(numbers)
    assert not is_finite(numbers.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((64,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
    assert not is_finite(torch.tensor([float("inf"), -float("inf")], dtype=dtype))
