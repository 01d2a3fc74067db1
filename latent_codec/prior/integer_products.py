"""Multiply matrices of 8-bit integers exactly, in integer arithmetic where a device has it.

`torch._int_mm` multiplies int8 by int8 into int32, which no setting of precision changes. It is used where it passes a
test on extreme and random numbers.
"""

import functools

import torch

_MULTIPLE = 8
"""Sides that integer products of a GPU must be multiples of; a matrix is padded with zeros."""
_LEAST_ROWS = 32  # a GPU takes no fewer than 17

_SHAPES = ((1, 36, 96), (37, 868, 96), (64, 96, 128), (5, 97, 3))


def padded(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight (k, n) int8 with zeros up to multiples of 8, as `multiply` takes it."""
    k, n = weight.shape
    return torch.nn.functional.pad(weight, (0, -n % _MULTIPLE, 0, -k % _MULTIPLE)).contiguous()


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (m, k) int8 times a `padded` weight as int32, (m, n) with the padding of n."""
    rows, more = len(x), (0, weight.shape[0] - x.shape[1], 0, max(0, _LEAST_ROWS - len(x)))
    x = torch.nn.functional.pad(x, more) if any(more) else x  # padding by nothing would copy
    return torch._int_mm(x, weight)[:rows]  # pyright: ignore[reportPrivateImportUsage]


@functools.cache
def are_exact(device: str) -> bool:
    """Return whether a device multiplies 8-bit integers, exactly."""
    generator = torch.Generator().manual_seed(0)
    for m, k, n in _SHAPES:
        for low in (-127, 127):  # random numbers, and the largest sums
            x, weight = (torch.randint(low, 128, shape, generator=generator) for shape in ((m, k), (k, n)))
            for sign in (1, -1):
                try:
                    found = multiply((sign * x).to(device, torch.int8), padded(weight.to(device, torch.int8)))
                except (RuntimeError, NotImplementedError, AttributeError):
                    return False
                if not torch.equal(found[:, :n].cpu().long(), sign * (x @ weight)):
                    return False
    return True
