"""Export a training run or a model as one model file with latent statistics and provenance."""

import logging
from pathlib import Path

from latent_codec.errors import UserError
from latent_codec.images.sources import find_all
from latent_codec.inference.calibration import calibrate
from latent_codec.model.codec import Codec
from latent_codec.model.file import check_destination
from latent_codec.model.shipped import resolve
from latent_codec.storage.files import make_folder
from latent_codec.storage.run_folder import PRIOR_RUN_MODEL, newest_checkpoint, provenance

log = logging.getLogger(__name__)


def export(run_or_model: Path, destination: Path, *, data: tuple[Path, ...], images: int, half: bool) -> Codec:
    """Write a model file from a run's newest checkpoint (averaged weights) or from a model, and read it back.

    A run of `train.prior` gives its model, with the context prior. The statistics, quantiser and factorised prior are
    measured on the first `images` images of `data`, which drops a context prior; without data a model keeps its own.
    `half` stores float16. Raises `UserError` if there are neither, or the run, the model or an image cannot be read, or
    for a destination that is there and no model file.
    """
    check_destination(destination)
    make_folder(destination.parent)
    codec = prepare(run_or_model, data=data, images=images)
    codec.save(destination, half=half)
    return Codec.load(destination)


def prepare(run_or_model: Path, *, data: tuple[Path, ...], images: int) -> Codec:
    """Return the codec that `export` writes; raises as it does."""
    if images < 1:
        raise UserError(f"statistics cannot be measured on {images} images; give at least 1")
    if (run_or_model / PRIOR_RUN_MODEL).is_file():
        codec = Codec.load(run_or_model / PRIOR_RUN_MODEL)
    elif run_or_model.is_dir():
        checkpoint = newest_checkpoint(run_or_model)
        codec = Codec.load(checkpoint / "ema.safetensors")
        codec.provenance = provenance(run_or_model, checkpoint) | codec.provenance
    else:
        codec = Codec.load(resolve(run_or_model))
    if data:
        sources = find_all(data)[:images]
        where = ", ".join(p.name or str(p) for p in data)
        if codec.priors is not None and codec.priors.context is not None:
            log.warning("%s: its context prior is dropped, because the quantiser is measured anew", run_or_model)
        calibrate(codec, sources, f"first {len(sources)} images of {where}", quiet=False)
    elif codec.statistics is None:
        raise UserError(f"{run_or_model}: has no latent statistics yet; name images to measure them on with --data")
    return codec
