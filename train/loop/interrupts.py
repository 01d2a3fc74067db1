"""Note signals and the time limit of a run, and let all processes agree to end."""

import signal
import time
from types import FrameType
from typing import Self

import torch
from accelerate import Accelerator

SAME_SIGNAL = 2.0
"""Seconds within which a second signal counts as the first one, passed on."""

HEAR_EVERY = 8
"""Steps on a GPU between two times when the host waits for it, to learn of skipped steps and to agree to end."""


class Interrupts:
    """Note SIGTERM, SIGINT and a time limit within a context, to be acted on between steps.

    A second signal of the same kind kills at once, as it would without this, unless it comes within `SAME_SIGNAL`
    seconds of the first: schedulers signal a launcher and its children, and the launcher passes the signal on.
    """

    def __init__(self, max_minutes: float | None) -> None:
        """Start the clock of the time limit."""
        self.signal = 0
        self._noted: dict[int, float] = {}
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
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
        """Return whether the time limit has passed."""
        return self._deadline is not None and time.monotonic() > self._deadline


def agree(accelerator: Accelerator, interrupts: Interrupts) -> int | None:
    """Return the code with which all processes end now, shared by one small reduction: 128 + the number of a signal
    that one of them got, or 0 at the time limit. None: go on."""
    mine = torch.tensor([float(interrupts.signal), float(interrupts.out_of_time)], device=accelerator.device)
    if accelerator.num_processes > 1:
        mine = torch.as_tensor(accelerator.gather(mine[None])).amax(0)
    number, late = mine.tolist()
    return 128 + int(number) if number else 0 if late else None


def is_heard(device: torch.device, step: int) -> bool:
    """Decide whether the host synchronises with the device after this step: always with a CPU, which costs nothing."""
    return device.type == "cpu" or step % HEAR_EVERY == 0
