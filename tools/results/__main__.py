"""Write the page of results from measurements: `python -m tools.results --data KODAK`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from latent_codec.bitstream.refinement import USUAL_ROUNDS
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.metrics.bjontegaard import check_extra
from latent_codec.metrics.lpips import LPIPSOptions
from latent_codec.program import say
from latent_codec.storage.files import make_folder, write_text
from tools.benchmark.models import Quality
from tools.benchmark.record import command_line, machine
from tools.program import main
from tools.results.crops import Detail, Sheet, make_sheet
from tools.results.page import PAGE, PLOT, SHEET, Measured, page, plot
from train.loop.provenance import git_commit

DETAILS = (
    Detail("people/astronaut.jpg", 180, 58),
    Detail("places/pavilion.jpg", 250, 130),
    Detail("animals/cat.jpg", 138, 64),
)
"""Details of the example photographs."""

SIDE = 88
"""Side of the details in pixels."""

RATES = RateDistortionOptions(refine=USUAL_ROUNDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Write docs/results.md with its plot and its picture, measuring first what has not been measured of the model.

    A JSON file of the same model is used as it is; one of another model is measured again and replaced.
    """

    model: str = "photo"
    """Name of a shipped model or a file."""
    data: str | None = None
    """Images to measure on; not needed where the JSON files are the model's."""
    others: tuple[str, ...] = ()
    """Models to measure as first stages beside this one, such as PCA of the same latent size."""
    taef2: Path | None = None
    """Folder with TAEF2's encoder.safetensors and decoder.safetensors, to measure it as well."""
    rd_json: Path = Path("checkpoints/photo-rd.json")
    """Results of `latent-codec evaluate --rd`."""
    quality_json: Path = Path("checkpoints/photo.json")
    """Results of `tools.benchmark quality`."""
    crops_json: Path = Path("checkpoints/photo-crops.json")
    """Bytes and qualities of the files in the picture."""
    anew: bool = False
    """Measure everything again."""
    lpips_net: Literal["alex", "squeeze", "vgg", "none"] = "alex"
    """Network of LPIPS; none leaves LPIPS out."""
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""
    photos: Path = Path("examples/photos")
    """Example photographs, of which details are shown."""
    out: Path = Path("docs")
    """Folder for results.md, results.svg and results.jpg."""
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self, details: tuple[Detail, ...] = DETAILS, rates: RateDistortionOptions = RATES) -> None:
        """Measure what is missing, with --data, and write the page; raises `UserError` for JSON of another kind."""
        check_extra()
        make_folder(self.out)
        runner = load(self.model, self.compute)
        lpips = None if self.lpips_net == "none" else LPIPSOptions(net=self.lpips_net, backbone=self.lpips_backbone)
        rates = dataclasses.replace(rates, lpips=lpips, command=command_line())
        sheet = Sheet(photos=self.photos, details=details, side=SIDE, steps=(1.0, 2.0), path=self.out / SHEET)
        stream = StreamCodec(runner.codec, runner.options.device)
        own, kind = stream.stream_id.hex(), stream.prior.kind
        measured = Measured(
            self._read(
                self.rd_json,
                lambda found: found["about"].get("stream_ids", {}).get(kind) == own,
                lambda: self._measure_rates(runner, rates),
            ),
            self._read(
                self.quality_json,
                lambda found: next(iter(found["results"].values()))["model_id"] == runner.model_id,
                self._measure_quality,
            ),
            self._read(
                self.crops_json,
                lambda found: found["about"].get("stream_id") == own,
                lambda: make_sheet(runner, sheet, self.crops_json),
            ),
        )
        write_text(self.out / PLOT, plot(measured))
        write_text(self.out / PAGE, page(measured, runner.codec))
        say(f"wrote {self.out / PAGE}")

    def _read(self, path: Path, is_own: Callable[[Any], bool], measure: Callable[[], None]) -> dict[str, Any]:
        """Return a file's contents; first measure them if they are missing or another model's."""
        try:
            known = not self.anew and path.exists() and is_own(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, StopIteration, AttributeError, TypeError) as error:
            raise UserError(f"{path}: no results of this kind ({error!r}); give another file or remove it") from error
        if not known:
            say(f"measuring {path}", error=True)
            measure()
        return json.loads(path.read_text(encoding="utf-8"))

    def _where(self, missing: Path) -> str:
        if self.data is None:
            raise UserError(f"{missing}: holds nothing of this model; give --data DIR, the images to measure it on")
        return self.data

    def _measure_rates(self, runner: Runner, rates: RateDistortionOptions) -> None:
        report = rate_distortion(runner, self._where(self.rd_json), rates)
        if report.failures:
            raise UserError(f"{self.data}: {len(report.failures)} images could not be used; a page needs all of them")
        found = report.json()
        found["about"] |= {"commit": git_commit()} | machine(runner.options.device)
        write_text(self.rd_json, json.dumps(found, indent=1, allow_nan=False) + "\n")

    def _measure_quality(self) -> None:
        Quality(
            dir=self._where(self.quality_json),
            models=(self.model, *self.others),
            taef2=self.taef2,
            lpips_net=None if self.lpips_net == "none" else self.lpips_net,
            lpips_backbone=self.lpips_backbone,
            out=self.quality_json,
        ).run()


if __name__ == "__main__":
    main("tools.results", Results, __doc__)
