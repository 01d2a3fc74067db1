"""Whether a model works: one HTML file that opens without a network, and the same numbers as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import Report
from latent_codec.evaluation.rate_distortion.report import Report as RateDistortion
from latent_codec.evaluation.report import about, jpeg, latent_space, likelihood, page, pictures, rate
from latent_codec.evaluation.report.baselines import baselines
from latent_codec.evaluation.report.html import paragraphs
from latent_codec.evaluation.report.page import Section, left_out
from latent_codec.evaluation.report.survey import survey
from latent_codec.images.sources import Source, find_images
from latent_codec.inference.runner import Runner
from latent_codec.metrics.lpips import LPIPS, Net
from latent_codec.storage.files import write_text

PAGE, RESULTS = "report.html", "report.json"

_NO_FID = (
    "FID is torch-fidelity's by definition, whose Inception weights are a download in a format that this program never "
    "loads (pickle); where they can be had, its own command measures what is kept here: fidelity --fid --input1 DIR "
    "--input2 OUT/decoded --samples-find-deep. A Frechet distance of other features is not called FID"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a report shows beside its fixed contents."""

    report_images: int
    """In pictures."""
    bound_images: int
    bound_samples: int
    """Importance samples for each of them."""
    baseline_data: str | None
    """Images that PCA is fitted to; by default half of those that are evaluated."""
    seed: int

    def __post_init__(self) -> None:
        for name in ("report_images", "bound_images", "bound_samples"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} leaves nothing to report on; give at least 1")


class Evaluated(NamedTuple):
    """What a report is about."""

    runner: Runner
    name: str
    """As the user calls the model."""
    where: str
    report: Report
    rd: RateDistortion | None
    command: str


def write_report(
    evaluated: Evaluated,
    out: Path,
    options: Options,
    others: Sequence[tuple[str, Runner]],
    *,
    lpips_net: Net | None,
    lpips_backbone: Path | None,
    quiet: bool = False,
) -> None:
    """Write report.html and report.json into `out`; the same inputs give the same bytes.

    `others` are models to set beside this one, by what the user calls them. Raises `UserError` if an image has gone
    since it was evaluated, or LPIPS' weights or `baseline_data` cannot be had.
    """
    lpips = None if lpips_net is None else LPIPS(lpips_net, lpips_backbone).to(evaluated.runner.options.device)
    found = {source.name: source for source in find_images(evaluated.where)}
    names = [record["path"] for record in evaluated.report.images]
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{missing[0]}: gone since it was evaluated; evaluate what is there")
    sources = [found[name] for name in names]
    sections = _sections(evaluated, sources, options, others, lpips, quiet=quiet)
    set_name, count = evaluated.report.about["set"], len(sources)
    introduction = paragraphs(
        f"Measured on {count} images of {set_name}. Everything is in this file; nothing is loaded."
    )
    write_text(out / PAGE, page.page(f"{evaluated.name} on {set_name}", introduction, sections))
    results = {section.name: section.json() for section in sections}
    write_text(out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")


def _sections(
    evaluated: Evaluated,
    sources: list[Source],
    options: Options,
    others: Sequence[tuple[str, Runner]],
    lpips: LPIPS | None,
    *,
    quiet: bool,
) -> list[Section]:
    runner, evaluation, seed = evaluated.runner, evaluated.report, options.seed
    codec = runner.codec
    few = pictures.shown(codec, sources, options.report_images)
    bounded = pictures.shown(codec, sources, options.bound_images)
    posteriors = survey(runner, sources, seed, quiet=quiet)
    shown = pictures.reconstructions(runner, few, seed)
    return [
        about.model(codec, evaluated.name),
        shown._replace(numbers=about.means(evaluation)),
        pictures.prior_samples(runner, few[0], seed),
        pictures.interpolations(runner, few),
        pictures.traversals(runner, few[0], posteriors),
        latent_space.active_units(codec, posteriors),
        latent_space.kl_by_channel(codec, posteriors, evaluation.summary.get("kl_bpp")),
        latent_space.aggregate_posterior(codec, posteriors, seed),
        likelihood.likelihood_bounds(runner, bounded, seed, options.bound_samples, quiet=quiet),
        rate.rate_distortion(evaluated.rd),
        baselines(runner, others, sources, options.baseline_data, evaluation, lpips, quiet=quiet),
        jpeg.jpeg_at_equal_bytes(runner, sources, lpips, [image.name for image in few], quiet=quiet),
        left_out("rfid", "rFID", _NO_FID),
        about.making(evaluation, evaluated.command, seed),
    ]
