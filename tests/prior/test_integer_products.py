"""Test products of 8-bit integers: exact where they are used, and not used where they are not."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.prior import integer_products

sides = st.integers(1, 40)


@pytest.fixture
def untested() -> Iterator[None]:
    """Have devices tested again, here and afterwards."""
    integer_products.are_exact.cache_clear()
    yield
    integer_products.are_exact.cache_clear()


@given(sides, sides, sides, st.integers(0, 99), st.booleans())
def test_a_product_is_that_of_whole_numbers(m: int, k: int, n: int, seed: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-127, 128, shape, generator=generator) for shape in ((m, k), (k, n)))
    x, weight = (x.sign() * 127, weight.sign() * 127) if extreme else (x, weight)
    assert integer_products.are_exact("cpu")
    found = integer_products.multiply(x.to(torch.int8), integer_products.padded(weight.to(torch.int8)))
    assert found.dtype == torch.int32 and torch.equal(found[:, :n].long(), x @ weight)
    assert not found[:, n:].any()


def _saturated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return sums as a kernel gives them that shifts x to unsigned numbers and adds pairs of products in 16 bits."""
    pairs = ((x.int() + 128)[:, :, None] * weight.int()).unflatten(1, (-1, 2)).sum(2)
    return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * weight.int().sum(0)).int()


def _missing(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not implemented")


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("kernel", [_saturated, _missing])
def test_a_kernel_that_is_wrong_or_missing_is_not_used(
    kernel: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_int_mm", kernel)
    assert not integer_products.are_exact("cpu")
