"""What a file is: a model, a folder of latents or one shard of it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.flop_counter import FlopCounterMode

from latent_codec import modelfile
from latent_codec.codec import Codec, resolve
from latent_codec.config import CodecConfig, dumps
from latent_codec.errors import UserError
from latent_codec.latents import INDEX, read_index

_SIDE = 256  # pixels, of the image whose computation is counted


class Flops(NamedTuple):
    encoder: float
    decoder: float


def count_flops(config: CodecConfig, side: int = _SIDE) -> Flops:
    """Of one `side` x `side` image, at 2 per multiply-accumulate; convolutions, products and attention."""
    with torch.device("meta"):
        codec = Codec(config).eval()
        pixels = torch.zeros(1, config.image_channels, side, side)
        with FlopCounterMode(display=False) as encoder:
            posterior = codec.encode(pixels)
        with FlopCounterMode(display=False) as decoder:
            codec.likelihood_params(posterior.mean)
    return Flops(encoder.get_total_flops(), decoder.get_total_flops())


def describe(where: str) -> str:
    """Text for people. Raises `UserError` if it is neither a model nor latents."""
    path = Path(where)
    if path.is_dir():
        return _describe_latents(path / INDEX)
    if path.name == INDEX:
        return _describe_latents(path)
    path = resolve(where)
    return _describe_latents(path) if _is_shard(path) else _describe_model(path)


def _is_shard(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == {"mean", "logvar"}
    except (SafetensorError, OSError):
        return False


def _describe_model(path: Path) -> str:
    codec = Codec.load(path)
    config, statistics = codec.config, codec.statistics
    side = -(-_SIDE // codec.factor) * codec.factor
    flops = count_flops(config, side)
    parameters = sum(p.numel() for p in codec.parameters())
    lines = [
        f"model       {path.name}, {path.stat().st_size / 1e6:.2f} MB, format {modelfile.FORMAT_VERSION}",
        f"id          {codec.model_id}",
        f"backbone    {config.backbone}",
        f"latents     {config.latent_channels} channels, 1/{codec.factor} of each side; {config.bottleneck}",
        f"likelihood  {config.likelihood}",
        f"parameters  {parameters / 1e6:.2f} M",
        f"compute     encoder {flops.encoder / 1e9:.2f} GFLOP, decoder {flops.decoder / 1e9:.2f} GFLOP per "
        f"{side}x{side} image (2 per multiply-accumulate)",
    ]
    if statistics is None:
        lines.append("statistics  none")
    else:
        lines.append(f"statistics  over {statistics.source} ({statistics.images} images)")
        for name in ("mean", "std", "posterior_std"):
            lines.append(f"  {name:13} " + " ".join(f"{v:.3g}" for v in getattr(statistics, name)))
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


def _describe_latents(path: Path) -> str:
    header, entries = read_index(path)
    if not entries:
        raise UserError(f"{path}: an index without entries")
    pixels = sum(e.geometry.width * e.geometry.height for e in entries)
    # A shard describes itself, under whatever name it has now.
    shards = {path.parent / e.shard for e in entries} if path.name == INDEX else {path}
    if missing := sorted(shard.name for shard in shards if not shard.is_file()):
        raise UserError(f"{path}: {len(missing)} of its {len(shards)} shards are missing: {', '.join(missing[:5])}")
    size = sum(shard.stat().st_size for shard in shards)
    return "\n".join(
        [
            f"latents     {len(entries)} images in {len(shards)} shards, {size / 1e6:.2f} MB",
            f"model       {header.model_id}",
            f"stored as   mean and {header.second_moment} in {header.dtype}, {header.scale_state}, 1/{header.factor} "
            f"of each side, from pixels in {list(header.pixel_range)}",
            f"on disk     {8 * size / pixels:.3f} bits per pixel",
            f"statistics  {'over ' + header.statistics.source if header.statistics else 'none'}",
        ]
    )
