"""A run as the command line gives it: what is checked before work, and the folder's claim to be one run."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from latent_codec.errors import UserError
from latent_codec.images.sources import Source, find_all
from latent_codec.model.codec import Codec
from latent_codec.noise import text_key
from latent_codec.storage.files import make_folder, write_text
from latent_codec.storage.json_config import from_json, to_json
from latent_codec.version import __version__
from train.config.common import flat
from train.config.prior import context_groups, context_levels, context_spacing
from train.config.vae import ELBOConfig, JointConfig, TrainConfig, check
from train.data.crops import fingerprint
from train.init.closed_form import check_closed_form, check_mean_start
from train.loop.checkpoints import Progress
from train.loop.provenance import git_commit

_MAY_CHANGE = {"steps", "log_every", "eval_every", "eval_crop", "save_every", "keep_checkpoints", "max_skipped"}


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
    start_from: str | None = None
    """A model (a file or a shipped one's name) whose weights a new run starts from, in place of the closed form."""
    max_minutes: float | None = None
    """End cleanly with a checkpoint after this many minutes; the same command goes on."""
    log_with: tuple[str, ...] = ()
    """Accelerate trackers besides log.jsonl: tensorboard, wandb ..."""
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""
    config: tyro.conf.OmitArgPrefixes[TrainConfig]


class SharedConfig(Protocol):
    """What every program's configuration has of these."""

    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...


def check_processes(config: SharedConfig, log_with: tuple[str, ...], accelerator: Accelerator) -> None:
    """Raise `UserError` if the batch cannot be shared out, or for what Accelerate was told but cannot do."""
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} cannot be split over {accelerator.num_processes} processes x "
            f"{config.accumulation} micro-batches; make it a multiple of {parts}"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("set gradient accumulation with --accumulation, not in accelerate's configuration")
    if "all" not in log_with and len(accelerator.log_with) < len(set(log_with)):
        installed = ", ".join(str(tracker) for tracker in accelerator.log_with) or "none"
        raise UserError(f"log_with {' '.join(log_with)}: of these trackers {installed} can be imported; install it")
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError(f"fp16 needs a GPU, not {accelerator.device}: choose bf16, or no mixed precision")


def check_run(run: Run, accelerator: Accelerator) -> None:
    config = run.config
    check(config)
    check_processes(config, run.log_with, accelerator)
    if isinstance(config.objective, JointConfig) and run.start_from is None:
        raise UserError("a joint phase begins with a model that has a quantiser: name it with --start-from")
    adversarial = isinstance(config.objective, ELBOConfig) and config.objective.adversarial is not None
    if adversarial and accelerator.mixed_precision == "fp16":
        raise UserError("fp16 is too coarse for the gradients of an adversary's adaptive weight: choose bf16")
    codec = Codec(config.codec)
    if config.codec.image_channels not in (1, 3):
        raise UserError(f"image_channels is {config.codec.image_channels}; set it to 1 (grey) or 3 (RGB)")
    unit, why = codec.factor, "the model's factor"
    if isinstance(joint := config.objective, JointConfig):
        groups = context_groups(joint.prior_groups, config.codec.latent_channels)
        unit *= context_spacing(context_levels(joint.prior_levels, groups))
        why += " times the spacing of its context prior's coarsest grid"
    for name, side in (("crop", config.crop), ("eval_crop", config.eval_crop)):
        if side % unit:
            raise UserError(f"{name} {side} is no multiple of {unit}, {why}")
    if config.closed_form:
        check_closed_form(codec)
    if config.mean_start:
        check_mean_start(codec)


def check_same_step(accelerator: Accelerator, progress: Progress) -> None:
    """Processes that see different checkpoints would wait for one another for ever."""
    steps = torch.as_tensor(accelerator.gather(torch.tensor([progress.step], device=accelerator.device))).tolist()
    if len(set(steps)) > 1:
        raise UserError(f"the processes found checkpoints of steps {steps}; --out must be on a shared file system")


def split(run: Run) -> tuple[list[Source], list[Source]]:
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


def labels_of(codec: Codec, sources: list[Source]) -> torch.Tensor:
    """The numbers (n,) int64 of the sources' classes; raises `UserError`, with the image, for one of no known class."""
    labels = []
    for source in sources:
        try:
            labels.append(codec.class_numbers([source.label]))
        except UserError as error:
            raise UserError(f"{source.name}: {error}, or name the folders with --classes") from error
    return torch.cat(labels)


def describe(run: Run, sources: list[Source]) -> dict[str, object]:
    """What the run was trained on, for the record; compared when it is resumed."""
    return {
        "data_sha256": fingerprint(sources),
        "data_images": len(sources),
        "data": sorted(p.name for p in run.data),
        "start_from": None if run.start_from is None else Codec.load(run.start_from).model_id,
    }


def claim(out: Path, config: Any, described: dict[str, object], accelerator: Accelerator) -> None:
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


def _check_same_run(path: Path, config: Any, described: dict[str, object]) -> None:
    """Raise `UserError` if RUN/config.json tells of other settings, by their names, or of other data."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        old, data = flat(to_json(from_json(type(config), found["config"]))), found["data_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run of this version ({error}); give another --out") from error
    new = flat(to_json(config))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in _MAY_CHANGE]
    if changed:
        raise UserError(
            f"{path.parent} is a run with other settings ({', '.join(changed)}); give its own, or another --out"
        )
    if data != described["data_sha256"]:
        raise UserError(f"{path.parent} was trained on other data; give its own, or another --out")
