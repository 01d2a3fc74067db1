"""Images or latents of any sizes in one tensor on a device, and crops of them gathered there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Boxes(NamedTuple):
    top: torch.Tensor  # (b,) int64
    left: torch.Tensor  # (b,) int64
    flip: torch.Tensor  # (b,) bool


class Packed:
    """Tensors (c, h, w) of one type and number of channels, at least one, laid end to end on the device."""

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
        """What `crops` wants to know of crops of items `row` (b,): tensors (b,) int64 on the CPU, to be stacked."""
        return self.start[row], self.height[row], self.width[row], box.top, box.left, box.flip.long()

    def crops(self, places: torch.Tensor, side: int) -> torch.Tensor:
        """Crops (b, c, side, side) at the stacked `places` (6, b), which lie on the device."""
        start, height, width, top, left, flip = places[:, :, None, None, None].unbind()  # (b, 1, 1, 1) each
        along = torch.arange(side, device=self.device)
        x = torch.where(flip > 0, side - 1 - along, along) + left  # (b, 1, 1, side)
        y = along[:, None] + top  # (b, 1, side, 1)
        channel = torch.arange(self.channels, device=self.device)[:, None, None]  # (c, 1, 1)
        return self.data[start + (channel * height + y) * width + x]  # (b, c, side, side)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for; without pinned memory it would wait for all that the device has to do."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
