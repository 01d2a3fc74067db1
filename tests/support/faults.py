"""Inject faults into a run: functions that `tests.support.run` calls in the process before the program starts."""

import itertools
import math
import os
import time
from typing import Any

import torch
from accelerate import Accelerator

from train.loop import checkpoints, interrupts, run_setup, session, trainer
from train.loop.interrupts import Interrupts
from train.objectives.elbo import ELBO
from train.objectives.losses import VAELosses

_TRAINER: Any = trainer.Trainer  # patched, whatever the types say
_INTERRUPTS: Any = Interrupts
_ELBO: Any = ELBO


def _is_rank(rank: int) -> bool:
    return int(os.environ.get("RANK", "0")) == rank


def stall(step: int, rank: int = 0) -> None:
    """Wait before this step until SIGTERM or SIGINT has been noted."""
    real, enter = trainer.Trainer.step, Interrupts.__enter__
    noted: list[Interrupts] = []

    def entered(self: Interrupts) -> Interrupts:
        noted.append(self)
        return enter(self)

    def slow(self: trainer.Trainer, *args: Any) -> Any:
        while _is_rank(rank) and self.progress.step + 1 == step and not noted[0].signal:
            time.sleep(0.01)
        return real(self, *args)

    _INTERRUPTS.__enter__, _TRAINER.step = entered, slow


def hang(step: int) -> None:
    """Wait before this step whatever is noted, and take a signal for a second one after 0.1 s already."""
    real = trainer.Trainer.step

    def stuck(self: trainer.Trainer, *args: Any) -> Any:
        while self.progress.step + 1 == step:
            time.sleep(0.01)
        return real(self, *args)

    _TRAINER.step = stuck
    interrupts.SAME_SIGNAL = 0.1


def nan_loss(*steps: int, rank: int = 0) -> None:
    """Make the loss of these steps NaN on one process; without steps, that of all steps.

    At the first of them the gradient is NaN, too, and spreads to all processes; later it is finite, so that the others
    cannot know.
    """
    real, calls = ELBO.forward, itertools.count(1)

    def forward(self: ELBO, *args: Any) -> VAELosses:
        losses, step = real(self, *args), next(calls)
        if not _is_rank(rank) or step not in (steps or (step,)):
            return losses
        return losses._replace(loss=losses.loss * math.nan if step == min(steps, default=1) else losses.loss + math.nan)

    _ELBO.forward = forward


def hear_rarely_nan_loss(*steps: int) -> None:
    """Apply `nan_loss`, and let the host hear of it as it does of a GPU's, at a save."""
    nan_loss(*steps)
    trainer.is_heard = lambda *_: False


def no_checkpoints(rank: int) -> None:
    """Hide the run's folder from one process."""
    if _is_rank(rank):
        checkpoints.restore = lambda *_: checkpoints.Progress()


def scaled_fp16() -> None:
    """Train in float16 with a gradient scaler on the CPU, which Accelerate sets up on GPUs only."""

    class Scaling(Accelerator):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)  # pyright: ignore[reportPrivateImportUsage]

    session.Accelerator = Scaling


def search_on(rank: int) -> None:
    """Let no other process search for images or hash them."""

    def search(*_: Any) -> Any:
        raise AssertionError("only the main process reads folders and tar shards for all")

    if not _is_rank(rank):
        run_setup.list_all = run_setup.fingerprint = search
