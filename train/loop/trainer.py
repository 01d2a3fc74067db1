"""Run the training loop of every program: take guarded steps, average weights, log, evaluate and save."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.storage.json_config import to_json
from train.config.common import LoopConfig, flat
from train.data.crops import SamplePlan
from train.loop import checkpoints
from train.loop.claim import check_same_step
from train.loop.guarded_steps import GuardedSteps
from train.loop.interrupts import Interrupts, agree, is_heard
from train.loop.logs import RunLog
from train.loop.program import RunOptions
from train.objectives.losses import map_losses
from train.objectives.schedules import learning_rate_at

RATE = "rate"
"""Key of an optimizer's parameter group for its learning rate relative to the schedule's."""


class Task:
    """Do what differs between programs; this class takes no arguments and evaluates nothing."""

    after_step: Callable[[Any, int], None] | None = None
    """Gets this process' losses of each step that was not skipped, and the step's number from 1, before the averages
    follow; the host waits for the device to learn whether it was."""

    def arguments(self, step: int, measure: bool) -> tuple[Any, ...]:
        """Return the objective's arguments after those of a batch; `measure` says that this step will be logged."""
        return ()

    def values(self, losses: Any, step: int, loop: dict[str, float]) -> dict[str, float]:
        """Return the logged values of a step from its losses, averaged over all processes, and from those of the loop:
        grad_norm, learning_rate, skipped, images_per_s and minutes."""
        return losses.values() | loop

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the averaged weights on the main process; without values nothing is logged."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModules:
    """Name what a run trains and saves."""

    objective: torch.nn.Module
    """Returns the losses of a micro-batch as a named tuple with a `loss`."""
    modules: Mapping[str, torch.nn.Module]
    """Parts of a checkpoint by name. The first is trained, and "ema" is its average; "NAME_ema" is that of NAME."""
    optimizer: torch.optim.Optimizer
    """A fused Adam of the first module's parameters and of others, whose gradients are not clipped."""


class Trainer:
    """Train the modules of one run, from its newest checkpoint to the end."""

    def __init__(self, config: LoopConfig, run: RunOptions, accelerator: Accelerator, trained: TrainedModules) -> None:
        """Restore the newest checkpoint, if there is one; its step is then in `progress`.
        Raises `UserError` if all checkpoints are damaged or the processes see different ones."""
        self.config, self.run, self.accelerator = config, run, accelerator
        self.objective, self.modules, self.optimizer = trained.objective, trained.modules, trained.optimizer
        self.trained = next(iter(self.modules.values()))
        pairs = [(self.trained, self.modules["ema"])] if "ema" in self.modules else []
        pairs += [(m, self.modules[f"{name}_ema"]) for name, m in self.modules.items() if f"{name}_ema" in self.modules]
        self._averaged: list[torch.Tensor] = [p for module, _ in pairs for p in module.parameters()]
        self._averages: list[torch.Tensor] = [p for _, average in pairs for p in average.parameters()]
        own = {id(p) for p in self.trained.parameters()}
        # The gradients of a context prior or a discriminator are not clipped, but must be finite, too.
        self._beside = [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in own]
        self._checkpoints = run.out / "checkpoints"
        self.progress = checkpoints.restore(self._checkpoints, self.modules, self.optimizer)
        check_same_step(accelerator, self.progress)

    def plan(self, crop: int, *, flip: bool = False) -> SamplePlan:
        """Return this process' share of the samples."""
        return SamplePlan(
            seed=self.config.seed,
            crop=crop,
            flip=flip,
            batch_size=self.config.batch_size,
            micro_batches=self.config.accumulation,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def prepare(self, described: Mapping[str, Any]) -> None:
        """Hand objective and optimizer to Accelerate, and open log and trackers, which record `described`, the data
        that the run is trained on. All weights must be in place."""
        if self.config.compile:
            self.objective.compile()
        # Accelerate would move a resumed Adam's step counts to the GPU, at one wait for each.
        self.objective, self.optimizer = self.accelerator.prepare(
            self.objective, self.optimizer, device_placement=[True, False]
        )
        if self.accelerator.scaler is not None and self.progress.scaler:
            self.accelerator.scaler.load_state_dict(self.progress.scaler)
        if self.run.log_with:
            self.accelerator.init_trackers(self.run.out.name, flat(to_json(self.config) | dict(described)))
        self.steps = GuardedSteps(
            self.accelerator, self.optimizer, (self.progress.skipped, self.progress.skipped_in_a_row)
        )
        self.log = RunLog(self.run.out / "log.jsonl", self.accelerator, self.progress.step)

    def announce(self, data: str, batch: str | None = None) -> None:
        """Print what is trained, on what data and batches, by which processes, and from which step."""
        accelerator, parameters = self.accelerator, sum(p.numel() for p in self.trained.parameters())
        processes = f"{accelerator.num_processes} process(es) on {accelerator.device}"
        about = (data, f"{processes}, precision {accelerator.mixed_precision}", *([batch] if batch else []))
        steps = f"from step {self.progress.step} to {self.config.steps}"
        accelerator.print("; ".join((*about, f"{parameters / 1e6:.2f} M parameters", steps)))

    def loop(self, task: Task, batches: Iterator[tuple[Any, ...]], interrupts: Interrupts) -> int:
        """Train on `batches`, which go on from the restored step, to the end, a signal or the time limit.
        Returns 0, or 128 + the signal's number."""
        config, progress = self.config, self.progress
        quiet = not self.accelerator.is_main_process or None  # with None, tqdm looks for a terminal
        bar = tqdm(total=config.steps, initial=progress.step, disable=quiet, unit="step", dynamic_ncols=True)
        started, seen = progress.minutes, 0
        begun = window = time.monotonic()
        with interrupts:
            if config.steps == 0:  # only the start is evaluated and saved
                self._evaluate(task)
                self._save()
            while progress.step < config.steps:
                measure = (progress.step + 1) % config.log_every == 0
                losses, norm = self.step(task, batches, measure)
                progress.step += 1
                last, saving = progress.step == config.steps, progress.step % config.save_every == 0
                heard = measure or last or saving or is_heard(self.accelerator.device, progress.step)
                code = self._hear(interrupts) if heard else None
                progress.minutes = started + (time.monotonic() - begun) / 60
                seen += config.batch_size
                bar.update()
                if measure:
                    self._log(task, losses, norm, seen / (time.monotonic() - window))
                    seen, window = 0, time.monotonic()
                if progress.step % config.eval_every == 0 or last:
                    self._evaluate(task)
                    window, seen = time.monotonic(), 0
                if saving or last or code is not None:
                    self._save()
                if code is not None and not last:
                    self.accelerator.print(
                        f"{'interrupted' if code else 'stopped by --max-minutes'} at step {progress.step} of "
                        f"{config.steps}; a checkpoint is saved, the same command goes on from here"
                    )
                    return code
        return 0

    def step(self, task: Task, batches: Iterator[tuple[Any, ...]], measure: bool) -> tuple[Any, torch.Tensor]:
        """Take one optimizer step, or skip it on all processes together; a GPU may still be at work afterwards.
        Returns this process' losses and the norm of the gradient before clipping."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(config, self.progress.step) * group.get(RATE, 1.0)
        arguments = task.arguments(self.progress.step, measure)
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
        beside = [p.grad for p in self._beside if p.grad is not None]
        finite = self.steps.take(losses.loss, norm, *([torch.nn.utils.get_total_norm(beside)] if beside else []))
        if task.after_step is not None and bool(finite):
            task.after_step(losses, self.progress.step + 1)
        self._update_averages(finite, taken)
        return losses, norm

    @torch.no_grad()
    def _update_averages(self, finite: torch.Tensor, taken: torch.Tensor) -> None:
        """Average the weights; the decay rises with the steps taken, so that early averages forget the start."""
        if not self._averaged:
            return
        decay = ((1.0 + taken) / (10.0 + taken)).clamp(max=max(self.config.ema_decay, 0.0))
        weight = (1.0 - decay) * finite  # () float32; 0 for a skipped step
        change = torch._foreach_sub(self._averaged, self._averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, weight)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(self._averages, change)  # pyright: ignore[reportPrivateImportUsage]

    def _hear(self, interrupts: Interrupts) -> int | None:
        """Wait for the device to learn which steps were skipped and whether the run ends here."""
        self.progress.skipped, self.progress.skipped_in_a_row = self.steps.counts()
        if self.progress.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"loss or gradient was not finite {self.progress.skipped_in_a_row} steps in a row (limit max_skipped "
                f"{self.config.max_skipped}) at step {self.progress.step}; lower --learning-rate, or train in bf16 or "
                "without mixed precision; the last checkpoint is intact"
            )
        return agree(self.accelerator, interrupts)

    def _log(self, task: Task, losses: Any, norm: torch.Tensor, speed: float) -> None:
        losses = map_losses(lambda t: torch.as_tensor(self.accelerator.reduce(t, "mean")), losses)
        step = self.progress.step
        loop = {
            "grad_norm": norm.item(),
            "learning_rate": learning_rate_at(self.config, step - 1),
            "skipped": self.progress.skipped,
            "images_per_s": speed,
            "minutes": self.progress.minutes,
        }
        self.log.write("train", step, task.values(losses, step, loop))

    def _evaluate(self, task: Task) -> None:
        if self.accelerator.is_main_process and (values := task.evaluate(self.progress.step)):
            self.log.write("eval", self.progress.step, values)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            if self.accelerator.scaler is not None:
                self.progress.scaler = self.accelerator.scaler.state_dict()
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            self.log.flush()
            checkpoints.save(self._checkpoints, self.modules, inner, self.progress, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()
