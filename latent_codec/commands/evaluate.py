"""Define the command `latent-codec evaluate`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from latent_codec.errors import UserError
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.program import say

if TYPE_CHECKING:
    from latent_codec.inference.runner import Runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Report:
    """Choose what the report holds."""

    report: bool = False
    """Write report.html into --out, one page that opens without a network, and report.json with the same numbers."""
    report_images: int = 6
    """Number of images that the report shows, spread evenly over all."""
    bound_images: int = 16
    """Number of images whose likelihood the report bounds, spread evenly over all."""
    bound_samples: int = 50
    """Importance samples for each of those images; thousands are possible."""
    baseline: tuple[str, ...] = ()
    """Models that the report compares this one with, such as an autoencoder of the same latent size."""
    baseline_data: str | None = None
    """Images to fit the report's PCA to; by default it is fitted to each half of DIR and measured on the other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model on a folder of images: PSNR, SSIM, MS-SSIM, LPIPS, KL and bytes on disk in bits per pixel.

    With --rd, measure whole .lc files at several steps, and JPEG, WebP and AVIF files of the same images.
    With --report, write one page with pictures and figures that shows whether a model works.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Name of a shipped model, or a model file."""
    dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Images to measure on: a folder, a tar file, or a quoted glob."""
    channels: int | None = None
    """Measure the latents of the first channels, a prefix of a model that has some; by default of all."""
    follow_links: bool = False
    """Search linked folders too, each once."""
    out: Path | None = None
    """Folder for results.json, latents, reconstructions and the report; with --rd, for rd.json and rd.png."""
    rd: bool = False
    """Measure rate-distortion curves; needs the extra `rd`."""
    steps: tuple[float, ...] = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
    """Quantiser steps that --rd measures."""
    refine: int = 0
    """Rounds of `encode --refine` for the files that --rd measures."""
    sample: int = 0
    """Seed of the dither in the one row of --rd that has it, at step 1, and of all random numbers of the report."""
    lpips_net: Literal["alex", "squeeze", "vgg", "none"] = "alex"
    """Network of LPIPS; none leaves LPIPS out."""
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet weights; by default they are downloaded."""
    pages: tyro.conf.OmitArgPrefixes[_Report] = _Report()
    command_line: tyro.conf.Suppress[str] = ""
    """The command line as it was typed, which results record."""
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        """Measure, print a table and return the exit code."""
        if self.refine and not self.rd:
            raise UserError("--refine applies to the files that --rd measures; give --rd as well, or leave it out")
        if self.channels is not None and (self.rd or self.pages.report):
            raise UserError("--channels measures stored latents alone; leave out --rd and --report")
        if self.pages.report:
            return self._report()
        runner = load(self.model, self.compute)
        report = self._rate_distortion(runner) if self.rd else self._evaluate(runner)
        say(report.table())
        return 1 if report.failures else 0

    def _report(self) -> int:
        if self.out is None:
            raise UserError("--report needs a folder to write report.html into; give --out DIR")
        from latent_codec.metrics.bjontegaard import check_extra

        check_extra()
        from latent_codec.evaluation.report import EvaluatedModel, ReportOptions, check_report, write_report
        from latent_codec.images.sources import find_images

        options = ReportOptions(
            report_images=self.pages.report_images,
            bound_images=self.pages.bound_images,
            bound_samples=self.pages.bound_samples,
            baseline_data=self.pages.baseline_data,
            lpips=self._lpips,
            seed=self.sample,
        )
        if options.baseline_data is not None:
            find_images(options.baseline_data)  # refuses what it cannot find before anything is measured
        check_report(self.out)
        compute = dataclasses.replace(self.compute, tile=None)  # by default: other models may not have this one
        options = dataclasses.replace(options, baselines=[(name, load(name, compute)) for name in self.pages.baseline])
        runner = load(self.model, self.compute)
        report = self._evaluate(runner)
        rd = self._rate_distortion(runner) if self.rd else None
        say(report.table())
        evaluated = EvaluatedModel(runner, self.model, self.dir, report, rd, self.command_line, self._search)
        write_report(evaluated, self.out, options)
        say(f"wrote {self.out / 'report.html'}")
        return 1 if report.failures else 0

    def _evaluate(self, runner: "Runner"):
        from latent_codec.evaluation.evaluate import Selection, evaluate

        select = Selection(channels=self.channels, search=self._search)
        return evaluate(runner, self.dir, out=self.out, lpips=self._lpips, select=select)

    def _rate_distortion(self, runner: "Runner"):
        from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion

        options = RateDistortionOptions(
            steps=self.steps,
            refine=self.refine,
            sample=self.sample,
            lpips=self._lpips,
            command=self.command_line,
            search=self._search,
        )
        return rate_distortion(runner, self.dir, options, out=self.out)

    @property
    def _search(self):
        from latent_codec.images.sources import ListOptions

        return ListOptions(follow_links=self.follow_links)

    @property
    def _lpips(self):
        from latent_codec.metrics.lpips import LPIPSOptions

        return None if self.lpips_net == "none" else LPIPSOptions(net=self.lpips_net, backbone=self.lpips_backbone)
