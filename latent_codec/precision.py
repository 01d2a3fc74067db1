"""Choose number types: what layers take, and what stays float32 where autocast would make it coarser."""

import contextlib

import torch
from torch import nn

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


def float32_island(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on x's device; the caller converts its own inputs to float32."""
    if x.device.type == "meta":  # shapes only: nothing to cast, and autocast does not know the device
        return contextlib.nullcontext()
    if not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()  # an exported graph stays free of autocast
    return torch.autocast(x.device.type, enabled=False)


def layer_dtype(module: nn.Module, x: torch.Tensor) -> torch.dtype:
    """Return the number type that the layers of a module take.

    It is that of the weights, or x's own where weights are stored in 8 bits and converted as each layer runs.
    """
    stored = next((p.dtype for p in module.parameters()), x.dtype)
    return x.dtype if stored.itemsize == 1 else stored


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return x, in float32 if its own type has fewer bits."""
    return x.float() if x.dtype.itemsize < 4 else x


def has_float64(device: torch.device | str) -> bool:
    """Return whether a device has float64."""
    return torch.device(device).type not in WITHOUT_FLOAT64


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """Return x in float64, in the CPU's memory if its own device has none."""
    return x.double() if has_float64(x.device) else x.cpu().double()
