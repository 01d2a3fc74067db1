"""Train a latent diffusion model: `accelerate launch -m train.diffusion PRESET --latents DIR --out RUN [overrides]`.

`python -m train.diffusion ...` runs one process. DIR is of `latent-codec encode --format safetensors`; its first
folders are the classes. Rerunning the same command resumes. Precision and the number of processes come from Accelerate.
"""

import copy
import dataclasses
import hashlib
import logging
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
from train.config.common import flat
from train.config.diffusion import PRESETS, DiffusionConfig, check_diffusion
from train.data.crops import Draw, SamplePlan
from train.data.latents import PosteriorCrops
from train.loop import checkpoints
from train.loop.interrupts import Interrupts
from train.loop.logs import RunLog
from train.loop.program import main_of, run_of_preset
from train.loop.run_setup import check_processes, check_same_step, claim
from train.loop.trainer import Trainer
from train.objectives.flow import FlowLosses, FlowMatching


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRun:
    latents: Path
    """A folder of latents; all of them at least as large as the transformer's `size`, of which squares are cut."""
    out: Path
    """The run's folder: checkpoints, log.jsonl, grids. An existing run is resumed."""
    val: Path | None = None
    """Latents of validation images by the same model; without it, `val_images` are held out."""
    val_images: int = 256
    codec: str | None = None
    """The model that made the latents, to draw pictures at each evaluation."""
    workers: int = 2
    """Worker processes that read latents."""
    max_minutes: float | None = None
    """End cleanly with a checkpoint after this many minutes; the same command goes on."""
    log_with: tuple[str, ...] = ()
    """Accelerate trackers besides log.jsonl: tensorboard, wandb ..."""
    config: tyro.conf.OmitArgPrefixes[DiffusionConfig]


def main() -> None:
    def work() -> int:
        def run(config: DiffusionConfig) -> DiffusionRun:
            return DiffusionRun(latents=tyro.MISSING, out=tyro.MISSING, config=config)

        return train(run_of_preset("train.diffusion", __doc__, PRESETS, run))

    main_of("train.diffusion", work)


def train(run: DiffusionRun) -> int:
    """Run to the end, a signal or the time limit; returns the exit code (0, or 128 + the signal's number)."""
    accelerator = Accelerator(log_with=list(run.log_with) or None, project_dir=str(run.out))
    config, interrupts = run.config, Interrupts(run.max_minutes)  # the time runs from here
    accelerator.wait_for_everyone()  # a process that finds a mistake before the others have connected would strand them
    check_diffusion(config)
    check_processes(config, run.log_with, accelerator)
    data = open_latents(run)
    described = describe(run, data)
    claim(run.out, config, described, accelerator)

    set_seed(config.seed)  # initial weights; all later randomness is counted, not drawn from a state
    model = Diffusion(config.transformer, data.space)
    model.provenance = {"training": {"config": to_json(config)} | described}
    ema = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
    objective = FlowMatching(config.objective, model).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    modules = {"diffusion": model, "ema": ema}
    progress = checkpoints.restore(run.out / "checkpoints", modules, optimizer)
    check_same_step(accelerator, progress)
    if config.compile:
        objective.compile()
    # Everything is in its place; Accelerate would move a resumed Adam's step counts to the GPU, one wait for each.
    wrapped, optimizer_ = accelerator.prepare(objective, optimizer, device_placement=[True, False])
    if accelerator.scaler is not None and progress.scaler:
        accelerator.scaler.load_state_dict(progress.scaler)
    if run.log_with:
        accelerator.init_trackers(run.out.name, flat(to_json(config) | described))

    plan = SamplePlan(
        seed=config.seed,
        crop=config.transformer.size,
        flip=False,
        batch_size=config.batch_size,
        micro_batches=config.accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    crops = PosteriorCrops(data.latents, data.rows, config.transformer.size, plan)
    task = DiffusionTask(run, ema, data, plan, accelerator.device)
    log = RunLog(run.out / "log.jsonl", accelerator, progress.step)
    trainer = Trainer(config, run.out, accelerator, wrapped, modules, optimizer_, progress, task, log)
    accelerator.print(
        f"{len(data.rows)} images of {len(data.space.classes)} classes; {accelerator.num_processes} process(es) on "
        f"{accelerator.device}, precision {accelerator.mixed_precision}; {config.batch_size} latents of "
        f"{' x '.join(map(str, model.shape))} per step; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
        f"parameters; from step {progress.step} to {config.steps}"
    )
    with interrupts:
        batches = crops.batches(progress.step, config.steps, run.workers, accelerator.device)
        code = trainer.loop(batches, interrupts, quiet=not accelerator.is_main_process)
    accelerator.end_training()
    return code


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentData:
    """What is trained on and what is held out."""

    latents: Latents
    rows: list[int]
    """Numbers of the images to train on, in the order of their paths."""
    held: Latents
    held_rows: list[int]
    space: LatentSpace


def open_latents(run: DiffusionRun) -> LatentData:
    """Raises `UserError` for latents that cannot be trained on; held out without --val are names that hash lowest."""
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


def describe(run: DiffusionRun, data: LatentData) -> dict[str, Any]:
    """What the run was trained on, for the record; compared when it is resumed."""
    digest = hashlib.sha256(dumps(to_json(data.space)).encode())
    for i in data.rows:
        digest.update(dumps([data.latents.entries[i].path, data.latents.entries[i].sha256]).encode())
    return {"data_sha256": digest.hexdigest(), "data_images": len(data.rows), "data": [run.latents.name]}


_TIMES = 4  # draws of each held-out image
_COLUMNS, _STEPS, _GUIDANCE = 8, 25, 2.0  # of the pictures


class DiffusionTask:
    """What `Trainer` leaves to a diffusion model. Raises `UserError` for a codec that did not make the latents."""

    def __init__(
        self, run: DiffusionRun, ema: Diffusion, data: LatentData, plan: SamplePlan, device: torch.device
    ) -> None:
        self.out, self.ema, self.device = run.out, ema, device
        self.crops = PosteriorCrops(data.held, data.held_rows, run.config.transformer.size, plan)
        self.flow = FlowMatching(dataclasses.replace(run.config.objective, label_dropout=0.0), ema)
        self.codec = None if run.codec is None else Codec.load(run.codec, device)
        if self.codec is not None:
            check_codec(ema, self.codec)

    def arguments(self, step: int, measure: bool) -> tuple[()]:
        return ()

    def values(self, losses: FlowLosses, step: int) -> dict[str, float]:
        return losses.values()

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """The flow's error on held-out latents, always at the same times and noise; a grid if there is a codec."""
        paths = [self.crops.latents.entries[i].path for i in self.crops.rows]
        errors: list[torch.Tensor] = []
        for number in range(_TIMES):
            keys = torch.stack([fold(text_key(path), number) for path in paths])
            for rows, some in zip(torch.tensor(self.crops.rows).split(64), keys.split(64), strict=True):
                batch = self.crops.crops(Draw(rows, some), [0] * len(rows))
                losses = self.flow(*(t.to(self.device) for t in batch))
                errors += [losses.loss] * len(rows)
        if self.codec is not None:
            classes = range(len(self.ema.latents.classes)) or [-1]
            wanted = [SampleId(label, number) for label in [*classes][:16] for number in range(_COLUMNS)]
            z = [
                draw_latents(self.ema, wanted[first : first + 64], seed=0, steps=_STEPS, guidance=_GUIDANCE)
                for first in range(0, len(wanted), 64)
            ]
            pixels = torch.cat([self.codec.decode_uint8(part) for part in z])
            write_grid(self.out / "grids" / f"step-{step:08d}.png", pixels, _COLUMNS)
        return {"loss": torch.stack(errors).mean().item()}


if __name__ == "__main__":
    main()
