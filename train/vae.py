"""Train a VAE: `accelerate launch -m train.vae PRESET --data DIR_OR_TARS --out RUN [overrides]`.

`python -m train.vae ...` runs one process.
Rerunning the same command resumes. Precision and the number of processes come from Accelerate.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from tqdm import tqdm

from latent_codec import __version__
from latent_codec.codec import Codec
from latent_codec.config import from_json, to_json
from latent_codec.errors import UserError
from latent_codec.files import make_folder, write_text
from latent_codec.inputs import Source, find_all
from latent_codec.noise import normal, text_key
from latent_codec.perceptual import LPIPS
from train import checkpoints
from train.checkpoints import Progress
from train.closed_form import check_closed_form, patch_moments, start_from_closed_form
from train.config import TrainConfig, check, flat
from train.data import Batches, CentreCrops, MemoryImages, Plan, StreamedImages, centre_crops, fingerprint
from train.grid import write_grid
from train.interrupts import Agreement, Interrupts, agree
from train.logs import RunLog
from train.objectives import ELBO, Losses
from train.presets import PRESETS
from train.provenance import git_commit
from train.schedules import beta_at, learning_rate_at

_MAY_CHANGE = {"steps", "log_every", "eval_every", "eval_crop", "save_every", "keep_checkpoints", "max_skipped"}
_CLOSED_FORM_IMAGES = 16_384  # crops whose patches give the closed form its moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    data: tuple[Path, ...]
    """Folders of images (read recursively) or tar shards."""
    out: Path
    """The run's folder: checkpoints, log.jsonl, grids. An existing run is resumed."""
    val: tuple[Path, ...] = ()
    """Folders or tar shards of validation images; without it, `val_images` are held out from the data."""
    val_images: int = 64
    data_mode: Literal["memory", "stream"] = "memory"
    """`memory`: decode once, keep uint8 on the device, crop there; `stream`: decode in workers as needed."""
    workers: int = 4
    """Worker processes of `stream`."""
    max_minutes: float | None = None
    """End cleanly with a checkpoint after this many minutes; the same command goes on."""
    log_with: tuple[str, ...] = ()
    """Accelerate trackers besides log.jsonl: tensorboard, wandb ..."""
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""
    config: tyro.conf.OmitArgPrefixes[TrainConfig]


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    presets = {name: Run(data=tyro.MISSING, out=tyro.MISSING, config=preset()) for name, preset in PRESETS.items()}
    about = {name: (preset.__doc__ or "").splitlines()[0] for name, preset in PRESETS.items()}
    kind = tyro.extras.subcommand_type_from_defaults(presets, about)
    run: Run = tyro.cli(kind, prog="train.vae", description=__doc__, config=(tyro.conf.AvoidSubcommands,))
    try:
        code = train(run)
    except (UserError, ValueError) as error:
        raise SystemExit(f"train.vae: {error}") from error
    sys.exit(code)


def train(run: Run) -> int:
    """Run to the end, a signal or the time limit; returns the exit code (0, or 128 + the signal's number)."""
    accelerator = Accelerator(log_with=list(run.log_with) or None, project_dir=str(run.out))
    config = run.config
    _check(run, accelerator)
    sources, held_out = _split(run)
    described = _describe_run(run, sources)
    _claim(run.out, config, described, accelerator)
    quiet = not accelerator.is_main_process  # progress bars also want a terminal: tqdm sees to that

    set_seed(config.seed)  # initial weights; all later randomness is counted, not drawn from a state
    codec = Codec(config.codec)
    ema = copy.deepcopy(codec)
    lpips = LPIPS(config.objective.lpips_net, run.lpips_backbone) if config.objective.lpips_weight > 0 else None
    objective = ELBO(config.objective, codec, lpips).to(accelerator.device)
    ema = ema.to(accelerator.device).eval().requires_grad_(False)
    if config.channels_last:
        objective, ema = objective.to(memory_format=torch.channels_last), ema.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    progress = checkpoints.restore(run.out / "checkpoints", codec, ema, optimizer)
    _check_same_step(accelerator, progress)

    images = _open_images(run, sources, accelerator, quiet)
    plan = Plan(
        seed=config.seed,
        crop=config.crop,
        flip=config.flip,
        batch_size=config.batch_size,
        micro_batches=config.accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    if progress.step == 0 and config.closed_form:
        whole = plan._replace(rank=0, world=1, micro_batches=1)  # every process computes the same start
        batches = math.ceil(_CLOSED_FORM_IMAGES / config.batch_size)
        start_from_closed_form(codec, patch_moments(images, whole, codec, batches, quiet=quiet))
        ema.load_state_dict(codec.state_dict())
    if config.compile:
        objective.compile()
    # Everything is in its place; Accelerate would move a resumed Adam's step counts to the GPU, one wait for each.
    wrapped, optimizer_ = accelerator.prepare(objective, optimizer, device_placement=[True, False])
    if accelerator.scaler is not None and progress.scaler:
        accelerator.scaler.load_state_dict(progress.scaler)
    if run.log_with:
        accelerator.init_trackers(run.out.name, flat(to_json(config) | described))

    validation = Validation(centre_crops(held_out, config.eval_crop))
    log = RunLog(run.out / "log.jsonl", accelerator, progress.step)
    trainer = Trainer(run, accelerator, wrapped, codec, ema, optimizer_, progress, validation, log)
    _announce(run, accelerator, codec, sources, progress)
    with Interrupts(run.max_minutes) as interrupts:
        code = trainer.loop(images.batches(plan, progress.step, config.steps), interrupts, quiet)
    accelerator.end_training()
    return code


class Validation:
    """Fixed centre crops and the noise that belongs to each."""

    def __init__(self, crops: CentreCrops) -> None:
        self.pixels = crops.pixels
        self.keys = torch.tensor([text_key(name) for name in crops.names])

    @torch.no_grad()
    def measure(self, codec: Codec, batch: int = 8) -> dict[str, float]:
        """NLL, KL and ELBO in nats per image, PSNR of the mode, KL in bits per pixel, active channels."""
        device = next(codec.parameters()).device
        nll, kl, psnr, mean, square = [], [], [], [], []
        for pixels, keys in zip(self.pixels.split(batch), self.keys.split(batch), strict=True):
            pixels, keys = pixels.to(device), keys.to(device)
            x = codec.likelihood.from_uint8(pixels)
            posterior = codec.encode(x)
            z = posterior.sample(normal(keys, tuple(posterior.mean.shape[1:])))
            nll.append(-codec.likelihood.log_prob(codec.likelihood_params(z), x))
            kl.append(posterior.kl())
            error = codec.decode_uint8(posterior.mode()).float() - pixels.float()
            psnr.append(10 * torch.log10(255**2 / error.square().mean((1, 2, 3))))
            mean.append(posterior.mean.mean((2, 3)))  # (b, z)
            square.append(posterior.mean.square().mean((2, 3)))
        side = self.pixels.shape[-1]
        return {
            "nll": torch.cat(nll).mean().item(),
            "kl": torch.cat(kl).mean().item(),
            "nelbo": (torch.cat(nll) + torch.cat(kl)).mean().item(),
            "kl_bpp": torch.cat(kl).mean().item() / math.log(2) / side**2,
            "psnr_mode": torch.cat(psnr).mean().item(),
            "active_channels": active_channels(torch.cat(mean).mean(0), torch.cat(square).mean(0)),
        }


def active_channels(mean: torch.Tensor, square: torch.Tensor) -> int:
    """Channels whose posterior mean varies over the data by more than 0.01 (Burda et al. 2016, section 5.2)."""
    return int((square - mean.square() > 0.01).sum())


class Trainer:
    """The loop and what one step does."""

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        objective: torch.nn.Module,
        codec: Codec,
        ema: Codec,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        validation: Validation,
        log: RunLog,
    ) -> None:
        self.run, self.config, self.accelerator, self.log = run, run.config, accelerator, log
        self.objective, self.codec, self.ema, self.optimizer = objective, codec, ema, optimizer
        self.progress, self.validation = progress, validation

    def loop(self, batches: Iterator, interrupts: Interrupts, quiet: bool) -> int:
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

    def _step(self, batches: Iterator, interrupts: Interrupts, measure: bool) -> tuple[Losses, torch.Tensor, Agreement]:
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
        return losses, norm, agreed

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
        if config.objective.lpips_weight > 0:
            values["lpips"] = losses.lpips.item()
        self.log.write("train", step, values)

    def _evaluate(self) -> None:
        if self.accelerator.is_main_process:
            self.log.write("eval", self.progress.step, self.validation.measure(self.ema))
            grid = self.run.out / "grids" / f"step-{self.progress.step:08d}.png"
            write_grid(grid, self.ema.to(self.accelerator.device), *self._grid_inputs())
        self.accelerator.wait_for_everyone()

    def _grid_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.accelerator.device
        return self.validation.pixels[:8].to(device), self.validation.keys[:8].to(device)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            if self.accelerator.scaler is not None:
                self.progress.scaler = self.accelerator.scaler.state_dict()
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            folder = self.run.out / "checkpoints"
            self.log.flush()
            checkpoints.save(folder, self.codec, self.ema, inner, self.progress, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _farewell(self, agreed: Agreement) -> int:
        reason = "interrupted" if agreed.signal else f"stopped after {self.run.max_minutes:g} minutes"
        self.accelerator.print(
            f"{reason} at step {self.progress.step} of {self.config.steps}; a checkpoint is saved, the same command "
            "goes on from here"
        )
        return 128 + agreed.signal if agreed.signal else 0


def _check(run: Run, accelerator: Accelerator) -> None:
    config = run.config
    check(config)
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} cannot be split over {accelerator.num_processes} processes x "
            f"{config.accumulation} micro-batches; make it a multiple of {parts}"
        )
    codec = Codec(config.codec)
    if config.codec.image_channels != 3:
        raise UserError(f"image_channels is {config.codec.image_channels}; training images are RGB: set it to 3")
    for name, side in (("crop", config.crop), ("eval_crop", config.eval_crop)):
        if side % codec.factor:
            raise UserError(f"{name} {side} is no multiple of the model's factor {codec.factor}")
    if config.closed_form:
        check_closed_form(codec)
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("set gradient accumulation with --accumulation, not in accelerate's configuration")
    if "all" not in run.log_with and len(accelerator.log_with) < len(set(run.log_with)):
        installed = ", ".join(str(tracker) for tracker in accelerator.log_with) or "none"
        raise UserError(f"log_with {' '.join(run.log_with)}: of these trackers {installed} can be imported; install it")
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError(f"fp16 needs a GPU, not {accelerator.device}: choose bf16, or no mixed precision")


def _check_same_step(accelerator: Accelerator, progress: Progress) -> None:
    """Processes that see different checkpoints would wait for one another for ever."""
    steps = torch.as_tensor(accelerator.gather(torch.tensor([progress.step], device=accelerator.device))).tolist()
    if len(set(steps)) > 1:
        raise UserError(f"the processes found checkpoints of steps {steps}; --out must be on a shared file system")


def _split(run: Run) -> tuple[list[Source], list[Source]]:
    """Training sources and held-out ones; without --val the held-out are those whose names hash lowest."""
    if run.val_images < 1:
        raise UserError(f"val_images is {run.val_images}; it must be at least 1")
    sources = find_all(run.data)
    by_name = sorted(find_all(run.val) if run.val else sources, key=lambda s: text_key(s.name))
    held_out = by_name[: run.val_images]
    if not run.val:
        chosen = {s.name for s in held_out}
        sources = [s for s in sources if s.name not in chosen]
    if not sources:
        raise UserError(f"all {len(held_out)} images are held out; lower --val-images or give --val")
    return sources, held_out


def _describe_run(run: Run, sources: list[Source]) -> dict[str, object]:
    """What the run was trained on, for the record; compared when it is resumed."""
    return {
        "data_sha256": fingerprint(sources),
        "data_images": len(sources),
        "data": sorted(p.name for p in run.data),
    }


def _claim(out: Path, config: TrainConfig, described: dict[str, object], accelerator: Accelerator) -> None:
    """Write RUN/config.json, or check that the run being resumed is the same one."""
    path = out / "config.json"
    problem = [""]
    if accelerator.is_main_process:
        try:
            make_folder(out)
            if path.exists():
                _check_same_run(path, config, described)
            version = {"version": __version__, "git_commit": git_commit()}
            write_text(path, json.dumps({"config": to_json(config)} | described | version, indent=1))
        except UserError as error:  # of which the others must hear, or they would wait
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])


def _check_same_run(path: Path, config: TrainConfig, described: dict[str, object]) -> None:
    """Raise `UserError` if RUN/config.json tells of other settings, by their names, or of other data."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        old, data = flat(to_json(from_json(TrainConfig, found["config"]))), found["data_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run of this version ({error}); give another --out") from error
    new = flat(to_json(config))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in _MAY_CHANGE]
    if changed:
        raise UserError(
            f"{path.parent} is a run with other settings ({', '.join(changed)}); give its own, or another --out"
        )
    if data != described["data_sha256"]:
        raise UserError(f"{path.parent} was trained on other images; give its own --data and --val, or another --out")


def _open_images(run: Run, sources: list[Source], accelerator: Accelerator, quiet: bool) -> Batches:
    if run.data_mode == "stream":
        return StreamedImages(sources, run.workers, accelerator.device)
    return MemoryImages(sources, run.config.crop, accelerator.device, quiet=quiet)


def _announce(run: Run, accelerator: Accelerator, codec: Codec, sources: list[Source], progress: Progress) -> None:
    config = run.config
    accelerator.print(
        f"{len(sources)} images ({run.data_mode}); {accelerator.num_processes} process(es) on {accelerator.device}, "
        f"precision {accelerator.mixed_precision}; {config.batch_size} crops of {config.crop} per step = "
        f"{accelerator.num_processes} x {config.accumulation} x "
        f"{config.batch_size // accelerator.num_processes // config.accumulation}; "
        f"{sum(p.numel() for p in codec.parameters()) / 1e6:.2f} M parameters; "
        f"from step {progress.step} to {config.steps}"
    )


if __name__ == "__main__":
    main()
