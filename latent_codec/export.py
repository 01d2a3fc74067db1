"""A finished run -> one model file with averaged weights, latent statistics and provenance."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from latent_codec.codec import Codec, resolve
from latent_codec.errors import UserError
from latent_codec.files import make_folder
from latent_codec.images.sources import find_all
from latent_codec.inference.calibration import calibrate
from latent_codec.version import __version__

log = logging.getLogger(__name__)

PRIOR_RUN_MODEL = "model.safetensors"
"""What `train.prior` leaves in its folder."""


def export(
    run_or_model: Path,
    destination: Path,
    *,
    data: tuple[Path, ...],
    images: int,
    half: bool,
    quiet: bool = False,
) -> Codec:
    """Write a model file from a run's newest checkpoint (averaged weights), or from a model, and read it back.

    A run may also be one of `train.prior`: its model, with the context prior. Statistics, quantiser and factorised
    prior are measured on the first `images` images of `data`, which drops a context prior; without data a model keeps
    what it has. Raises `UserError` if there is neither, or if the run, the model or an image cannot be read.
    """
    if destination.is_dir():
        raise UserError(f"{destination}: is a folder; give the model file's name, such as {destination}.safetensors")
    make_folder(destination.parent)
    codec = prepare(run_or_model, data=data, images=images, quiet=quiet)
    codec.save(destination, half=half)
    return Codec.load(destination)


def prepare(run_or_model: Path, *, data: tuple[Path, ...], images: int, quiet: bool = False) -> Codec:
    """The codec that `export` writes; raises as it does."""
    if images < 1:
        raise UserError(f"statistics over {images} images are none; measure at least 1")
    if (run_or_model / PRIOR_RUN_MODEL).is_file():
        codec = Codec.load(run_or_model / PRIOR_RUN_MODEL)
    elif run_or_model.is_dir():
        checkpoint = newest_checkpoint(run_or_model)
        codec = Codec.load(checkpoint / "ema.safetensors")
        codec.provenance = _provenance(run_or_model, checkpoint) | codec.provenance
    else:
        codec = Codec.load(resolve(run_or_model))
    if data:
        sources = find_all(data)[:images]
        where = ", ".join(p.name or str(p) for p in data)
        if codec.priors is not None and codec.priors.context is not None:
            log.warning("%s: its context prior is dropped, for the quantiser is measured anew", run_or_model)
        calibrate(codec, sources, f"first {len(sources)} images of {where}", quiet=quiet)
    elif codec.statistics is None:
        raise UserError(f"{run_or_model}: has no latent statistics yet; name images to measure them on with --data")
    return codec


def newest_checkpoint(run: Path) -> Path:
    """The newest whose averaged weights match their checksum; older ones stand in for damaged ones, with a warning."""
    finished = sorted((run / "checkpoints").glob("step-*"))
    for path in reversed(finished):
        try:
            expected = json.loads((path / "state.json").read_text(encoding="utf-8"))["sha256"]["ema.safetensors"]
            if hashlib.sha256((path / "ema.safetensors").read_bytes()).hexdigest() == expected:
                return path
        except (OSError, ValueError, KeyError, TypeError):
            pass
        log.warning("passing over damaged checkpoint %s", path)
    if finished:
        raise UserError(f"{run}: all {len(finished)} checkpoints are damaged; resume or repeat the run")
    raise UserError(f"{run}: no finished checkpoint in it; a run's first one appears after save_every steps")


def _provenance(run: Path, checkpoint: Path) -> dict[str, Any]:
    """The run's configuration and what it was trained on, as its config.json says, and how far it came."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        about = json.loads((run / "config.json").read_text())
        if not (isinstance(about, dict) and about):
            raise ValueError("config.json is empty")
        progress = {key: state[key] for key in ("step", "skipped", "minutes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: config.json or state.json cannot be read ({error}); resume the run") from error
    return {"training": about, "progress": progress, "exported_by": f"latent_codec {__version__}"}
