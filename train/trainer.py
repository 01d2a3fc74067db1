"""The training loop and what one step does."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

from latent_codec.codec import Codec
from latent_codec.errors import UserError
from train import checkpoints
from train.checkpoints import Progress
from train.config import TrainConfig
from train.data import Batch
from train.interrupts import Agreement, Interrupts, agree
from train.logs import RunLog
from train.objectives import Losses
from train.schedules import beta_at, learning_rate_at
from train.validation import Validation, active_channels


class Step(NamedTuple):
    losses: Losses
    norm: torch.Tensor  # of the gradient before it was scaled down
    agreed: Agreement


class Trainer:
    """The loop and what one step does."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        accelerator: Accelerator,
        objective: torch.nn.Module,
        codec: Codec,
        ema: Codec,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        validation: Validation,
        log: RunLog,
    ) -> None:
        self.config, self.out, self.accelerator, self.log = config, out, accelerator, log
        self.objective, self.codec, self.ema, self.optimizer = objective, codec, ema, optimizer
        self.progress, self.validation = progress, validation

    def loop(self, batches: Iterator[Batch], interrupts: Interrupts, quiet: bool) -> int:
        config, progress = self.config, self.progress
        bar = tqdm(total=config.steps, initial=progress.step, disable=quiet or None, unit="step", dynamic_ncols=True)
        started, begun, seen = progress.minutes, time.monotonic(), 0
        window = time.monotonic()
        if config.steps == 0:  # nothing but the closed form
            self._evaluate()
            self._save()
        while progress.step < config.steps:
            measure = (progress.step + 1) % config.log_every == 0
            losses, norm, agreed = self._step(batches, interrupts, measure)
            progress.step += 1
            progress.minutes = started + (time.monotonic() - begun) / 60
            seen += config.batch_size
            bar.update()
            if measure:
                self._log(losses, norm, seen / (time.monotonic() - window))
                seen, window = 0, time.monotonic()
            self._stop_if_hopeless()
            last = progress.step == config.steps
            if progress.step % config.eval_every == 0 or last:
                self._evaluate()
                window, seen = time.monotonic(), 0
            ending = agreed.signal or agreed.out_of_time
            if progress.step % config.save_every == 0 or last or ending:
                self._save()
            if ending and not last:
                return self._farewell(agreed)
        return 0

    def _step(
        self, batches: Iterator[Batch], interrupts: Interrupts, measure: bool
    ) -> tuple[Losses, torch.Tensor, Agreement]:
        """One optimizer step, or one step that all processes skip together."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(config, self.progress.step)
        beta = torch.tensor(beta_at(config.objective, self.progress.step), device=accelerator.device)
        micro: list[Losses] = []
        for i in range(config.accumulation):
            last = i == config.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.objective):
                losses: Losses = self.objective(*next(batches), beta, measure)
                accelerator.backward(losses.loss / config.accumulation)
            micro.append(Losses(*(v.detach() for v in losses)))
        losses = Losses(*(torch.stack(v).mean(0) for v in zip(*micro, strict=True)))
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = accelerator.clip_grad_norm_(self.codec.parameters(), limit)
        assert norm is not None
        agreed = agree(accelerator, torch.isfinite(losses.loss) & torch.isfinite(norm), interrupts)
        if agreed.finite:
            self.optimizer.step()
            self._update_ema()
            self.progress.skipped_in_a_row = 0
        else:
            if accelerator.scaler is not None:
                accelerator.scaler.update()  # lower the scale; the step itself is never taken
            self.progress.skipped += 1
            self.progress.skipped_in_a_row += 1
        self.optimizer.zero_grad()
        return Step(losses, norm, agreed)

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Decay rises with the step, so that early averages forget the start."""
        taken = self.progress.step - self.progress.skipped
        decay = min(self.config.ema_decay, (1 + taken) / (10 + taken)) if self.config.ema_decay > 0 else 0.0
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.ema.parameters()), list(self.codec.parameters()), 1.0 - decay
        )

    def _stop_if_hopeless(self) -> None:
        if self.progress.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"loss or gradient was not finite {self.progress.skipped_in_a_row} steps in a row (limit max_skipped "
                f"{self.config.max_skipped}) at step {self.progress.step}; lower --learning-rate, or train in bf16 or "
                "without mixed precision; the last checkpoint is intact"
            )

    def _log(self, losses: Losses, norm: torch.Tensor, speed: float) -> None:
        losses = Losses(*(torch.as_tensor(self.accelerator.reduce(v, "mean")) for v in losses))
        step, config = self.progress.step, self.config
        values = {
            "loss": losses.loss.item(),
            "nll": losses.nll.item(),
            "kl": losses.kl.item(),
            "beta": beta_at(config.objective, step - 1),
            "kl_bpp": losses.kl.item() / math.log(2) / config.crop**2,
            "psnr": -10 * math.log10(max(losses.mse.item(), 1e-12)),
            "active_channels": active_channels(losses.latent_mean, losses.latent_square),
            "clamped": losses.clamped.item(),
            "grad_norm": norm.item(),
            "learning_rate": learning_rate_at(config, step - 1),
            "skipped": self.progress.skipped,
            "images_per_s": speed,
            "minutes": self.progress.minutes,
        }
        if config.objective.mode_weight > 0:
            values["nll_mode"] = losses.nll_mode.item()
        if config.objective.lpips_weight > 0:
            values["lpips"] = losses.lpips.item()
        self.log.write("train", step, values)

    def _evaluate(self) -> None:
        if self.accelerator.is_main_process:
            self.log.write("eval", self.progress.step, self.validation.measure(self.ema))
            self.validation.write_grid(self.out / "grids" / f"step-{self.progress.step:08d}.png", self.ema)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            if self.accelerator.scaler is not None:
                self.progress.scaler = self.accelerator.scaler.state_dict()
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            folder = self.out / "checkpoints"
            self.log.flush()
            checkpoints.save(folder, self.codec, self.ema, inner, self.progress, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _farewell(self, agreed: Agreement) -> int:
        reason = "interrupted" if agreed.signal else "stopped by --max-minutes"
        self.accelerator.print(
            f"{reason} at step {self.progress.step} of {self.config.steps}; a checkpoint is saved, the same command "
            "goes on from here"
        )
        return 128 + agreed.signal if agreed.signal else 0
