"""Claim a folder for one run: check its processes, and compare its settings and data with those of an earlier start."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from latent_codec.errors import UserError
from latent_codec.folders.resume.locks import try_lock
from latent_codec.storage.files import make_folder, write_text
from latent_codec.storage.json_config import from_json, loads, to_json
from latent_codec.version import __version__
from train.config.common import LoopConfig, flat
from train.loop.checkpoints import Progress
from train.loop.provenance import git_commit
from train.loop.session import Session, once

LOCK = "run.lock"
"""File in a run's folder that the process which trains there holds locked."""

_MAY_CHANGE = {
    *("steps", "log_every", "eval_every", "eval_crop", "save_every", "keep_checkpoints", "max_skipped"),
    "count_images",
}


def check_processes(config: LoopConfig, log_with: tuple[str, ...], accelerator: Accelerator) -> None:
    """Raise `UserError` if a batch cannot be split over the processes, or for what Accelerate cannot do."""
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


def check_same_step(accelerator: Accelerator, progress: Progress) -> None:
    """Raise `UserError` if processes found checkpoints of different steps: they would wait for one another for ever."""
    steps = torch.as_tensor(accelerator.gather(torch.tensor([progress.step], device=accelerator.device))).tolist()
    if len(set(steps)) > 1:
        raise UserError(f"the processes found checkpoints of steps {steps}; --out must be on a shared file system")


def claim(out: Path, config: Any, described: dict[str, Any], session: Session, *, same: tuple[str, ...] = ()) -> None:
    """Lock RUN and write RUN/config.json on the main process; raises `UserError` on all if the folder is in use or
    holds another run: the "data_sha256" in `described` and the values named by `same` must not change."""
    path = out / "config.json"

    def write() -> None:
        make_folder(out)
        if (held := try_lock(out / LOCK)) is None:
            raise UserError(f"{out}: another process trains there; wait for its end, or give another --out")
        session.held.callback(held.release)
        if path.exists():
            _check_same_run(path, config, described, same)
        version = {"version": __version__, "git_commit": git_commit()}
        write_text(path, json.dumps({"config": to_json(config)} | described | version, indent=1))

    once(session.accelerator, write)


def _check_same_run(path: Path, config: Any, described: dict[str, Any], same: tuple[str, ...]) -> None:
    try:
        found = loads(path.read_text(encoding="utf-8"))
        old, data = flat(to_json(from_json(type(config), found["config"]))), found["data_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run of this version ({error}); give another --out") from error
    new = flat(to_json(config))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in _MAY_CHANGE]
    changed += [k for k in same if found.get(k) != described[k]]
    if changed:
        raise UserError(
            f"{path.parent} is a run with other settings ({', '.join(changed)}); give its own, or another --out"
        )
    if data != described["data_sha256"]:
        raise UserError(f"{path.parent} was trained on other data; give its own, or another --out")
