"""Train a VAE: `accelerate launch -m train.vae PRESET --data DIR_OR_TARS --out RUN [overrides]`.

`python -m train.vae ...` runs one process.
Rerunning the same command resumes. Precision and the number of processes come from Accelerate.
"""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed

from latent_codec.errors import UserError
from latent_codec.images.sources import Source
from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.networks.linear import PatchMoments
from latent_codec.storage.json_config import to_json
from train.collapse import signs_of_collapse
from train.config.common import flat
from train.config.presets import PRESETS
from train.config.vae import ELBOConfig, IWAEConfig, JointConfig, TrainConfig
from train.context_prior.trained import prior_of
from train.data.crops import Batches, ImageSet, MemoryImages, SamplePlan, StreamedImages, centre_crops
from train.init.closed_form import (
    all_patch_moments,
    mean_pixels,
    patch_moments,
    start_from_closed_form,
    start_from_mean,
)
from train.init.from_model import start_from_model
from train.loop import checkpoints
from train.loop.checkpoints import Progress, Saved
from train.loop.interrupts import Interrupts
from train.loop.logs import RunLog
from train.loop.program import main_of, run_of_preset
from train.loop.run_setup import Run, check_run, check_same_step, claim, describe, labels_of, split
from train.loop.trainer import RATE, Trainer
from train.objectives.codebook import CodebookTraining, averages_of
from train.objectives.elbo import ELBO, ELBOLosses
from train.objectives.iwae import IWAE, IWAELosses
from train.objectives.joint import Joint, JointLosses, measure
from train.objectives.schedules import beta_at
from train.validation import Validation

_START_CROPS = 1024
"""New channels of a model to start from take their components of these: 262,144 patches of 8x8 at 128x128."""


def main() -> None:
    def work() -> int:
        def run(config: TrainConfig) -> Run:
            return Run(data=tyro.MISSING, out=tyro.MISSING, config=config)

        return train(run_of_preset("train.vae", __doc__, PRESETS, run))

    main_of("train.vae", work)


def train(run: Run) -> int:
    """Run to the end, a signal or the time limit; returns the exit code (0, or 128 + the signal's number)."""
    accelerator = Accelerator(log_with=list(run.log_with) or None, project_dir=str(run.out))
    config, interrupts = run.config, Interrupts(run.max_minutes)  # the time runs from here
    accelerator.wait_for_everyone()  # a process that finds a mistake before the others have connected would strand them
    check_run(run, accelerator)
    sources, held_out = split(run)
    described = describe(run, sources)
    claim(run.out, config, described, accelerator)
    quiet = not accelerator.is_main_process  # progress bars also want a terminal: tqdm sees to that

    torch.backends.cudnn.benchmark = True  # shapes never change: the fastest convolution is worth looking for
    set_seed(config.seed)  # initial weights; all later randomness is counted, not drawn from a state
    codec = Codec(config.codec)
    ema = copy.deepcopy(codec)
    objective = _make_objective(run, codec).to(accelerator.device)
    ema = ema.to(accelerator.device).eval().requires_grad_(False)
    if config.channels_last:
        objective, ema = objective.to(memory_format=torch.channels_last), ema.to(memory_format=torch.channels_last)
    trained = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
    )
    modules: dict[str, Saved] = {"codec": codec, "ema": ema}
    if isinstance(objective, Joint):
        averaged = copy.deepcopy(objective.prior).eval().requires_grad_(False)
        modules |= {"prior": objective.prior, "prior_ema": averaged}  # pyright: ignore[reportAssignmentType]
        if objective.config.decoder_alone:
            assert run.start_from is not None
            start = Codec.load(run.start_from)
            ema.statistics, ema.priors = start.statistics, start.priors  # still right: `export` finds them there
            ema.provenance = {name: value for name, value in start.provenance.items() if name == "prior"}
        else:
            rate = objective.config.prior_learning_rate / config.learning_rate
            optimizer.add_param_group({"params": list(objective.prior.parameters()), RATE: rate})
    elif isinstance(objective, ELBO) and objective.adversary is not None:
        modules["discriminator"] = objective.adversary.net
        theirs = list(objective.adversary.net.parameters())
        # A moving target wants a short memory (Esser et al. 2021); without decay it rests until the contest begins.
        optimizer.add_param_group({"params": theirs, "betas": (0.5, 0.9), "weight_decay": 0.0})
    settings = config.objective.codebook if isinstance(config.objective, ELBOConfig) else None
    averages = averages_of(codec, settings)
    if averages is not None:
        modules["codebook"] = averages.to(accelerator.device)
    progress = checkpoints.restore(run.out / "checkpoints", modules, optimizer)
    check_same_step(accelerator, progress)

    images = _open_images(run, _labelled(codec, sources), accelerator, quiet)
    plan = SamplePlan(
        seed=config.seed,
        crop=config.crop,
        flip=config.flip,
        batch_size=config.batch_size,
        micro_batches=config.accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    if progress.step == 0 and run.start_from is not None:
        whole = plan._replace(rank=0, world=1, micro_batches=1)
        start_from_model(codec, run.start_from, images.batches(whole, 0, math.ceil(_START_CROPS / config.batch_size)))
        ema.load_state_dict(codec.state_dict())
    elif progress.step == 0 and config.closed_form:
        start_from_closed_form(codec, _moments(config, codec, sources, images, plan, quiet))
        ema.load_state_dict(codec.state_dict())
    elif progress.step == 0 and config.mean_start:
        start_from_mean(codec, mean_pixels(images, plan._replace(rank=0, world=1, micro_batches=1), len(sources)))
        ema.load_state_dict(codec.state_dict())
    codebook = None
    if settings is not None and averages is not None:
        codebook = CodebookTraining(settings, codec, averages, accelerator, images, plan)
        if progress.step == 0:
            codebook.start(keep=run.start_from is not None)
            ema.load_state_dict(codec.state_dict())
    if config.compile:
        objective.compile()
    # Everything is in its place; Accelerate would move a resumed Adam's step counts to the GPU, one wait for each.
    wrapped, optimizer_ = accelerator.prepare(objective, optimizer, device_placement=[True, False])
    if accelerator.scaler is not None and progress.scaler:
        accelerator.scaler.load_state_dict(progress.scaler)
    if run.log_with:
        accelerator.init_trackers(run.out.name, flat(to_json(config) | described))

    crops = centre_crops(_labelled(codec, held_out), config.eval_crop)
    log = RunLog(run.out / "log.jsonl", accelerator, progress.step)
    after_step = None if codebook is None else codebook.after_step
    task = VAETask(config, run.out, ema, Validation(crops), log)
    if isinstance(objective, Joint):
        task.more = functools.partial(measure, modules["prior_ema"], ema, crops, objective.lpips)  # pyright: ignore[reportArgumentType]
    trainer = Trainer(config, run.out, accelerator, wrapped, modules, optimizer_, progress, task, log, after_step)
    _announce(run, accelerator, codec, sources, progress)
    with interrupts:
        code = trainer.loop(images.batches(plan, progress.step, config.steps), interrupts, quiet)
    accelerator.end_training()
    return code


class VAETask:
    """What `Trainer` leaves to a VAE."""

    def __init__(self, config: TrainConfig, out: Path, ema: Codec, validation: Validation, log: RunLog) -> None:
        self.config, self.out, self.ema, self.validation, self.log = config, out, ema, validation, log
        self.more: Callable[[], dict[str, float]] = dict  # what else is measured

    def arguments(self, step: int, measure: bool) -> tuple[Any, ...]:
        """The KL's weight, and whether the expected pixels are measured: compiled, always, for two graphs cost more;
        with an adversary, whether it takes part."""
        device = next(self.ema.parameters()).device
        beta = torch.full((), beta_at(self.config.objective, step), device=device)  # no copy that waits for the device
        measure = measure or self.config.compile
        objective = self.config.objective
        if isinstance(objective, ELBOConfig) and objective.adversarial is not None:
            return beta, measure, step >= objective.adversarial.adversarial_start
        return beta, measure

    def values(self, losses: ELBOLosses | IWAELosses | JointLosses, step: int) -> dict[str, float]:
        return losses.values(beta_at(self.config.objective, step - 1), self.config.crop)

    def evaluate(self, step: int) -> dict[str, float]:
        self.validation.write_grid(self.out / "grids" / f"step-{step:08d}.png", self.ema)
        values = self.validation.measure(self.ema) | self.more()
        for sign in signs_of_collapse(values, self.config, step):
            self.log.warn(sign.name, step, sign.text)
        return values


def _make_objective(run: Run, codec: Codec) -> ELBO | IWAE | Joint:
    config = run.config.objective
    if isinstance(config, IWAEConfig):
        return IWAE(config, codec)
    lpips = LPIPS(config.lpips_net, run.lpips_backbone) if config.lpips_weight > 0 else None
    if isinstance(config, JointConfig):
        assert run.start_from is not None
        prior = prior_of(config, run.start_from)
        if len(prior.order) != codec.config.latent_channels:
            raise UserError(
                f"--start-from {run.start_from}: its quantiser is for {len(prior.order)} latent channels, not "
                f"{codec.config.latent_channels}; let them grow by `photo`, then `latent-codec export` it"
            )
        return Joint(config, codec, prior, lpips)
    return ELBO(config, codec, lpips)


def _moments(
    config: TrainConfig, codec: Codec, sources: list[Source], images: Batches, plan: SamplePlan, quiet: bool
) -> PatchMoments:
    if config.closed_form_crops is None:
        return all_patch_moments(sources, codec, quiet=quiet)
    whole = plan._replace(rank=0, world=1, micro_batches=1)  # every process computes the same start
    batches = math.ceil(config.closed_form_crops / config.batch_size)
    return patch_moments(images, whole, codec, batches, quiet=quiet)


def _labelled(codec: Codec, sources: list[Source]) -> ImageSet:
    return ImageSet(sources=sources, labels=labels_of(codec, sources), channels=codec.config.image_channels)


def _open_images(run: Run, images: ImageSet, accelerator: Accelerator, quiet: bool) -> Batches:
    if run.data_mode == "stream":
        return StreamedImages(images, run.workers, accelerator.device)
    return MemoryImages(images, run.config.crop, accelerator.device, quiet=quiet)


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
