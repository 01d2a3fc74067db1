"""Train a VAE: `accelerate launch -m train.vae PRESET --data DIR_OR_TARS --out RUN [overrides]`.

`python -m train.vae ...` runs one process. The same command resumes a run. Precision and the number of processes come
from Accelerate.
"""

import copy
import dataclasses
import math
from functools import partial
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed

from latent_codec.errors import UserError, printable
from latent_codec.images.sources import Source
from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.program import say
from train.collapse import signs_of_collapse
from train.config.presets import PRESETS
from train.config.vae import ELBOConfig, IWAEConfig, JointConfig
from train.context_prior.network import ContextNet
from train.context_prior.trained import prior_of
from train.data.crops import Batches, CentreCrops, MemoryImages, StreamedImages, centre_crops
from train.init import closed_form
from train.init.from_model import start_from_model
from train.loop.claim import claim
from train.loop.logs import RunLog
from train.loop.program import main_of, run_of_preset
from train.loop.run_setup import Run, check_run, describe_data, labelled, read_options, split
from train.loop.session import Session, begin, once
from train.loop.trainer import RATE, Task, TrainedModules, Trainer
from train.objectives.codebook import CodebookAverages, CodebookTraining, averages_of
from train.objectives.elbo import ELBO
from train.objectives.iwae import IWAE
from train.objectives.joint import Joint, measure
from train.objectives.losses import VAELosses
from train.objectives.schedules import beta_at
from train.validation import Validation

_START_CROPS = 1024
"""Crops from which new channels of a model to start from take their components: 262,144 patches of 8x8 at 128x128."""


def main() -> None:
    """Run the command line."""
    run = partial(Run, data=tyro.MISSING, out=tyro.MISSING)
    main_of("train.vae", lambda: train(run_of_preset("train.vae", __doc__, PRESETS, run)))


def train(run: Run) -> int:
    """Train to the end, a signal or the time limit; return the exit code, 0 or 128 + the signal's number.
    Raises `UserError` for options, data or a run's folder that cannot be trained on."""
    with begin(run) as session:
        return _train(run, session)


def _train(run: Run, session: Session) -> int:
    config, (accelerator, interrupts, _) = run.config, session
    check_run(run, accelerator)
    sources, held_out, notes = once(accelerator, partial(split, run))  # to find images in tar shards takes minutes
    for note in notes if accelerator.is_main_process else ():
        say(printable(note), error=True)
    described = once(accelerator, partial(describe_data, run, sources))
    claim(run.out, config, described, session)

    torch.backends.cudnn.benchmark = True  # shapes never change, so the search for the fastest convolution pays
    set_seed(config.seed)  # for initial weights; all later randomness is a hash of counters
    parts = _build(run, accelerator)
    trainer = Trainer(config, run, accelerator, parts)
    images = _open_images(run, parts.codec, sources, accelerator)
    plan = trainer.plan(config.crop, flip=config.flip)
    codebook, objective = None, config.objective
    if parts.averages is not None and isinstance(objective, ELBOConfig) and objective.codebook is not None:
        codebook = CodebookTraining(objective.codebook, parts.codec, parts.averages, accelerator, images, plan)
    if trainer.progress.step == 0:
        _start(run, parts, images, trainer, sources)
        if codebook is not None:
            codebook.start(keep=run.start_from is not None)
        parts.ema.load_state_dict(parts.codec.state_dict())
    trainer.prepare(described)

    validation = labelled(parts.codec, held_out, read_options(config))
    task = VAETask(run, parts, centre_crops(validation, config.eval_crop), trainer.log)
    processes, micro = accelerator.num_processes, config.accumulation
    share = f"{processes} x {micro} x {config.batch_size // processes // micro}"
    batch = f"{config.batch_size} crops of {config.crop} per step = {share}"
    trainer.announce(f"{len(sources)} images ({run.data_mode})", batch)
    if codebook is not None:
        task.after_step = codebook.after_step
    code = trainer.loop(task, images.batches(plan, trainer.progress.step, config.steps), interrupts)
    accelerator.end_training()
    return code


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts(TrainedModules):
    """Hold the modules of a VAE's run."""

    objective: ELBO | IWAE | Joint
    codec: Codec
    ema: Codec
    averages: CodebookAverages | None


def _build(run: Run, accelerator: Accelerator) -> _Parts:
    config, device = run.config, accelerator.device
    codec = Codec(config.codec)
    ema = copy.deepcopy(codec)
    objective = make_objective(run, codec).to(device)
    ema = ema.to(device).eval().requires_grad_(False)
    if config.channels_last:
        objective, ema = objective.to(memory_format=torch.channels_last), ema.to(memory_format=torch.channels_last)
    trained = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
    )
    modules: dict[str, torch.nn.Module] = {"codec": codec, "ema": ema}
    if isinstance(objective, Joint):
        prior = objective.prior
        modules |= {"prior": prior, "prior_ema": copy.deepcopy(prior).eval().requires_grad_(False)}
        if objective.config.decoder_alone:
            assert run.start_from is not None
            start = Codec.load(run.start_from)
            ema.statistics, ema.priors = start.statistics, start.priors  # they stay right, and `export` keeps them
            ema.provenance = {name: value for name, value in start.provenance.items() if name == "prior"}
        else:
            rate = objective.config.prior_learning_rate / config.learning_rate
            optimizer.add_param_group({"params": list(prior.parameters()), RATE: rate})
    elif isinstance(objective, ELBO) and objective.adversary is not None:
        net = objective.adversary.net
        modules["discriminator"] = net
        # A moving target calls for a short memory (Esser et al. 2021); without decay it rests until its start.
        optimizer.add_param_group({"params": list(net.parameters()), "betas": (0.5, 0.9), "weight_decay": 0.0})
    averages = averages_of(codec, config.objective.codebook if isinstance(config.objective, ELBOConfig) else None)
    if averages is not None:
        modules["codebook"] = averages.to(device)
    return _Parts(objective=objective, modules=modules, optimizer=optimizer, codec=codec, ema=ema, averages=averages)


def make_objective(run: Run, codec: Codec) -> ELBO | IWAE | Joint:
    """Return the loss of a run's configuration for a codec; a joint run's prior comes from its first model."""
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


def _open_images(run: Run, codec: Codec, sources: list[Source], accelerator: Accelerator) -> Batches:
    images, quiet = labelled(codec, sources, read_options(run.config)), not accelerator.is_main_process
    if run.data_mode == "stream":
        return StreamedImages(images, run.workers, accelerator.device)
    return MemoryImages(images, run.config.crop, accelerator.device, quiet=quiet)


def _start(run: Run, parts: _Parts, images: Batches, trainer: Trainer, sources: list[Source]) -> None:
    """Set the first weights of a new run; every process computes the same ones."""
    config, codec, quiet = run.config, parts.codec, not trainer.accelerator.is_main_process
    plan = trainer.plan(config.crop, flip=config.flip)._replace(rank=0, world=1, micro_batches=1)
    if run.start_from is not None:
        start_from_model(codec, run.start_from, images.batches(plan, 0, math.ceil(_START_CROPS / config.batch_size)))
    elif config.closed_form:
        if config.closed_form_crops is None:
            moments = closed_form.all_patch_moments(sources, codec, quiet=quiet, read=read_options(config))
        else:
            batches = math.ceil(config.closed_form_crops / config.batch_size)
            moments = closed_form.patch_moments(images, plan, codec, batches, quiet=quiet)
        closed_form.start_from_closed_form(codec, moments)
    elif config.mean_start:
        closed_form.start_from_mean(codec, closed_form.mean_pixels(images, plan, len(sources)))


class VAETask(Task):
    """Evaluate a VAE, and log its losses."""

    def __init__(self, run: Run, parts: _Parts, crops: CentreCrops, log: RunLog) -> None:
        self.config, self.out, self.parts, self.crops, self.log = run.config, run.out, parts, crops, log
        self.validation = Validation(crops)

    def arguments(self, step: int, measure: bool) -> tuple[Any, ...]:
        """Return the KL's weight, whether to measure the MSE and, with an adversary, whether it takes part.
        A compiled objective always measures, because two graphs would cost more."""
        device = next(self.parts.ema.parameters()).device
        beta = torch.full((), beta_at(self.config.objective, step), device=device)  # no copy that waits for the device
        measure = measure or self.config.compile
        objective = self.config.objective
        if isinstance(objective, ELBOConfig) and objective.adversarial is not None:
            return beta, measure, step >= objective.adversarial.adversarial_start
        return beta, measure

    def values(self, losses: VAELosses, step: int, loop: dict[str, float]) -> dict[str, float]:
        return losses.values(beta_at(self.config.objective, step - 1), self.config.crop) | loop

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the averaged weights on the validation images, draw a grid, and warn of signs of collapse."""
        ema, objective = self.parts.ema, self.parts.objective
        self.validation.write_grid(self.out / "grids" / f"step-{step:08d}.png", ema)
        values = self.validation.measure(ema)
        if isinstance(objective, Joint):
            prior = self.parts.modules["prior_ema"]
            assert isinstance(prior, ContextNet)
            values |= measure(prior, ema, self.crops, objective.lpips)
        for sign in signs_of_collapse(values, self.config, step):
            self.log.warn(sign.name, step, sign.text)
        return values


if __name__ == "__main__":
    main()
