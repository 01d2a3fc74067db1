"""Train a latent diffusion model: `accelerate launch -m train.diffusion PRESET --latents DIR --out RUN [overrides]`.

`python -m train.diffusion ...` runs one process. DIR was written by `latent-codec encode --format safetensors`; its
first folders are the classes. The same command resumes a run. Precision and the number of processes come from
Accelerate.
"""

import copy
import dataclasses
import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed

from latent_codec.diffusion.config import LatentSpace
from latent_codec.diffusion.model import Diffusion
from latent_codec.diffusion.sampling import SampleId, check_codec, draw_latents
from latent_codec.errors import UserError
from latent_codec.images.write import write_grid
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import check_model
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, text_key
from latent_codec.storage.json_config import dumps, to_json
from train.config.diffusion import PRESETS, DiffusionConfig, check_diffusion
from train.data.crops import Draw
from train.data.latents import PosteriorCrops
from train.loop.claim import check_processes, claim
from train.loop.program import RunOptions, main_of, run_of_preset
from train.loop.session import Session, begin
from train.loop.trainer import Task, TrainedModules, Trainer
from train.objectives.flow import FlowMatching

_DRAWS = 4  # of each held-out image at an evaluation
_COLUMNS, _SAMPLING_STEPS, _GUIDANCE = 8, 25, 2.0  # of the grids


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRun(RunOptions):
    """Hold the options of one run."""

    latents: Path
    """A folder of latents, each at least as large as the transformer's `size`, to which they are cropped."""
    val: Path | None = None
    """Latents of validation images by the same model. Without them, `val_images` are held out."""
    val_images: int = 256
    """Number of validation images."""
    codec: str | None = None
    """The model that made the latents, to draw pictures at each evaluation."""
    workers: int = 2
    """Worker processes that read latents."""
    config: tyro.conf.OmitArgPrefixes[DiffusionConfig]


def main() -> None:
    """Run the command line."""
    run = partial(DiffusionRun, latents=tyro.MISSING, out=tyro.MISSING)
    main_of("train.diffusion", lambda: train(run_of_preset("train.diffusion", __doc__, PRESETS, run)))


def train(run: DiffusionRun) -> int:
    """Train to the end, a signal or the time limit; return the exit code, 0 or 128 + the signal's number.
    Raises `UserError` for options, latents or a run's folder that cannot be used."""
    with begin(run) as session:
        return _train(run, session)


def _train(run: DiffusionRun, session: Session) -> int:
    config, (accelerator, interrupts, _) = run.config, session
    check_diffusion(config)
    check_processes(config, run.log_with, accelerator)
    data = open_latents(run)
    described = describe_data(run, data)
    claim(run.out, config, described, session)

    set_seed(config.seed)  # for initial weights; all later randomness is a hash of counters
    model = Diffusion(config.transformer, data.space)
    model.provenance = {"training": {"config": to_json(config)} | described}
    ema = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
    objective = FlowMatching(config.objective, model).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    trained = TrainedModules(objective=objective, modules={"diffusion": model, "ema": ema}, optimizer=optimizer)
    trainer = Trainer(config, run, accelerator, trained)
    trainer.prepare(described)
    plan = trainer.plan(config.transformer.size)
    held_out = PosteriorCrops(data.held, data.held_rows, plan.crop, plan)
    task = DiffusionTask(run, ema, held_out, accelerator)
    batch = f"{config.batch_size} latents of {' x '.join(map(str, model.shape))} per step"
    trainer.announce(f"{len(data.rows)} images of {len(data.space.classes)} classes", batch)
    crops = PosteriorCrops(data.latents, data.rows, plan.crop, plan)
    batches = crops.batches(trainer.progress.step, config.steps, run.workers, accelerator.device)
    code = trainer.loop(task, batches, interrupts)
    accelerator.end_training()
    return code


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentData:
    """Hold the latents to train on and those held out."""

    latents: Latents
    rows: list[int]
    """Numbers of the images to train on, in the order of their paths."""
    held: Latents
    held_rows: list[int]
    """Numbers of the held-out images in `held`."""
    space: LatentSpace


def open_latents(run: DiffusionRun) -> LatentData:
    """Open the latents of a run; without --val, images whose names hash lowest are held out.
    Raises `UserError` for latents that cannot be trained on."""
    if run.val_images < 1 or run.workers < 0:
        raise UserError(f"val_images {run.val_images} must be at least 1, and workers {run.workers} at least 0")
    config = run.config
    latents = Latents(run.latents, seed=config.seed, flip=config.flip)
    statistics = latents.header.statistics
    if statistics is None:
        raise UserError(
            f"{run.latents}: the model had no latent statistics to normalise by; export it with `latent-codec export "
            "--data` and encode again"
        )
    held = latents if run.val is None else Latents(run.val)
    check_model(held.header, latents.header.model_id, str(run.val))
    if held.header.channels != latents.header.channels:
        found, wanted = (one.header.channels or "all" for one in (held, latents))
        raise UserError(
            f"{run.val}: holds {found} channels of its model, and {run.latents} {wanted}; encode it likewise"
        )
    rows, held_rows = (_large_enough(one, config.transformer.size) for one in (latents, held))
    held_rows = sorted(held_rows, key=lambda i: text_key(held.entries[i].path))[: run.val_images]
    if run.val is None:
        rows = [i for i in rows if i not in set(held_rows)]
    if not rows or not held_rows:
        raise UserError(f"{len(rows)} images to train on and {len(held_rows)} held out; lower --val-images or --size")
    space = LatentSpace(
        codec_id=latents.header.model_id,
        factor=latents.header.factor,
        mean=statistics.mean,
        std=statistics.std,
        classes=latents.classes,
    )
    return LatentData(latents=latents, rows=rows, held=held, held_rows=held_rows, space=space)


def _large_enough(latents: Latents, size: int) -> list[int]:
    rows = [i for i, shape in enumerate(latents.shapes) if min(shape) >= size]
    if small := len(latents) - len(rows):
        logging.warning("%s: %d images with latents below %dx%d are left out", latents.folder, small, size, size)
    return rows


def describe_data(run: DiffusionRun, data: LatentData) -> dict[str, Any]:
    """Return the record of what the run is trained on."""
    digest = hashlib.sha256(dumps(to_json(data.space)).encode())
    for i in data.rows:
        digest.update(dumps([data.latents.entries[i].path, data.latents.entries[i].sha256]).encode())
    return {"data_sha256": digest.hexdigest(), "data_images": len(data.rows), "data": [run.latents.name]}


class DiffusionTask(Task):
    """Evaluate a diffusion model, and log its losses."""

    def __init__(self, run: DiffusionRun, ema: Diffusion, held_out: PosteriorCrops, accelerator: Accelerator) -> None:
        """Load the codec for pictures, if there is one; raises `UserError` if another one made the latents."""
        self.out, self.ema, self.crops, self.device = run.out, ema, held_out, accelerator.device
        self.flow = FlowMatching(dataclasses.replace(run.config.objective, label_dropout=0.0), ema)
        self.codec = None if run.codec is None else Codec.load(run.codec, self.device)
        if self.codec is not None:
            check_codec(ema, self.codec)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Return the loss on held-out latents, always at the same times and noise; with a codec, draw a grid."""
        paths = [self.crops.latents.entries[i].path for i in self.crops.rows]
        errors: list[torch.Tensor] = []
        for number in range(_DRAWS):
            keys = torch.stack([fold(text_key(path), number) for path in paths])
            for rows, some in zip(torch.tensor(self.crops.rows).split(64), keys.split(64), strict=True):
                batch = self.crops.crops(Draw(rows, some), [0] * len(rows))
                losses = self.flow(*(t.to(self.device) for t in batch))
                errors += [losses.loss] * len(rows)
        if self.codec is not None:
            classes = range(len(self.ema.latents.classes)) or [-1]
            wanted = [SampleId(label, number) for label in [*classes][:16] for number in range(_COLUMNS)]
            z = [
                draw_latents(self.ema, wanted[first : first + 64], seed=0, steps=_SAMPLING_STEPS, guidance=_GUIDANCE)
                for first in range(0, len(wanted), 64)
            ]
            pixels = torch.cat([self.codec.decode_uint8(part) for part in z])
            write_grid(self.out / "grids" / f"step-{step:08d}.png", pixels, _COLUMNS)
        return {"loss": torch.stack(errors).mean().item()}


if __name__ == "__main__":
    main()
