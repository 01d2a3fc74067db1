"""A finished run -> one model file with averaged weights, latent statistics and provenance."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from latent_codec import tiling
from latent_codec.bottlenecks import DiagonalGaussian, Posterior
from latent_codec.codebooks import Codes
from latent_codec.codec import Codec, resolve
from latent_codec.errors import UserError
from latent_codec.files import make_folder
from latent_codec.folders.run import check_channels
from latent_codec.images.geometry import pad
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.images.sources import Source, find_all
from latent_codec.modelfile import LatentStatistics
from latent_codec.prior import Priors, factorized
from latent_codec.quantizer import base_steps
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


_KEPT_POSITIONS = 2**12  # of each image, for the frequencies of quantised latents


@torch.inference_mode()
def calibrate(codec: Codec, sources: Iterable[Source], description: str, *, quiet: bool) -> None:
    """Set the codec's latent statistics, and its quantiser and factorised prior, from images.

    Moments are per channel over images and positions, accumulated in float64. Raises `UserError` for an image that
    cannot be read: the set is what its description says.
    """
    check_channels(codec)
    measured = _Measured(codec)
    for source in tqdm(list(sources), "latent statistics", unit="image", disable=quiet or None):
        pixels = source.read(max_pixels=DEFAULT_MAX_PIXELS).pixels
        labels = codec.class_numbers([source.label])
        measured.add(tiling.encode(codec, pad(pixels, codec.factor)[None], tiling.default_tile(codec), labels))
    codec.statistics = measured.statistics(description)
    codec.priors = measured.priors(codec.statistics)


class _Measured:
    """Sums per channel over images and positions in float64; how often each code of a codebook was taken."""

    def __init__(self, codec: Codec) -> None:
        self.positions, self.images, self.codes = 0, 0, codec.config.codes
        self.total, self.square, self.variance = torch.zeros(3, codec.config.latent_channels, dtype=torch.float64)
        self.taken = torch.zeros(self.codes or 0, dtype=torch.int64)
        self.kept: list[torch.Tensor] = []
        self.gaussian = True

    def add(self, posterior: Posterior) -> None:
        """One image's."""
        mean = posterior.mean[0].flatten(1).double()  # (z, h * w)
        self.total, self.square = self.total + mean.sum(1), self.square + mean.square().sum(1)
        self.gaussian = isinstance(posterior, DiagonalGaussian)
        if isinstance(posterior, DiagonalGaussian):
            self.variance = self.variance + posterior.logvar[0].flatten(1).double().exp().sum(1)
        if isinstance(posterior, Codes):
            self.taken += torch.bincount(posterior.indices.flatten(), minlength=posterior.codes)
        else:
            self.kept.append(mean[:, :: -(-mean.shape[1] // _KEPT_POSITIONS)].float())
        self.positions, self.images = self.positions + mean.shape[1], self.images + 1

    def statistics(self, description: str) -> LatentStatistics:
        mean, variance = self.total / self.positions, self.variance / self.positions
        spread = (self.square / self.positions - mean.square()).clamp(min=0)  # rounding may go below 0
        std = torch.sqrt(spread + variance)
        if not self.gaussian:
            std = std.clamp(min=1e-6)  # a channel that never changes can be scaled all the same
        return LatentStatistics(
            source=description,
            images=self.images,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            posterior_std=tuple(variance.sqrt().tolist()) if self.gaussian else None,
        )

    def priors(self, statistics: LatentStatistics) -> Priors:
        if self.codes is not None:
            return Priors(np.ones(1, np.float32), factorized.fit_codes(self.taken.numpy()), None)
        of_posterior = None if statistics.posterior_std is None else np.array(statistics.posterior_std)
        base = base_steps(np.array(statistics.std), of_posterior)
        return Priors(base, factorized.fit(torch.cat(self.kept, 1), base), None)


_ACTIVATION_IMAGES = 8


def calibration_images(codec: Codec, data: tuple[Path, ...], images: int) -> Iterator[torch.Tensor]:
    """The first few of the images that `prepare` measures on, (1, 3, h, w) uint8, padded as the codec takes them."""
    for source in find_all(data)[: min(images, _ACTIVATION_IMAGES)] if data else []:
        yield pad(source.read(max_pixels=DEFAULT_MAX_PIXELS).pixels, codec.factor)[None]


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
