"""Float32 islands: what must not be coarse, whatever autocast does around it."""

import contextlib

import torch


def float32_island(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off on x's device; the caller turns its own inputs into float32."""
    if x.device.type == "meta":  # shapes only: nothing to cast, and autocast does not know the device
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
