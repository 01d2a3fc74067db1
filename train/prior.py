"""Fit a model's context prior to its own latents: `python -m train.prior MODEL --latents DIR... --out RUN`.

MODEL has been exported with its quantiser (`latent-codec export ... --data`); DIR is what `latent-codec encode SRC DIR
--format safetensors --model MODEL` wrote. RUN/model.safetensors is the model with the prior, frozen. Rerunning the same
command resumes. `accelerate launch -m train.prior ...` for several processes.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.model.file import LatentStatistics
from latent_codec.model.shipped import resolve
from latent_codec.prior.context import ContextConfig
from latent_codec.prior.error_feedback import Feedback
from latent_codec.prior.passes import ideal_bits, quantize
from latent_codec.prior.priors import PREFIX, Priors
from latent_codec.prior.quantizer import Scaled
from latent_codec.storage import tensors as tensor_files
from latent_codec.storage.files import make_folder
from latent_codec.storage.json_config import dumps, to_json
from latent_codec.storage.run_folder import PRIOR_RUN_MODEL
from train.config.common import flat
from train.config.prior import PriorConfig, context_groups, context_levels, context_spacing
from train.context_prior.error_feedback import PLACES, measure
from train.context_prior.network import ContextNet, Drawn, counted_tables, logistic_tables
from train.data.latents import LatentCrops
from train.loop.checkpoints import load_optimizer, optimizer_tensors
from train.loop.guarded_steps import Skipped, Steps
from train.loop.interrupts import Interrupts, agree, is_heard
from train.loop.logs import RunLog
from train.loop.program import main_of
from train.loop.provenance import git_commit
from train.objectives.schedules import learning_rate_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    model: tyro.conf.Positional[str]
    """A model file with a quantiser, or a shipped model's name."""
    latents: tuple[Path, ...]
    """Folders of the model's latents to train on."""
    val: tuple[Path, ...] = ()
    """Folders of other images' latents: at the end the frozen prior is measured on them beside its float original."""
    start_from: Path | None = None
    """What a new run starts from: a run of `train.vae` whose objective is joint, of the same groups, levels and width,
    or a model with a context prior of the same width, of which passes over the same channels and positions count."""
    out: Path
    """The run's folder: model.safetensors, checkpoint.safetensors, log.jsonl. An existing run is resumed."""
    max_minutes: float | None = None
    """End cleanly with a checkpoint after this many minutes; the same command goes on."""
    config: tyro.conf.OmitArgPrefixes[PriorConfig] = dataclasses.field(default_factory=PriorConfig)


def main() -> None:
    main_of("train.prior", lambda: train(tyro.cli(Run, prog="train.prior", description=__doc__)))


def train(run: Run) -> int:
    """Run to the end, a signal or the time limit; returns the exit code (0, or 128 + the signal's number)."""
    accelerator, config = Accelerator(), run.config
    interrupts = Interrupts(run.max_minutes)
    accelerator.wait_for_everyone()
    _check(run, accelerator)
    codec = Codec.load(run.model)
    if codec.priors is None or codec.statistics is None:
        raise UserError(f"{run.model}: has no quantiser yet; `latent-codec export {run.model} DST --data IMAGES` first")
    model_id = codec.model_id
    crops = LatentCrops(run.latents, model_id, config.crop, accelerator.device)
    described: dict[str, Any] = {"model_id": model_id, "latents_sha256": crops.fingerprint} | flat(
        to_json(config), "config"
    )
    described["start_from"] = None if run.start_from is None else run.start_from.name
    make_folder(run.out)

    torch.backends.cudnn.benchmark = True  # shapes never change: the fastest convolution is worth looking for
    set_seed(config.seed)
    groups = context_groups(config.groups, codec.config.latent_channels)
    levels = context_levels(config.levels, groups)
    if config.crop % (spacing := context_spacing(levels)):
        raise UserError(f"crop is {config.crop}; with levels {levels} it must be a multiple of {spacing}")
    context = ContextConfig(groups=groups, width=config.width, centred=True, levels=levels)
    feedback = _measure_feedback(codec, crops, config, accelerator)
    net = make_net(context, codec.priors.channel_steps, codec.statistics, run.start_from)
    net.round_by(feedback)
    net = net.to(accelerator.device)
    net.freeze(logistic_tables())  # what cannot be frozen is not worth training
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    checkpoint = run.out / "checkpoint.safetensors"
    step = _restore(checkpoint, net, optimizer, described)
    wrapped, optimizer_ = accelerator.prepare(net, optimizer, device_placement=[True, False])
    log = RunLog(run.out / "log.jsonl", accelerator, step)
    accelerator.print(
        f"{len(crops)} images' latents; {accelerator.num_processes} process(es) on {accelerator.device}, precision "
        f"{accelerator.mixed_precision}; {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters; from step "
        f"{step} to {config.steps}"
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    size = config.batch_size // world
    bar = tqdm(total=config.steps, initial=step, disable=not accelerator.is_main_process or None, unit="step")
    started, seen, steps = time.monotonic(), 0, Steps(accelerator, optimizer_, Skipped(0, 0))
    with interrupts, bar:
        while step < config.steps:
            for group in optimizer_.param_groups:
                group["lr"] = learning_rate_at(config, step)
            first = step * config.batch_size + rank * size
            batch = crops.batch(range(first, first + size), config.seed)
            loss = wrapped(batch.means, batch.keys, config.step_range, config.dithered)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(net.parameters(), 1e3)
            steps.take(loss.detach())
            step, seen = step + 1, seen + config.batch_size
            bar.update()
            last, saving = step == config.steps, step % config.save_every == 0
            heard = last or saving or is_heard(accelerator.device, step)
            agreed = agree(accelerator, interrupts) if heard else None
            if step % config.log_every == 0:
                mean = torch.as_tensor(accelerator.reduce(loss.detach(), "mean")).item()
                speed = seen / (time.monotonic() - started)
                values = {"bits_per_position": mean, "grad_norm": float(norm or 0), "images_per_s": speed}
                log.write("train", step, values | {"learning_rate": learning_rate_at(config, step - 1)})
                started, seen = time.monotonic(), 0
            if accelerator.is_main_process and (saving or last or agreed):
                _save(checkpoint, net, optimizer, described, step)
            if agreed and not last:
                accelerator.print(f"stopped at step {step} of {config.steps}; the same command goes on from here")
                accelerator.end_training()
                return 128 + agreed.signal if agreed.signal else 0
    if accelerator.is_main_process:
        codec.priors = codec.priors._replace(feedback=feedback)
        _finish(run, codec, net, crops, log, described)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def make_net(
    context: ContextConfig, channel_steps: np.ndarray, statistics: LatentStatistics, start_from: Path | None
) -> ContextNet:
    """A context prior with random weights, or those of `start_from`; raises `UserError` if that has none that fit."""
    if start_from is None:
        return ContextNet(context, channel_steps, statistics)
    try:
        if not start_from.is_dir():
            priors = Codec.load(start_from).priors
            if priors is None or priors.context is None:
                raise UserError(f"--start-from {start_from}: a model without a context prior")
            net = ContextNet(context, channel_steps, statistics, priors.context.order)
            net.thaw(priors.context)
            return net
        files = sorted(start_from.glob("checkpoints/step-*/prior_ema.safetensors"))
        if not files:
            raise UserError(f"--start-from {start_from}: no checkpoint with a prior, as runs of a joint objective have")
        tensors = load_file(files[-1])
        order = tensors.pop("channels").numpy()
        net = ContextNet(context, channel_steps, statistics, order)
        tensor_files.check_state(net.state_dict(), tensors, str(files[-1]))
        net.load_state_dict(tensors)
    except ValueError as error:
        raise UserError(f"--start-from {start_from}: {error}") from error
    return net


def _measure_feedback(
    codec: Codec, crops: LatentCrops, config: PriorConfig, accelerator: Accelerator
) -> Feedback | None:
    """By the main process alone: one rounding would be enough to make another's differ."""
    found: list[Feedback | None] = [None]
    if config.feedback and accelerator.is_main_process:
        assert codec.priors is not None
        (places,) = (batch.means for batch in crops.batches(PLACES, PLACES, config.seed + 2))
        found = [measure(codec, places, codec.priors.channel_steps)]
    broadcast_object_list(found)
    return found[0]


def _check(run: Run, accelerator: Accelerator) -> None:
    config = run.config
    for name in ("batch_size", "count_images", "log_every", "save_every", "width"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.crop < 2 or config.crop % 2:
        raise UserError(f"crop is {config.crop}; it must be even and at least 2")
    if not 0 < config.step_range[0] <= config.step_range[1]:
        raise UserError(f"step_range is {config.step_range}; it must be two positive steps, the smaller one first")
    if not 0 <= config.dithered <= 1:
        raise UserError(f"dithered is {config.dithered}; it is a share, 0 to 1")
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size {config.batch_size} cannot be split over {accelerator.num_processes} processes; "
            "make it a multiple"
        )


def _save(path: Path, net: ContextNet, optimizer: torch.optim.Optimizer, described: dict[str, Any], step: int) -> None:
    """One file, replaced by one rename: a crash leaves the one before."""
    tensors = {f"net/{name}": t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    tensors |= {f"optimizer/{name}": t for name, t in optimizer_tensors(optimizer, net).items()}
    tensor_files.save_tensors(path, tensors, {tensor_files.KEY: dumps(described | {"step": step})})


def _restore(path: Path, net: ContextNet, optimizer: torch.optim.Optimizer, described: dict[str, Any]) -> int:
    """Load the checkpoint in place if there is one, and return its step; raises `UserError` if it is another run's."""
    if not path.exists():
        return 0
    found = json.loads(tensor_files.own_metadata(path))
    step = found.pop("step")
    changed = [k for k in sorted(found.keys() | described.keys()) if found.get(k) != described.get(k)]
    if changed := [k for k in changed if k not in _MAY_CHANGE]:
        raise UserError(
            f"{path.parent} is a run with other settings ({', '.join(changed)}); give its own, or another --out"
        )
    tensors = load_file(path)
    net.load_state_dict({k.removeprefix("net/"): t for k, t in tensors.items() if k.startswith("net/")})
    moments = {k.removeprefix("optimizer/"): t for k, t in tensors.items() if k.startswith("optimizer/")}
    load_optimizer(optimizer, net, moments)
    return step


_MAY_CHANGE = {"config.steps", "config.log_every", "config.save_every", "config.count_images"}


@torch.no_grad()
def _finish(
    run: Run, codec: Codec, net: ContextNet, crops: LatentCrops, log: RunLog, described: dict[str, Any]
) -> None:
    """Freeze the prior, count its tables on training latents, measure it, and write the model."""
    config, device = run.config, crops.packed.device
    net.eval()
    assert codec.priors is not None
    start, coded = logistic_tables(), []
    for batch in crops.batches(config.count_images, config.batch_size, config.seed + 1):
        drawn = net.draw(batch.means, batch.keys, config.step_range, config.dithered)
        for coding in quantize(
            net.freeze(start), _scaled(net, drawn), str(device), codec.priors.feedback
        ):  # exact on every device
            coded += coding.passes
    tables = counted_tables(start, *(np.concatenate(part) for part in zip(*coded, strict=True)))
    codec.priors = codec.priors._replace(context=net.freeze(tables))
    if run.val:
        held_out = LatentCrops(run.val, crops.model_id, config.crop, device)
        for step in _MEASURED:
            log.write("eval", config.steps, _measure(net, codec.priors, held_out, step, config))
    codec.provenance = codec.provenance | {"prior": described | {"git_commit": git_commit()}}
    path = run.out / PRIOR_RUN_MODEL
    codec.save(path, half=_is_half(resolve(run.model)))
    Codec.load(path)
    tqdm.write(f"wrote {path}")


_MEASURED = (1.0, 1.4, 2.0, 4.0)


def _measure(
    net: ContextNet, priors: Priors, held_out: LatentCrops, step: float, config: PriorConfig
) -> dict[str, float]:
    """Ideal code lengths at one step, rounded means, in bits per latent position."""
    total = {"float": 0.0, "context": 0.0, "factorized": 0.0}
    for batch in held_out.batches(len(held_out), config.batch_size, config.seed):
        drawn = net.draw(batch.means, batch.keys, (step, step), 0.0)
        total["float"] += net.code(drawn).bits.sum().item() * config.crop**2
        for kind in ("context", "factorized"):
            prior = priors.choose(kind)
            codings = quantize(prior, _scaled(net, drawn), str(held_out.packed.device), priors.feedback)
            total[kind] += sum(ideal_bits(prior, coding.passes) for coding in codings)
    values = {f"{name}_bits": bits / len(held_out) / config.crop**2 for name, bits in total.items()}
    return {"step": step} | values | {"saved": 1 - total["context"] / total["factorized"]}


def _scaled(net: ContextNet, drawn: Drawn) -> list[Scaled]:
    """A batch as the bitstream takes it, channels in the model's order."""
    latents = np.empty(drawn.scaled.shape, np.float64)
    latents[:, net.order] = drawn.scaled.cpu().numpy()
    steps, dithered = drawn.step.tolist(), drawn.dithered.tolist()
    seeds = [seed % 2**64 if d else None for seed, d in zip(drawn.seeds.tolist(), dithered, strict=True)]
    return [Scaled(own, s, seed) for own, s, seed in zip(latents, steps, seeds, strict=True)]


def _is_half(path: Path) -> bool:
    """Whether a model file stores float16."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith(PREFIX)]  # noqa: SIM118
        return file.get_slice(names[0]).get_dtype() == "F16"


if __name__ == "__main__":
    main()
