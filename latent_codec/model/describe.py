"""Describe a model in words: its parts, size, FLOPs, latent statistics, priors and training."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from latent_codec.model.config import CodecConfig
from latent_codec.model.file import LatentStatistics, ModelFile
from latent_codec.model.parts import build
from latent_codec.prior.priors import Priors
from latent_codec.program import paragraph
from latent_codec.storage.json_config import dumps
from latent_codec.storage.tensors import FORMAT_VERSION

_SIDE = 256  # pixels, of the image whose computation is counted


class Flops(NamedTuple):
    """Holds the floating-point operations for one image, at 2 per multiply-accumulate."""

    encoder: float
    decoder: float


def count_flops(config: CodecConfig, side: int = _SIDE) -> Flops:
    """Count the convolutions, matrix products and attention for one `side` x `side` image; allocates no memory."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.device("meta"):
        backbone = build(config).backbone
        pixels = torch.zeros(1, config.image_channels + len(config.classes), side, side)
        latents = torch.zeros(1, config.latent_channels + len(config.classes), *(2 * [side // backbone.factor]))
        with FlopCounterMode(display=False) as encoder:
            backbone.encode(pixels)
        with FlopCounterMode(display=False) as decoder:
            backbone.decode(latents)
    return Flops(encoder.get_total_flops(), decoder.get_total_flops())


def factor_of(config: CodecConfig) -> int:
    """Return the pixels per latent element along one side; allocates no memory."""
    with torch.device("meta"):
        return build(config).backbone.factor


def describe_model(model: ModelFile, path: Path) -> str:
    """Return a paragraph for people about the model, which lies in the file `path`."""
    config, factor = model.config, factor_of(model.config)
    side = -(-_SIDE // factor) * factor
    flops = count_flops(config, side)
    parameters = sum(t.numel() for t in model.tensors.values())
    lines = [
        f"model       {path.name}, {path.stat().st_size / 1e6:.2f} MB, format {FORMAT_VERSION}",
        f"id          {model.model_id}",
        f"backbone    {config.backbone}",
        f"latents     {config.latent_channels} channels, 1/{factor} of each side; {config.bottleneck}",
        f"likelihood  {config.likelihood}",
        f"parameters  {parameters / 1e6:.2f} M",
        f"compute     encoder {flops.encoder / 1e9:.2f} GFLOP, decoder {flops.decoder / 1e9:.2f} GFLOP per "
        f"{side}x{side} image (2 per multiply-accumulate)",
    ]
    if config.classes:
        lines.append(f"classes     {len(config.classes)}: {', '.join(config.classes)}")
    if config.prefixes:
        lines.append(f"prefixes    {_describe_prefixes(config.prefixes, model.statistics)}")
    lines += [*_describe_statistics(model.statistics), *_describe_priors(model.priors)]
    if model.provenance:
        lines.append(f"training    {_describe_training(model.provenance)}")
    return paragraph(lines)


def _describe_statistics(statistics: LatentStatistics | None) -> list[str]:
    if statistics is None:
        return ["statistics  none"]
    lines = [f"statistics  over {statistics.source} ({statistics.images} images)"]
    for name in ("mean", "std", "posterior_std"):
        values = getattr(statistics, name)
        lines.append(f"  {name:13} " + ("unknown" if values is None else " ".join(f"{v:.3g}" for v in values)))
    return lines


def _describe_prefixes(prefixes: tuple[int, ...], statistics: LatentStatistics | None) -> str:
    measured = () if statistics is None else statistics.prefix_psnr
    if len(measured) != len(prefixes):
        return f"{', '.join(map(str, prefixes))} channels"
    pairs = zip(prefixes, measured, strict=True)
    return ", ".join(f"{n} channels {psnr:.2f} dB" for n, psnr in pairs) + ": PSNR of the decoded mode"


def _describe_training(provenance: dict[str, Any]) -> str:
    """Return one line; a file that `export` did not write may hold something else there, given as JSON."""
    try:
        progress, training = provenance["progress"], provenance["training"]
        return (
            f"{progress['step']} steps, {progress['minutes']:.0f} minutes, {training['data_images']} images of "
            f"{', '.join(training['data'])}, commit {training['git_commit']}"
        )
    except (KeyError, TypeError, ValueError):
        return dumps(provenance)


def _describe_priors(priors: Priors | None) -> list[str]:
    if priors is None:
        return ["priors      none, so it makes no .lc files"]
    if (codes := priors.factorized.codes) is not None:
        return [f"priors      factorized: a table of {codes} codes"]
    lines = [
        f"quantiser   steps of {priors.channel_steps.min():.3g} to {priors.channel_steps.max():.3g} at --step 1",
        f"priors      factorized: {len(priors.factorized.tables)} tables",
    ]
    if (context := priors.context) is not None:
        groups, levels = (", ".join(map(str, n)) for n in (context.config.groups, context.config.levels))
        lines.append(
            f"            context: groups of {groups} channels,{f' levels {levels},' if levels else ''} width "
            f"{context.config.width}, {len(context.tables)} tables; streams of format {context.version}"
        )
    return lines
