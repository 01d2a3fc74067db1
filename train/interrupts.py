"""Reasons to end a run early, and the agreement of all processes about them and about bad steps."""

import signal
import time
from types import FrameType, TracebackType
from typing import NamedTuple, Self

import torch
from accelerate import Accelerator

SAME_SIGNAL = 2.0


class Interrupts:
    """Context manager: SIGTERM, SIGINT and a time limit are noted, and acted on between steps.

    A second signal of the same kind kills at once, as it would without this; but not within `SAME_SIGNAL` seconds of
    the first, for schedulers signal a launcher and its children, and the launcher passes the signal on.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.signal = 0
        self._noted: dict[int, float] = {}
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._noted.setdefault(number, now) > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    @property
    def out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


class Agreement(NamedTuple):
    """What all processes hold to be true of this step."""

    finite: bool
    signal: int
    out_of_time: bool


def agree(accelerator: Accelerator, finite: torch.Tensor, interrupts: Interrupts) -> Agreement:
    """One small reduction: a bad step, a signal or the end of time on any process counts for all."""
    mine = (1.0 - finite.float(), float(interrupts.signal), float(interrupts.out_of_time))
    if accelerator.num_processes > 1:
        flags = torch.stack([torch.as_tensor(v, device=accelerator.device, dtype=torch.float32) for v in mine])
        flags = torch.as_tensor(accelerator.gather(flags[None])).amax(0)
    else:
        flags = torch.tensor([float(v) for v in mine])
    bad, number, late = flags.tolist()
    return Agreement(finite=bad == 0, signal=int(number), out_of_time=late > 0)
