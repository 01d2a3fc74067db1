"""Take optimizer steps, and skip those whose loss or gradient is not finite, as decided on the device."""

from typing import Any

import torch
from accelerate import Accelerator


class GuardedSteps:
    """Take the steps of a fused Adam, and count those that are skipped because a number is not finite on any process.

    The host does not wait to learn which; it asks for the counts when it needs them. A GPU that the host waits for at
    every step idles while the host prepares the next one.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer, skipped: tuple[int, int]) -> None:
        """`optimizer` is a fused Adam as `Accelerator.prepare` returns it; `skipped` are the `counts` so far."""
        self.accelerator, self.optimizer = accelerator, optimizer
        self._fused: Any = getattr(optimizer, "optimizer", optimizer)
        self._counts = torch.tensor(skipped, device=accelerator.device)  # (2,) int64: in all, in a row

    @property
    def skipped(self) -> torch.Tensor:
        """Return the number of skipped steps, () int64 on the device."""
        return self._counts[0]

    def counts(self) -> tuple[int, int]:
        """Wait for the device, and return the number of skipped steps in all and that of the latest in a row."""
        in_all, in_a_row = self._counts.tolist()
        return in_all, in_a_row

    def take(self, *values: torch.Tensor) -> torch.Tensor:
        """Take a step if the values () are finite on every process; return whether they are, () bool on the device."""
        finite = torch.isfinite(torch.stack(values)).all()
        if self.accelerator.num_processes > 1:
            whole = torch.as_tensor(self.accelerator.reduce(finite.float(), "sum"))
            finite = whole == self.accelerator.num_processes
        bad = (~finite).long()
        self._counts = torch.stack([self._counts[0] + bad, (self._counts[1] + 1) * bad])
        if self.accelerator.scaler is None:
            self._fused.found_inf = bad.float()  # where it is 1, the kernel changes no weight, moment or count
            self.optimizer.step()
        elif finite:  # a gradient scaler decides on the host
            self.optimizer.step()
        else:
            self.accelerator.scaler.update()  # lowers the scale, as no step is taken
        self.optimizer.zero_grad()
        return finite
