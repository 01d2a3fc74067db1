"""Write the page of results from measurements: `python -m tools.results --data KODAK`."""

import dataclasses
from pathlib import Path

import tyro

from latent_codec.bitstream.refinement import USUAL_ROUNDS
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.metrics.bjontegaard import check_extra
from latent_codec.metrics.lpips import LPIPSOptions
from latent_codec.storage.files import make_folder, write_text
from tools.program import main
from tools.results.crops import Detail, Sheet
from tools.results.measured import Measurements, gather
from tools.results.page import PAGE, PLOT, SHEET, page, plot

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
class Results(Measurements):
    """Write docs/results.md with its plot and its picture, measuring first what has not been measured of the model.

    A JSON file of the same model is used as it is; one of another model is measured again and replaced.
    """

    photos: Path = Path("examples/photos")
    """Example photographs, of which details are shown."""
    out: Path = Path("docs")
    """Folder for results.md, results.svg and results.jpg."""
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self, details: tuple[Detail, ...] = DETAILS, rates: RateDistortionOptions = RATES) -> None:
        """Measure what is missing and write the page."""
        check_extra()
        make_folder(self.out)
        runner = load(self.model, self.compute)
        lpips = None if self.lpips_net == "none" else LPIPSOptions(net=self.lpips_net, backbone=self.lpips_backbone)
        sheet = Sheet(photos=self.photos, details=details, side=SIDE, steps=(1.0, 2.0), path=self.out / SHEET)
        measured = gather(self, runner, dataclasses.replace(rates, lpips=lpips), sheet)
        write_text(self.out / PLOT, plot(measured))
        write_text(self.out / PAGE, page(measured, runner.codec))
        print(f"wrote {self.out / PAGE}")


if __name__ == "__main__":
    main("tools.results", Results, __doc__)
