"""The training loop and what one step does, whatever is trained."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from tqdm import tqdm

from latent_codec.errors import UserError
from train.loop import checkpoints
from train.loop.checkpoints import Progress, Saved
from train.loop.guarded_steps import Skipped, Steps
from train.loop.interrupts import Agreement, Interrupts, agree, is_heard
from train.loop.logs import RunLog
from train.objectives.losses import map_losses
from train.objectives.schedules import LearningRate, learning_rate_at

RATE = "rate"
"""In a group of an optimizer's parameters: what their learning rate is of the schedule's."""


class LoopConfig(LearningRate, Protocol):
    """What the loop wants of a run's configuration; the fields are explained in `train.config.vae.TrainConfig`."""

    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def log_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...
    @property
    def max_skipped(self) -> int: ...


class Task(Protocol):
    """What is trained: the part that differs between programs."""

    def arguments(self, step: int, measure: bool) -> tuple[Any, ...]:
        """What the objective takes after a batch. `measure`: this step's losses will be logged."""
        ...

    def values(self, losses: Any, step: int) -> dict[str, float]:
        """What the log says of the losses, which are averages over all processes."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the averaged weights and draw pictures; the main process alone does it."""
        ...


class Step(NamedTuple):
    losses: Any  # a named tuple of tensors, as the objective returns it; its `loss` is what is minimised
    norm: torch.Tensor  # of the gradient before it was scaled down


class Trainer:
    """The loop and what one step does.

    `modules` are what a checkpoint holds, by name: the first is trained, the second, "ema", its average; where one is
    trained beside it, NAME, "NAME_ema" is that one's.
    """

    def __init__(
        self,
        config: LoopConfig,
        out: Path,
        accelerator: Accelerator,
        objective: torch.nn.Module,
        modules: Mapping[str, Saved],
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        task: Task,
        log: RunLog,
        after_step: Callable[[Any, int], None] | None = None,
    ) -> None:
        """`optimizer` is a fused Adam as Accelerate prepared it. `after_step` gets a taken step's losses, this process'
        own, and its number from 1, before "ema" follows."""
        self.config, self.out, self.accelerator, self.log = config, out, accelerator, log
        self.objective, self.modules, self.optimizer = objective, modules, optimizer
        self.trained, ema = list(modules.values())[:2]
        pairs = [(self.trained, ema)] + [(m, modules[f"{n}_ema"]) for n, m in modules.items() if f"{n}_ema" in modules]
        self._averaged: list[torch.Tensor] = [p for module, _ in pairs for p in module.parameters()]
        self._averages: list[torch.Tensor] = [p for _, average in pairs for p in average.parameters()]
        own = {id(p) for p in self.trained.parameters()}
        # A context prior or a discriminator, whose gradients are not scaled down but must be finite, too.
        self._beside = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        self.progress, self.task, self.after_step = progress, task, after_step
        self.steps = Steps(accelerator, optimizer, Skipped(progress.skipped, progress.skipped_in_a_row))

    def loop(self, batches: Iterator[tuple[Any, ...]], interrupts: Interrupts, quiet: bool) -> int:
        config, progress = self.config, self.progress
        bar = tqdm(total=config.steps, initial=progress.step, disable=quiet or None, unit="step", dynamic_ncols=True)
        started, begun, seen = progress.minutes, time.monotonic(), 0
        window = time.monotonic()
        if config.steps == 0:  # nothing but the start
            self._evaluate()
            self._save()
        while progress.step < config.steps:
            measure = (progress.step + 1) % config.log_every == 0
            losses, norm = self._step(batches, measure)
            progress.step += 1
            last, saving = progress.step == config.steps, progress.step % config.save_every == 0
            heard = measure or last or saving or is_heard(self.accelerator.device, progress.step)
            agreed = self._hear(interrupts) if heard else None
            progress.minutes = started + (time.monotonic() - begun) / 60
            seen += config.batch_size
            bar.update()
            if measure:
                self._log(losses, norm, seen / (time.monotonic() - window))
                seen, window = 0, time.monotonic()
            if progress.step % config.eval_every == 0 or last:
                self._evaluate()
                window, seen = time.monotonic(), 0
            if saving or last or agreed:
                self._save()
            if agreed and not last:
                return self._farewell(agreed)
        return 0

    def _step(self, batches: Iterator[tuple[Any, ...]], measure: bool) -> Step:
        """One optimizer step, or one step that all processes skip together; a GPU may still be at it afterwards."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(config, self.progress.step) * group.get(RATE, 1.0)
        arguments = self.task.arguments(self.progress.step, measure)
        micro: list[Any] = []
        for i in range(config.accumulation):
            last = i == config.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.objective):
                losses = self.objective(*next(batches), *arguments)
                accelerator.backward(losses.loss / config.accumulation)
            micro.append(map_losses(torch.Tensor.detach, losses))
        losses = micro[0]
        if len(micro) > 1:
            losses = map_losses(lambda *parts: torch.stack(parts).mean(0), *micro)
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = accelerator.clip_grad_norm_(self.trained.parameters(), limit)
        assert norm is not None
        taken = self.progress.step - self.steps.skipped  # before this one
        finite = self.steps.take(losses.loss, norm, *self._norm_beside())
        if self.after_step is not None and bool(finite):
            self.after_step(losses, self.progress.step + 1)
        self._update_ema(finite, taken)
        return Step(losses, norm)

    def _norm_beside(self) -> list[torch.Tensor]:
        gradients = [p.grad for p in self._beside if p.grad is not None]
        return [torch.nn.utils.get_total_norm(gradients)] if gradients else []

    @torch.no_grad()
    def _update_ema(self, finite: torch.Tensor, taken: torch.Tensor) -> None:
        """Decay rises with the steps taken, so that early averages forget the start; a skipped step moves nothing."""
        decay = ((1.0 + taken) / (10.0 + taken)).clamp(max=max(self.config.ema_decay, 0.0))
        weight = (1.0 - decay) * finite  # () float32
        change = torch._foreach_sub(self._averaged, self._averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, weight)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(self._averages, change)  # pyright: ignore[reportPrivateImportUsage]

    def _hear(self, interrupts: Interrupts) -> Agreement:
        """Wait for the device: what was skipped, and whether the run ends here."""
        skipped = self.steps.counts()
        self.progress.skipped, self.progress.skipped_in_a_row = skipped
        self._stop_if_hopeless()
        return agree(self.accelerator, interrupts)

    def _stop_if_hopeless(self) -> None:
        if self.progress.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"loss or gradient was not finite {self.progress.skipped_in_a_row} steps in a row (limit max_skipped "
                f"{self.config.max_skipped}) at step {self.progress.step}; lower --learning-rate, or train in bf16 or "
                "without mixed precision; the last checkpoint is intact"
            )

    def _log(self, losses: Any, norm: torch.Tensor, speed: float) -> None:
        losses = map_losses(lambda t: torch.as_tensor(self.accelerator.reduce(t, "mean")), losses)
        step = self.progress.step
        values = self.task.values(losses, step) | {
            "grad_norm": norm.item(),
            "learning_rate": learning_rate_at(self.config, step - 1),
            "skipped": self.progress.skipped,
            "images_per_s": speed,
            "minutes": self.progress.minutes,
        }
        self.log.write("train", step, values)

    def _evaluate(self) -> None:
        if self.accelerator.is_main_process:
            self.log.write("eval", self.progress.step, self.task.evaluate(self.progress.step))
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            if self.accelerator.scaler is not None:
                self.progress.scaler = self.accelerator.scaler.state_dict()
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            folder = self.out / "checkpoints"
            self.log.flush()
            checkpoints.save(folder, self.modules, inner, self.progress, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _farewell(self, agreed: Agreement) -> int:
        reason = "interrupted" if agreed.signal else "stopped by --max-minutes"
        self.accelerator.print(
            f"{reason} at step {self.progress.step} of {self.config.steps}; a checkpoint is saved, the same command "
            "goes on from here"
        )
        return 128 + agreed.signal if agreed.signal else 0
