"""Describe the model, and how the report was made."""

import json

from latent_codec.evaluation.evaluate import EvaluationReport
from latent_codec.evaluation.report.page import Number, Section
from latent_codec.model.codec import Codec
from latent_codec.model.describe import count_flops
from latent_codec.storage.json_config import to_json

_SIDE = 256  # pixels of the image whose computation is counted

_NAMES = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "kl_bpp": "KL", "disk_bpp": "on disk"}
_UNITS = {"psnr": "dB", "kl_bpp": "bits per pixel", "disk_bpp": "bits per pixel"}


def model_section(codec: Codec, name: str) -> Section:
    """Show the facts of the model file."""
    config, statistics = codec.config, codec.statistics
    side = -(-_SIDE // codec.factor) * codec.factor
    flops = count_flops(config, side)
    how = f"of one {side}x{side} image, 2 per multiply-accumulate; convolutions, products and attention"
    numbers = [
        Number("parameters", "parameters", sum(p.numel() for p in codec.parameters()), "", "of encoder and decoder"),
        Number("encoder_gflop", "encoder", flops.encoder / 1e9, "GFLOP", how),
        Number("decoder_gflop", "decoder", flops.decoder / 1e9, "GFLOP", how),
    ]
    facts = [
        ("model", name),
        ("id", codec.model_id),
        ("backbone", config.backbone),
        ("bottleneck", config.bottleneck),
        ("likelihood", config.likelihood),
        ("latents", f"{config.latent_channels} channels, 1/{codec.factor} of each side"),
        ("statistics", f"over {statistics.source} ({statistics.images} images)" if statistics else "none"),
        ("priors", _priors(codec)),
    ]
    provenance = codec.provenance and json.dumps(codec.provenance, indent=1, sort_keys=True, ensure_ascii=False)
    records = {"id": codec.model_id, "config": to_json(config), "provenance": codec.provenance}
    return Section("model", "The model", {"facts": facts, "provenance": provenance}, numbers, records)


def _priors(codec: Codec) -> str:
    if codec.priors is None:
        return "none, so it makes no .lc files"
    return "factorized" if codec.priors.context is None else "factorized and context"


def mean_numbers(evaluation: EvaluationReport) -> list[Number]:
    """Return the means over all images that `evaluate` found."""
    how = f"all {evaluation.about['images']} images"
    return [
        Number(name, _NAMES.get(name, name), value, _UNITS.get(name, ""), f"{evaluation.protocol[name]}; {how}")
        for name, value in evaluation.summary.items()
    ]


def making_section(evaluation: EvaluationReport, command: str, seed: int) -> Section:
    """Show set, versions and command, which reproduce the report."""
    about, failures = evaluation.about, evaluation.failures
    facts = [
        ("set", about["set"]),
        ("images", f"{about['images']}, read as upright sRGB, 8 bits"),
        ("command", command),
        ("seed", f"{seed}: with an image's name and a number it decides every draw"),
        ("computed on", f"{about['device']}, {about['dtype']}"),
        *about["versions"].items(),
    ]
    records = {"about": about, "command": command, "seed": seed, "failures": failures}
    return Section("making", "How it was made", {"facts": facts, "failures": failures}, records=records)
