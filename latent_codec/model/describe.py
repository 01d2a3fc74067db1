"""Describe a model in words: its size, FLOPs, priors and training."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig
from latent_codec.prior.priors import Priors
from latent_codec.storage import tensors as tensor_files
from latent_codec.storage.json_config import dumps

_SIDE = 256  # pixels, of the image whose computation is counted


class Flops(NamedTuple):
    encoder: float
    decoder: float


def count_flops(config: CodecConfig, side: int = _SIDE) -> Flops:
    """Of one `side` x `side` image, at 2 per multiply-accumulate; convolutions, products and attention."""
    with torch.device("meta"):
        codec = Codec(config).eval()
        pixels = torch.zeros(1, config.image_channels + len(config.classes), side, side)
        latents = torch.zeros(1, config.latent_channels + len(config.classes), *(2 * [side // codec.factor]))
        with FlopCounterMode(display=False) as encoder:
            codec.backbone.encode(pixels)
        with FlopCounterMode(display=False) as decoder:
            codec.backbone.decode(latents)
    return Flops(encoder.get_total_flops(), decoder.get_total_flops())


def _describe_model(path: Path) -> str:
    codec = Codec.load(path)
    config, statistics = codec.config, codec.statistics
    side = -(-_SIDE // codec.factor) * codec.factor
    flops = count_flops(config, side)
    parameters = sum(p.numel() for p in codec.parameters())
    lines = [
        f"model       {path.name}, {path.stat().st_size / 1e6:.2f} MB, format {tensor_files.FORMAT_VERSION}",
        f"id          {codec.model_id}",
        f"backbone    {config.backbone}",
        f"latents     {config.latent_channels} channels, 1/{codec.factor} of each side; {config.bottleneck}",
        f"likelihood  {config.likelihood}",
        f"parameters  {parameters / 1e6:.2f} M",
        f"compute     encoder {flops.encoder / 1e9:.2f} GFLOP, decoder {flops.decoder / 1e9:.2f} GFLOP per "
        f"{side}x{side} image (2 per multiply-accumulate)",
    ]
    if config.classes:
        lines.append(f"classes     {len(config.classes)}: {', '.join(config.classes)}")
    if statistics is None:
        lines.append("statistics  none")
    else:
        lines.append(f"statistics  over {statistics.source} ({statistics.images} images)")
        for name in ("mean", "std", "posterior_std"):
            values = getattr(statistics, name)
            lines.append(f"  {name:13} " + ("unknown" if values is None else " ".join(f"{v:.3g}" for v in values)))
    lines += _describe_priors(codec.priors)
    if codec.provenance:
        lines.append(f"training    {_describe_training(codec.provenance)}")
    return "\n".join(lines)


def _describe_training(provenance: dict[str, Any]) -> str:
    """One line; whoever made the file may have written something else there than `export` does."""
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
            f"{context.config.width}, "
            f"{len(context.tables)} tables; streams of format {context.version}"
        )
    return lines
