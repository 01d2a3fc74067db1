"""Decode samples of the prior N(0, I) into a folder for each class: `python -m tools.mnist.prior_samples MODEL DST`."""

import dataclasses
from pathlib import Path

import torch
import tyro
from torch.nn.functional import pad

from latent_codec.images.geometry import Geometry, in_rgb
from latent_codec.images.write import write_image
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal
from latent_codec.program import say
from latent_codec.storage.files import make_folder
from tools.program import main


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorSamples:
    """Decode samples of the prior into images."""

    model: tyro.conf.Positional[str]
    """Model file or a shipped model's name."""
    dst: tyro.conf.Positional[Path]
    """Folder for the images."""
    count: int = 100
    """Images of each class, or in all if the model has none."""
    size: int = 1
    """Latent positions along each side."""
    border: int = 0
    """Black pixels to add on every side."""
    seed: int = 0
    """Seed of the samples."""

    @torch.inference_mode()
    def run(self) -> None:
        """Write expected pixels as DST/CLASS/00000.png, each drawn by the seed, its class and its number alone."""
        codec = Codec.load(self.model)
        classes = codec.config.classes or ("",)
        for label, name in enumerate(classes):
            make_folder(self.dst / name)
            keys = fold(self.seed, label, torch.arange(self.count))
            z = normal(keys, (codec.config.latent_channels, self.size, self.size))
            pixels = in_rgb(codec.decode_uint8(z, torch.full((self.count,), label)))
            pixels = pad(pixels, [self.border] * 4)  # (n, 3, h, w)
            mode = "L" if codec.config.image_channels == 1 else "RGB"
            geometry = Geometry(
                width=pixels.shape[3], height=pixels.shape[2], orientation=1, mode=mode, background=None
            )
            for i, image in enumerate(pixels):
                write_image(self.dst / name / f"{i:05d}.png", image, geometry, "png")
        say(f"wrote {len(classes) * self.count} images to {self.dst}")


if __name__ == "__main__":
    main("tools.mnist.prior_samples", PriorSamples, __doc__)
