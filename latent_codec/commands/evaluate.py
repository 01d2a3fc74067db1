"""What a model is worth: evaluate."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from latent_codec.errors import UserError
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions

if TYPE_CHECKING:
    from latent_codec.inference.runner import Runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Report:
    report: bool = False
    """Write report.html into --out: one page that opens without a network; and report.json with the same numbers."""
    report_images: int = 6
    """Images in the report's pictures, spread evenly over all."""
    bound_images: int = 16
    """Images of which the report bounds the likelihood, spread evenly over all."""
    bound_samples: int = 50
    """Importance samples for each of them, up to thousands."""
    baseline: tuple[str, ...] = ()
    """Models to set beside this one in the report, such as an autoencoder of the same latent size."""
    baseline_data: str | None = None
    """Images that the report's PCA is fitted to, by default one half of DIR to be measured on the other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model on a folder of images: PSNR, SSIM, MS-SSIM, LPIPS, KL and bytes on disk in bits per pixel.

    With --rd: whole .lc files at several steps, decoded again, with JPEG, WebP and AVIF beside them on the same images.
    With --report: all that tells whether a model works, in one page with pictures.
    """

    model: tyro.conf.Positional[str]
    dir: tyro.conf.Positional[str]
    out: Path | None = None
    """Folder for results.json, the latents, the reconstructions and the report; with --rd for rd.json and rd.png."""
    rd: bool = False
    """Rate-distortion curves; needs the extra `rd`."""
    steps: tuple[float, ...] = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
    """Quantiser steps of --rd."""
    refine: int = 0
    """Rounds of `encode --refine` for the files of --rd."""
    sample: int = 0
    """Seed of the dither in the row of --rd that has one, at step 1, and of all that the report draws."""
    lpips_net: Literal["alex", "squeeze", "vgg", "none"] = "alex"
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""
    pages: tyro.conf.OmitArgPrefixes[_Report] = _Report()
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        if self.refine and not self.rd:
            raise UserError("--refine is of the files that --rd measures; give --rd as well, or leave it out")
        if self.pages.report:
            return self._report()
        runner = load(self.model, self.compute)
        report = self._rate_distortion(runner) if self.rd else self._evaluate(runner)
        print(report.table())
        return 1 if report.failures else 0

    def _report(self) -> int:
        if self.out is None:
            raise UserError("--report needs a folder to write report.html into; give --out DIR")
        from latent_codec.metrics.bjontegaard import check_extra

        check_extra()
        from latent_codec.evaluation.report import EvaluatedModel, ReportOptions, write_report
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
        compute = dataclasses.replace(self.compute, tile=None)  # by default: other models may not have this one
        options = dataclasses.replace(options, baselines=[(name, load(name, compute)) for name in self.pages.baseline])
        runner = load(self.model, self.compute)
        report = self._evaluate(runner)
        rd = self._rate_distortion(runner) if self.rd else None
        print(report.table())
        command = self._command(*self._report_flags())
        write_report(EvaluatedModel(runner, self.model, self.dir, report, rd, command), self.out, options)
        print(f"wrote {self.out / 'report.html'}")
        return 1 if report.failures else 0

    def _evaluate(self, runner: "Runner"):
        from latent_codec.evaluation.evaluate import evaluate

        return evaluate(runner, self.dir, out=self.out, lpips=self._lpips)

    def _rate_distortion(self, runner: "Runner"):
        from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion

        options = RateDistortionOptions(
            steps=self.steps,
            refine=self.refine,
            sample=self.sample,
            lpips=self._lpips,
            command=self._command(*self._rd_flags()),
        )
        return rate_distortion(runner, self.dir, options, out=self.out)

    def _report_flags(self) -> list[str]:
        numbers = ("report_images", "bound_images", "bound_samples")
        flags = ["--report", *(f"--{n.replace('_', '-')}={getattr(self.pages, n)}" for n in numbers)]
        flags += self._rd_flags() if self.rd else []
        flags += ["--baseline", *self.pages.baseline] if self.pages.baseline else []
        return flags + (["--baseline-data", self.pages.baseline_data] if self.pages.baseline_data else [])

    def _rd_flags(self) -> list[str]:
        refine = ["--refine", str(self.refine)] if self.refine else []
        return ["--rd", "--steps", *(f"{s:g}" for s in self.steps), *refine]

    def _command(self, *flags: str) -> str:
        """What makes the same results again; where they go and how fast is not part of it."""
        command = ["latent-codec", "evaluate", self.model, self.dir, *flags]
        command += ["--sample", str(self.sample), "--lpips-net", self.lpips_net]
        if self.lpips_backbone is not None:
            command += ["--lpips-backbone", str(self.lpips_backbone)]
        return shlex.join(command)

    @property
    def _lpips(self):
        from latent_codec.metrics.lpips import LPIPSOptions

        return None if self.lpips_net == "none" else LPIPSOptions(net=self.lpips_net, backbone=self.lpips_backbone)
