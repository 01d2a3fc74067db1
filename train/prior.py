"""Fit a model's context prior to its own latents: `python -m train.prior MODEL --latents DIR... --out RUN`.

MODEL has been exported with its quantiser (`latent-codec export ... --data`), and DIR was written by `latent-codec
encode SRC DIR --format safetensors --model MODEL`. RUN/model.safetensors becomes the model with the frozen prior. The
same command resumes a run. Use `accelerate launch -m train.prior ...` for several processes.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import safe_open

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.model.shipped import resolve
from latent_codec.prior.context import ContextConfig
from latent_codec.prior.error_feedback import Feedback
from latent_codec.prior.passes import ideal_bits, quantize
from latent_codec.prior.priors import PREFIX, Priors
from latent_codec.program import parse, say
from latent_codec.storage.json_config import to_json
from latent_codec.storage.run_folder import PRIOR_RUN_MODEL
from train.config.common import LoopConfig, check_interval, check_least, flat
from train.config.prior import PriorConfig, context_layout, context_spacing
from train.context_prior.error_feedback import PLACES, measure
from train.context_prior.network import ContextNet, counted_tables, logistic_tables
from train.context_prior.trained import prior_from
from train.data.latents import LatentCrops, MeanBatch
from train.loop.claim import check_processes, claim
from train.loop.logs import RunLog
from train.loop.program import RunOptions, main_of
from train.loop.provenance import git_commit
from train.loop.session import Session, begin, once
from train.loop.trainer import Task, TrainedModules, Trainer
from train.objectives.prior import PriorLosses, PriorObjective

_MEASURED_STEPS = (1.0, 1.4, 2.0, 4.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(RunOptions):
    """Hold the options of one run."""

    model: tyro.conf.Positional[str]
    """A model file with a quantiser, or a shipped model's name."""
    latents: tuple[Path, ...]
    """Folders of the model's latents to train on."""
    val: tuple[Path, ...] = ()
    """Folders of other images' latents, on which the frozen prior is finally compared with its float original."""
    start_from: Path | None = None
    """A run of `train.vae` with a joint objective and the same groups, levels and width, or a model with a context
    prior of the same width, from which matching passes are taken. A new run starts from its weights."""
    config: tyro.conf.OmitArgPrefixes[PriorConfig] = dataclasses.field(default_factory=PriorConfig)


def main() -> None:
    """Run the command line."""
    main_of("train.prior", lambda: train(parse(Run, "train.prior", __doc__)))


def train(run: Run) -> int:
    """Train to the end, a signal or the time limit, and at the end write the model; return 0, or 128 + the signal's
    number. Raises `UserError` for options, latents or a folder that cannot be used."""
    with begin(run) as session:
        return _train(run, session)


def _train(run: Run, session: Session) -> int:
    config, (accelerator, interrupts, _) = run.config, session
    loop = _check(run, accelerator)
    codec = Codec.load(run.model)
    if codec.priors is None or codec.statistics is None:
        raise UserError(f"{run.model}: has no quantiser yet; `latent-codec export {run.model} DST --data IMAGES` first")
    context = _context_config(config, codec)
    crops = LatentCrops(run.latents, codec.model_id, config.crop, accelerator.device)
    start_from = None if run.start_from is None else run.start_from.name
    described = {"data_sha256": crops.fingerprint, "model_id": codec.model_id, "start_from": start_from}
    claim(run.out, config, described, session, same=("model_id", "start_from"))

    torch.backends.cudnn.benchmark = True  # shapes never change, so the search for the fastest convolution pays
    set_seed(config.seed)
    feedback = _measure_feedback(codec, crops, config, accelerator)
    net = prior_from(run.start_from, context, codec)
    net.round_by(feedback)
    net = net.to(accelerator.device)
    net.freeze(logistic_tables())  # raises before training what could not be frozen
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    objective = PriorObjective(config, net)
    trained = TrainedModules(objective=objective, modules={"prior": net}, optimizer=optimizer)
    trainer = Trainer(loop, run, accelerator, trained)
    trainer.prepare(described)
    trainer.announce(f"{len(crops)} images' latents")
    code = trainer.loop(PriorTask(), _batches(crops, trainer), interrupts)
    if trainer.progress.step == config.steps and accelerator.is_main_process:
        codec.priors = codec.priors._replace(feedback=feedback)
        _finish(run, codec, net, crops, trainer.log)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return code


class PriorTask(Task):
    """Log the losses of a context prior, which is only evaluated once it is frozen."""

    def values(self, losses: PriorLosses, step: int, loop: dict[str, float]) -> dict[str, float]:
        return losses.values() | {name: loop[name] for name in ("grad_norm", "images_per_s", "learning_rate")}


def _check(run: Run, accelerator: Accelerator) -> LoopConfig:
    """Raise `UserError` for options that would only fail later, and return the loop's configuration."""
    config = run.config
    check_least(config, 1, "batch_size", "count_images", "log_every", "save_every", "width")
    if config.crop < 2 or config.crop % 2:
        raise UserError(f"crop is {config.crop}; it must be even and at least 2")
    check_interval("step_range", config.step_range)
    if not 0 <= config.dithered <= 1:
        raise UserError(f"dithered is {config.dithered}; it is a share, 0 to 1")
    if (old := run.out / "checkpoint.safetensors").exists():
        raise UserError(f"{old}: cannot be resumed by this version of train.prior; give another --out")
    shared = {field.name for field in dataclasses.fields(LoopConfig)} & {f.name for f in dataclasses.fields(config)}
    loop = LoopConfig(
        **{name: getattr(config, name) for name in shared},
        accumulation=1,
        weight_decay=0.0,
        max_grad_norm=1e3,
        ema_decay=0.0,
        compile=False,
        eval_every=max(1, config.steps),
        keep_checkpoints=2,
        max_skipped=25,
    )
    check_processes(loop, run.log_with, accelerator)
    return loop


def _context_config(config: PriorConfig, codec: Codec) -> ContextConfig:
    groups, levels = context_layout(config.groups, config.levels, codec.config.latent_channels)
    if config.crop % (spacing := context_spacing(levels)):
        raise UserError(f"crop is {config.crop}; with levels {levels} it must be a multiple of {spacing}")
    nested = bool(codec.config.prefixes)
    return ContextConfig(groups=groups, width=config.width, centred=True, levels=levels, nested=nested)


def _measure_feedback(
    codec: Codec, crops: LatentCrops, config: PriorConfig, accelerator: Accelerator
) -> Feedback | None:
    """Measure on the main process alone: a single rounding error would make another's result differ."""

    def found() -> Feedback | None:
        assert codec.priors is not None
        (places,) = (batch.means for batch in crops.batches(PLACES, PLACES, config.seed + 2))
        return measure(codec, places, codec.priors.channel_steps)

    return once(accelerator, found) if config.feedback else None


def _batches(crops: LatentCrops, trainer: Trainer) -> Iterator[MeanBatch]:
    plan = trainer.plan(crops.crop)
    for samples in plan.schedule(trainer.progress.step, trainer.config.steps):
        yield crops.batch(samples, plan.seed)


@torch.no_grad()
def _finish(run: Run, codec: Codec, net: ContextNet, crops: LatentCrops, log: RunLog) -> None:
    """Freeze the prior, count its tables on training latents, measure it, and write the model."""
    config, device = run.config, crops.packed.device
    net.eval()
    assert codec.priors is not None
    start, coded = logistic_tables(), []
    for batch in crops.batches(config.count_images, config.batch_size, config.seed + 1):
        latents = net.unquantized(net.draw(batch.means, batch.keys, config.step_range, config.dithered))
        for coding in quantize(net.freeze(start), latents, str(device), codec.priors.feedback):  # exact on every device
            coded += coding.passes
    tables = counted_tables(start, *(np.concatenate(part) for part in zip(*coded, strict=True)))
    codec.priors = codec.priors._replace(context=net.freeze(tables))
    if run.val:
        held_out = LatentCrops(run.val, crops.model_id, config.crop, device)
        for step in _MEASURED_STEPS:
            log.write("eval", config.steps, _measure(net, codec.priors, held_out, step, config))
    about: dict[str, Any] = {"model_id": crops.model_id, "latents_sha256": crops.fingerprint}
    about |= flat(to_json(config), "config")
    about |= {"start_from": None if run.start_from is None else run.start_from.name, "git_commit": git_commit()}
    codec.provenance = codec.provenance | {"prior": about}
    path = run.out / PRIOR_RUN_MODEL
    codec.save(path, half=_is_half(resolve(run.model)))
    Codec.load(path)
    say(f"wrote {path}")


def _measure(
    net: ContextNet, priors: Priors, held_out: LatentCrops, step: float, config: PriorConfig
) -> dict[str, float]:
    """Return the ideal code lengths of rounded means at one step, in bits per latent position."""
    total = {"float": 0.0, "context": 0.0, "factorized": 0.0}
    for batch in held_out.batches(len(held_out), config.batch_size, config.seed):
        drawn = net.draw(batch.means, batch.keys, (step, step), 0.0)
        total["float"] += net.code(drawn).bits.sum().item() * config.crop**2
        for kind in ("context", "factorized"):
            prior = priors.choose(kind)
            codings = quantize(prior, net.unquantized(drawn), str(held_out.packed.device), priors.feedback)
            total[kind] += sum(ideal_bits(prior, coding.passes) for coding in codings)
    values = {f"{name}_bits": bits / len(held_out) / config.crop**2 for name, bits in total.items()}
    return {"step": step} | values | {"saved": 1 - total["context"] / total["factorized"]}


def _is_half(path: Path) -> bool:
    """Return whether a model file stores float16."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith(PREFIX)]  # noqa: SIM118
        return file.get_slice(names[0]).get_dtype() == "F16"


if __name__ == "__main__":
    main()
