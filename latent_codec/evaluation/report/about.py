"""What the model is, and how the report was made."""

import json
from typing import Any

from latent_codec.evaluation.evaluate import Report
from latent_codec.evaluation.report.html import join, name_of, paragraphs, table, tag
from latent_codec.evaluation.report.page import Number, Section
from latent_codec.model.codec import Codec
from latent_codec.model.describe import count_flops
from latent_codec.storage.json_config import to_json

_SIDE = 256  # pixels, of the image whose computation is counted

_LABELS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS",
    "kl_bpp": "KL",
    "disk_bpp": "on disk",
}
_UNITS = {"psnr": "dB", "kl_bpp": "bits per pixel", "disk_bpp": "bits per pixel"}


def model(codec: Codec, name: str) -> Section:
    """Facts of the model file."""
    config, statistics = codec.config, codec.statistics
    side = -(-_SIDE // codec.factor) * codec.factor
    flops = count_flops(config, side)
    of = f"of one {side}x{side} image, 2 per multiply-accumulate; convolutions, products and attention"
    numbers = [
        Number("parameters", "parameters", sum(p.numel() for p in codec.parameters()), "", "of encoder and decoder"),
        Number("encoder_gflop", "encoder", flops.encoder / 1e9, "GFLOP", of),
        Number("decoder_gflop", "decoder", flops.decoder / 1e9, "GFLOP", of),
    ]
    facts: list[tuple[object, ...]] = [
        ("model", name_of(name)),
        ("id", tag("code", codec.model_id)),
        ("backbone", config.backbone),
        ("bottleneck", config.bottleneck),
        ("likelihood", config.likelihood),
        ("latents", f"{config.latent_channels} channels, 1/{codec.factor} of each side"),
        ("statistics", f"over {statistics.source} ({statistics.images} images)" if statistics else "none"),
        ("priors", _priors(codec)),
    ]
    records = {"id": codec.model_id, "config": to_json(config), "provenance": codec.provenance}
    provenance = paragraphs("The file says nothing of where it comes from.")
    if codec.provenance:
        text = tag("pre", json.dumps(codec.provenance, indent=1, sort_keys=True, ensure_ascii=False))
        provenance = tag("details", tag("summary", "Provenance, as the model's file has it"), text)
    return Section("model", "The model", join(table(("", "what"), facts), provenance), numbers, records)


def _priors(codec: Codec) -> str:
    if codec.priors is None:
        return "none, so it makes no .lc files"
    return "factorized" if codec.priors.context is None else "factorized and context"


def means(evaluation: Report) -> list[Number]:
    """What `evaluate` found over all images."""
    count = evaluation.about["images"]
    return [
        Number(
            name,
            _LABELS.get(name, name),
            value,
            _UNITS.get(name, ""),
            f"{evaluation.protocol[name]}; all {count} images",
        )
        for name, value in evaluation.summary.items()
    ]


def making(evaluation: Report, command: str, seed: int) -> Section:
    """Set, versions and command: what it takes to make the report again."""
    about: dict[str, Any] = evaluation.about
    facts: list[tuple[object, ...]] = [
        ("set", name_of(str(about["set"]))),
        ("images", f"{about['images']}, read as upright sRGB, 8 bits"),
        ("command", tag("code", command)),
        ("seed", f"{seed}: with an image's name and a number it decides every draw"),
        ("computed on", f"{about['device']}, {about['dtype']}"),
        *((name, version) for name, version in about["versions"].items()),
    ]
    failures = evaluation.failures
    lost = paragraphs("Every image that was found is in every mean.")
    if failures:
        lines = (tag("li", name_of(name), ": ", reason) for name, reason in failures.items())
        lost = join(
            paragraphs(f"{len(failures)} images could not be read and are in nothing above:"), tag("ul", *lines)
        )
    records = {"about": about, "command": command, "seed": seed, "failures": failures}
    return Section("making", "How it was made", join(table(("", ""), facts), lost), [], records)
