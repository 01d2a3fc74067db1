"""Images from a latent diffusion model: sample."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from latent_codec.diffusion.config import SampleOptions
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a latent diffusion model that `train.diffusion` trained, and decode them."""

    run_or_file: tyro.conf.Positional[Path]
    """A run's folder (its averaged weights), or a file from its checkpoints."""
    dst: tyro.conf.Positional[Path]
    """Folder for the images: LABEL/00000.png ..., without labels 00000.png ..."""
    model: str = "photo"
    """The codec whose latents it was trained on: a shipped model's name or a file."""
    count: int = 8
    """Images of each label."""
    label: tuple[str, ...] = ()
    """Names of classes, by default all."""
    guidance: float = 1.0
    """Classifier-free guidance: 1 is the model as it is, 1.5 to 4 make images more typical of their label."""
    steps: int = 50
    """Steps from noise to image: as many runs of the network, twice as many with guidance."""
    seed: int = 0
    """An image depends on this, its label and its number alone."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    grid: Path | None = None
    """One PNG with all images, a row for each label."""
    overwrite: bool = False
    """Draw again what is there, also by other settings."""
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        import torch

        from latent_codec.diffusion.sampling import choose, sample
        from latent_codec.diffusion.sampling import load as load_diffusion
        from latent_codec.images.read import read_image
        from latent_codec.images.write import write_grid

        runner = load(self.model, self.compute)
        diffusion = load_diffusion(self.run_or_file, runner.options.device)
        options = SampleOptions(
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            image_format=self.image_format,
            overwrite=self.overwrite,
        )
        drawn = sample(diffusion, runner, choose(diffusion, self.label, self.count), self.dst, options)
        print(drawn)
        if self.grid is not None:
            write_grid(self.grid, torch.stack([read_image(path).pixels for path in drawn.paths]), self.count)
            print(f"wrote {self.grid}")
        return 0
