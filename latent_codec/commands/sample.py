"""Define the command `latent-codec sample`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from latent_codec.diffusion.config import SampleOptions
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.program import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a latent diffusion model that `train.diffusion` trained, and decode them."""

    run_or_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_FILE")]
    """A run's folder (its averaged weights), or a file from its checkpoints."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder for the images: LABEL/00000.png ...; without labels, 00000.png ..."""
    model: str = "photo"
    """The codec whose latents it was trained on: the name of a shipped model, or a model file."""
    count: int = 8
    """Number of images of each label."""
    label: tuple[str, ...] = ()
    """Names of classes, by default all."""
    grid: Path | None = None
    """One PNG with all images, a row for each label."""
    sampling: tyro.conf.OmitArgPrefixes[SampleOptions] = SampleOptions()
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        """Draw the images, say where they are and return the exit code."""
        import torch

        from latent_codec.diffusion.sampling import choose, sample
        from latent_codec.diffusion.sampling import load as load_diffusion
        from latent_codec.images.read import read_image
        from latent_codec.images.write import check_grid, write_grid

        if self.grid is not None and not self.sampling.overwrite:
            check_grid(self.grid)
        runner = load(self.model, self.compute)
        diffusion = load_diffusion(self.run_or_file, runner.options.device)
        drawn = sample(diffusion, runner, choose(diffusion, self.label, self.count), self.dst, self.sampling)
        say(drawn)
        if self.grid is not None and drawn.failures:
            say(f"{self.grid}: not written, as {len(drawn.failures)} of its images failed", error=True)
        elif self.grid is not None:
            write_grid(self.grid, torch.stack([read_image(path).pixels for path in drawn.paths]), self.count)
            say(f"wrote {self.grid}")
        return 1 if drawn.failures else 0
