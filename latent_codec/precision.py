"""Keep computations in float32 that autocast would make coarser."""

import contextlib

import torch


def float32_island(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on x's device; the caller converts its own inputs to float32."""
    if x.device.type == "meta":  # shapes only: nothing to cast, and autocast does not know the device
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
