"""Initialise a linear path in closed form from patch moments, or a decoder from the mean image."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from einops import rearrange
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.folders.workers import Threads
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import Source
from latent_codec.model.bottlenecks import DiagonalGaussianBottleneck
from latent_codec.model.codec import Codec
from latent_codec.model.likelihoods import Bernoulli, Gaussian
from latent_codec.model.networks import LinearBackbone, LiteBackbone, MLPBackbone
from latent_codec.model.networks.linear import PatchMoments
from latent_codec.precision import in_float64
from train.data.crops import Batches, SamplePlan, read_or_report

_READERS = 4  # threads, which read ahead twice as many images


def patch_moments(images: Batches, plan: SamplePlan, codec: Codec, steps: int, *, quiet: bool) -> PatchMoments:
    """Return the moments of the non-overlapping patches of `steps` batches of crops."""
    batches = tqdm(images.batches(plan, 0, steps), "patch moments", steps, disable=quiet or None)
    return _moments((batch.pixels.cpu() for batch in batches), codec)


def all_patch_moments(
    sources: Sequence[Source], codec: Codec, *, quiet: bool, read: ReadOptions = ReadOptions()
) -> PatchMoments:
    """Return the moments of the whole patches of all readable images, which are read one by one; partial patches on the
    right and at the bottom are ignored. Raises `UserError` if there is no patch."""
    p = codec.factor

    def whole(source: Source) -> torch.Tensor | None:
        pixels = read_or_report(source, codec.config.image_channels, read)
        return None if pixels is None else pixels[:, : pixels.shape[1] // p * p, : pixels.shape[2] // p * p]

    with Threads(_READERS) as threads:
        found = (future.result() for _, future in threads.map(whole, sources))
        images = (x[None] for x in tqdm(found, "patch moments", len(sources), disable=quiet or None) if x is not None)
        return _moments((x for x in images if x.numel()), codec)


def _moments(batches: Iterable[torch.Tensor], codec: Codec) -> PatchMoments:
    """Return the moments of the patches of uint8 pixels (b, c, h, w), summed in float64."""
    p, channels = codec.factor, codec.config.image_channels
    total, outer, count = torch.zeros(()), torch.zeros(()), 0
    rows = (rearrange(x, "b c (h p) (w q) -> (b h w) (c p q)", p=p, q=p) for x in batches)
    for patches in _together(rows, channels * p * p):
        patches = in_float64(codec.likelihood.from_uint8(patches))  # (n, d)
        total, outer = total + patches.sum(0), outer + patches.T @ patches
        count += len(patches)
    if count == 0:
        raise UserError(f"no image holds a whole patch of {p}x{p} pixels; give larger images")
    mean = rearrange(total / count, "(c d) -> c d", c=channels).mean(1)
    return PatchMoments(mean, covariance_around(mean.repeat_interleave(p * p), total / count, outer / count))


def covariance_around(center: torch.Tensor, average: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Return E[(x - center) (x - center)'] (d, d) from the averages of x (d,) and of x x' (d, d)."""
    return square - torch.outer(center, average) - torch.outer(average, center) + torch.outer(center, center)


def _together(parts: Iterable[torch.Tensor], least: int) -> Iterator[torch.Tensor]:
    """Concatenate neighbouring parts to `least` rows or more, because products of few rows are slow."""
    waiting: list[torch.Tensor] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= least:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def mean_pixels(images: Batches, plan: SamplePlan, count: int) -> torch.Tensor:
    """Return the average crop (c, crop, crop) float64 in 0..1 over whole batches of at least `count` samples."""
    total, seen = torch.zeros((), dtype=torch.float64), 0
    for batch in images.batches(plan, 0, math.ceil(count / plan.batch_size)):
        total, seen = total + batch.pixels.cpu().double().sum(0), seen + len(batch.pixels)
    return total / (255 * seen)


def check_mean_start(codec: Codec) -> None:
    """Raise `UserError` unless the model can start from the mean image."""
    if not (isinstance(codec.backbone, MLPBackbone) and isinstance(codec.likelihood, Bernoulli)):
        found = f"{codec.config.backbone.kind} and {codec.config.likelihood.kind}"
        raise UserError(
            f"mean_start needs an mlp backbone and a bernoulli likelihood, not {found}: set --no-mean-start"
        )


def start_from_mean(codec: Codec, mean: torch.Tensor) -> None:
    """Initialise the decoder of an `mlp` with the mean image (c, side, side) in 0..1; raises as `check_mean_start`."""
    check_mean_start(codec)
    assert isinstance(codec.backbone, MLPBackbone)
    codec.backbone.start_from_bias(torch.logit(mean, eps=1e-3).float())  # finite where a pixel is always black


def check_closed_form(codec: Codec) -> None:
    """Raise `UserError` unless the model can start from the closed form."""
    if not isinstance(codec.likelihood, Gaussian):
        kind = codec.config.likelihood.kind
        raise UserError(f"closed_form needs a gaussian likelihood, not {kind}: set --no-closed-form")
    if not isinstance(codec.backbone, LinearBackbone | LiteBackbone):
        kind = codec.config.backbone.kind
        raise UserError(f"closed_form needs a backbone with a linear path, not {kind}: set --no-closed-form")


def start_from_closed_form(codec: Codec, moments: PatchMoments) -> None:
    """Initialise the codec's linear path from patch moments; raises as `check_closed_form`."""
    check_closed_form(codec)
    path = codec.backbone.linear if isinstance(codec.backbone, LiteBackbone) else codec.backbone
    assert isinstance(codec.likelihood, Gaussian) and isinstance(path, LinearBackbone)
    if codec.config.bottleneck.kind in ("identity", "vq"):  # no posterior that would scale latents
        path.start_from_components(moments)
    else:
        logvar = path.start_from_closed_form(moments, float(codec.likelihood.sigma.detach()))
        if isinstance(codec.bottleneck, DiagonalGaussianBottleneck) and codec.bottleneck.logvar is not None:
            codec.bottleneck.logvar.data = logvar[-len(codec.bottleneck.logvar) :].float()
