"""One NaN or infinity among many values is found, wherever it stands and whatever its kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biomedgpt_export.finite import is_finite

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    dtype=st.sampled_from(DTYPES),
    wrong=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    place=st.integers(0, 10**6),
    extreme=st.booleans(),
)
def test_it_says_what_isfinite_says(
    shape: list[int], dtype: torch.dtype, wrong: float, place: int, extreme: bool
) -> None:
    values = torch.linspace(-3, 3, torch.Size(shape).numel()).to(dtype).reshape(shape)
    if extreme:
        values.view(-1)[-1] = torch.finfo(dtype).max
    assert is_finite(values)
    values.view(-1)[place % values.numel()] = wrong
    assert not torch.isfinite(values).all()
    assert not is_finite(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_beside_an_infinity_and_views_with_gaps(dtype: torch.dtype) -> None:
    assert not is_finite(torch.tensor([float("inf"), float("nan")], dtype=dtype))
    gaps = torch.zeros(6, 4, dtype=dtype)
    gaps[:, 1] = float("nan")
    assert is_finite(gaps[:, ::2])
    assert not is_finite(gaps[:, 1::2].T)


def test_nothing_is_finite() -> None:
    assert is_finite(torch.empty(0, 4))
