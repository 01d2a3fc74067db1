"""Reasons to end a run early, and the agreement of all processes about them."""

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
    """What all processes hold to be true after a step."""

    signal: int
    out_of_time: bool

    def __bool__(self) -> bool:
        """Whether the run ends."""
        return bool(self.signal) or self.out_of_time


def agree(accelerator: Accelerator, interrupts: Interrupts) -> Agreement:
    """One small reduction: a signal or the end of time on any process counts for all."""
    mine = torch.tensor([float(interrupts.signal), float(interrupts.out_of_time)], device=accelerator.device)
    if accelerator.num_processes > 1:
        mine = torch.as_tensor(accelerator.gather(mine[None])).amax(0)
    number, late = mine.tolist()
    return Agreement(signal=int(number), out_of_time=late > 0)


HEAR_EVERY = 8
"""Steps on a GPU between two times when the host waits for it to hear of bad steps and processes agree to end."""


def is_heard(device: torch.device, step: int) -> bool:
    """Whether the host hears after this step: on a CPU, which nothing has to wait for, always."""
    return device.type == "cpu" or step % HEAR_EVERY == 0
