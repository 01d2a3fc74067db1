"""Write an HTML report of a model that opens without a network, and the same numbers as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import EvaluationReport, check_results
from latent_codec.evaluation.rate_distortion.report import RateDistortionReport
from latent_codec.evaluation.report import about, latent_space, likelihood, page, pictures, rate
from latent_codec.evaluation.report.baselines import BaselineComparison
from latent_codec.evaluation.report.page import Section, left_out
from latent_codec.evaluation.report.survey import survey
from latent_codec.images.sources import ListOptions, Source, list_images
from latent_codec.inference.runner import Runner
from latent_codec.metrics.lpips import LPIPSOptions
from latent_codec.storage.files import write_text

PAGE, RESULTS = "report.html", "report.json"

_RFID = "rfid"
_NO_FID = (
    "FID is torch-fidelity's by definition, whose Inception weights are a download in a format that this program never "
    "loads (pickle); where they can be had, its own command measures what is kept here: fidelity --fid --input1 DIR "
    "--input2 OUT/decoded --samples-find-deep. A Frechet distance of other features is not called FID"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Choose what a report shows beside its fixed contents."""

    report_images: int = 6
    """Images in pictures."""
    bound_images: int = 16
    """Images of which the likelihood is bounded."""
    bound_samples: int = 50
    """Importance samples for each of them."""
    baseline_data: str | None = None
    """Images that PCA is fitted to; by default half of those that are evaluated."""
    baselines: Sequence[tuple[str, Runner]] = ()
    """Models to set beside this one, by name."""
    lpips: LPIPSOptions | None = None
    seed: int = 0
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        for name in ("report_images", "bound_images", "bound_samples"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} leaves nothing to report on; give at least 1")


class EvaluatedModel(NamedTuple):
    """Hold a model and what was measured of it."""

    runner: Runner
    name: str
    """Name by which the user calls the model."""
    where: str
    """Images it was evaluated on."""
    evaluation: EvaluationReport
    rates: RateDistortionReport | None
    command: str
    search: ListOptions = ListOptions()


def check_report(out: Path) -> None:
    """Raise `UserError` unless a report may be written into `out`: only another report is replaced."""
    check_results(out / RESULTS, {"rate_distortion", _RFID}, out / PAGE)


def write_report(evaluated: EvaluatedModel, out: Path, options: ReportOptions, *, quiet: bool = False) -> None:
    """Write report.html and report.json into `out`; raises `UserError` for images, weights or data that are gone."""
    found = {source.name: source for source in list_images(evaluated.where, evaluated.search).sources}
    names = [record["path"] for record in evaluated.evaluation.images]
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{missing[0]}: gone since it was evaluated; evaluate again")
    sections = _sections(evaluated, [found[name] for name in names], options, quiet)
    set_name = evaluated.evaluation.about["set"]
    introduction = f"Measured on {len(names)} images of {set_name}. Everything is in this file; nothing is loaded."
    results = {section.name: section.json() for section in sections}
    write_text(out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")  # by which the page is known
    write_text(out / PAGE, page.render(f"{evaluated.name} on {set_name}", introduction, sections))


def _sections(evaluated: EvaluatedModel, sources: list[Source], options: ReportOptions, quiet: bool) -> list[Section]:
    runner, evaluation, seed = evaluated.runner, evaluated.evaluation, options.seed
    codec = runner.codec
    lpips = None if options.lpips is None else options.lpips.load(runner.options.device)
    few = pictures.select_images(codec, sources, options.report_images)
    bounded = pictures.select_images(codec, sources, options.bound_images)
    posteriors = survey(runner, sources, seed, quiet=quiet)
    baselines = BaselineComparison(runner, sources, evaluation, lpips=lpips, quiet=quiet)
    shown = pictures.reconstructions(runner, few, seed)
    return [
        about.model_section(codec, evaluated.name),
        dataclasses.replace(shown, numbers=about.mean_numbers(evaluation)),
        pictures.prior_samples(runner, few[0], seed),
        pictures.interpolations(runner, few),
        pictures.traversals(runner, few[0], posteriors),
        latent_space.active_units(posteriors),
        latent_space.kl_by_channel(codec, posteriors, evaluation.summary.get("kl_bpp")),
        latent_space.aggregate_posterior(codec, posteriors, seed),
        likelihood.likelihood_bounds(runner, bounded, seed, options.bound_samples, quiet=quiet),
        rate.rate_distortion_section(evaluated.rates),
        baselines.section(options.baselines, options.baseline_data),
        rate.jpeg_at_equal_bytes(runner, sources, lpips, [image.name for image in few], quiet=quiet),
        left_out(_RFID, "rFID", _NO_FID),
        about.making_section(evaluation, evaluated.command, seed),
    ]
