"""Compare the rate and distortion of models on a few photographs, by whole files that are decoded again."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.evaluation.rate_distortion.report import RateDistortionReport, rate_curve
from latent_codec.images.sources import Source
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.metrics.bjontegaard import delta_rate
from latent_codec.program import say
from latent_codec.storage.removal import holding, remove

_STEPS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


def compare(sources: Sequence[Source], models: Mapping[str, str], out: Path, device: str) -> None:
    """Measure models by name, and print the first one's rate relative to each other one's. Writes OUT/NAME/rd.json and
    rd.png and OUT/images, and leaves out models without a prior, which cannot write files."""
    images = out / "images"
    if not remove(images, holding(r"\d{3,}\.\w+", r"\d{3,}")):
        raise UserError(f"{images}: holds files that no comparison put there; move it away")
    images.mkdir(parents=True)
    for i, source in enumerate(sources):
        (images / f"{i:03d}{Path(source.name).suffix}").write_bytes(source.read_bytes())
    reports: dict[str, RateDistortionReport] = {}
    for name, model in models.items():
        runner = load(model, ComputeOptions(device=device))
        if runner.codec.priors is None:
            say(f"{model}: has no prior, and is left out of the figure")
            continue
        steps = " ".join(f"{step:g}" for step in _STEPS)
        command = f"latent-codec evaluate {model} {images} --rd --steps {steps} --sample 0 --lpips-net none"
        options = RateDistortionOptions(steps=_STEPS, command=command)
        reports[name] = rate_distortion(runner, images, options, out=out / name)
        say(f"{name}\n{reports[name].table()}")
    first, *others = reports
    for other in others:
        for metric in ("psnr", "ms_ssim"):
            # Each with the best of its priors.
            tested, anchor = (rate_curve(r.points, r.codecs[0], metric) for r in (reports[first], reports[other]))
            delta = delta_rate(anchor, tested)
            value = f"none ({delta.reason})" if delta.percent is None else f"{delta.percent:+.1f}%"
            say(f"delta rate of {first} against {other}, {metric}: {value}")
