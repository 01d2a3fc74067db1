"""Pack images or latents of any sizes into one tensor on a device, and gather crops of them there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Boxes(NamedTuple):
    """Hold the position of each crop and whether it is mirrored."""

    top: torch.Tensor  # (b,) int64
    left: torch.Tensor  # (b,) int64
    flip: torch.Tensor  # (b,) bool


class Packed:
    """Hold one or more tensors (c, h, w) of one type and number of channels end to end on a device."""

    def __init__(self, items: Sequence[torch.Tensor], device: torch.device) -> None:
        self.channels, self.device = items[0].shape[0], device
        self.height = torch.tensor([item.shape[1] for item in items])
        self.width = torch.tensor([item.shape[2] for item in items])
        sizes = self.channels * self.height * self.width
        self.start = torch.cumsum(sizes, 0) - sizes
        self.data = torch.cat([item.reshape(-1) for item in items]).to(device)

    def __len__(self) -> int:
        return len(self.start)

    def places(self, row: torch.Tensor, box: Boxes) -> tuple[torch.Tensor, ...]:
        """Return where the crops of items `row` (b,) lie, as tensors (b,) int64 on the CPU to stack for `crops`."""
        return self.start[row], self.height[row], self.width[row], box.top, box.left, box.flip.long()

    def crops(self, places: torch.Tensor, side: int) -> torch.Tensor:
        """Gather crops (b, c, side, side) at the stacked `places` (6, b), which are on the device."""
        start, height, width, top, left, flip = places[:, :, None, None, None].unbind()  # (b, 1, 1, 1) each
        along = torch.arange(side, device=self.device)
        x = torch.where(flip > 0, side - 1 - along, along) + left  # (b, 1, 1, side)
        y = along[:, None] + top  # (b, 1, side, 1)
        channel = torch.arange(self.channels, device=self.device)[:, None, None]  # (c, 1, 1)
        return self.data[start + (channel * height + y) * width + x]  # (b, c, side, side)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from pinned memory, so that the host does not wait for the device to finish its work."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
