"""Optimizer steps of which those with a loss or gradient that is not finite are left out, decided on the device."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator


class Skipped(NamedTuple):
    """Steps that were left out."""

    in_all: int
    in_a_row: int
    """Of the latest ones."""


class Steps:
    """Takes a fused Adam's steps, and counts those that it leaves out because a number was not finite anywhere.

    The host does not wait to hear which; it asks for the counts when it wants them. A GPU that a host waits for at
    every step stands still while the host prepares the next one.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer, skipped: Skipped) -> None:
        """`optimizer`: as `Accelerator.prepare` returns it, of an Adam that is fused."""
        self.accelerator, self.optimizer = accelerator, optimizer
        self._fused: Any = getattr(optimizer, "optimizer", optimizer)
        self._counts = torch.tensor(skipped, device=accelerator.device)  # (2,) int64: in all, in a row

    @property
    def skipped(self) -> torch.Tensor:
        """Steps left out so far, () int64 on the device."""
        return self._counts[0]

    def counts(self) -> Skipped:
        """Waits for the device."""
        return Skipped(*self._counts.tolist())

    def take(self, *values: torch.Tensor) -> torch.Tensor:
        """Take a step if the values () are finite on every process; whether they are, () bool on the device."""
        finite = torch.isfinite(torch.stack(values)).all()
        if self.accelerator.num_processes > 1:
            whole = torch.as_tensor(self.accelerator.reduce(finite.float(), "sum"))
            finite = whole == self.accelerator.num_processes
        bad = (~finite).long()
        self._counts = torch.stack([self._counts[0] + bad, (self._counts[1] + 1) * bad])
        if self.accelerator.scaler is not None:
            self._take_scaled(bool(finite))
        else:
            self._fused.found_inf = bad.float()  # the kernel leaves weights, moments and counts alone where it is 1
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def _take_scaled(self, finite: bool) -> None:
        """A gradient scaler has its own say about steps, which the host has to hear."""
        if finite:
            self.optimizer.step()
        else:
            assert self.accelerator.scaler is not None
            self.accelerator.scaler.update()  # lower the scale; the step itself is never taken
