"""Decode samples of the prior N(0, I) into a folder for each class: `python -m tools.mnist.prior_samples MODEL DST`."""

import dataclasses
from pathlib import Path

import torch
import tyro
from torch.nn.functional import pad

from latent_codec.errors import UserError
from latent_codec.flags import FLAGS
from latent_codec.images.geometry import Geometry, in_rgb
from latent_codec.images.write import write_image
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal
from latent_codec.storage.files import make_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Choose the model and the images."""

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


def main() -> None:
    """Run the command line."""
    options = tyro.cli(SamplingOptions, prog="tools.mnist.prior_samples", description=__doc__, registry=FLAGS)
    try:
        print(f"wrote {run(options)} images to {options.dst}")
    except UserError as error:
        raise SystemExit(f"tools.mnist.prior_samples: {error}") from error


@torch.inference_mode()
def run(options: SamplingOptions) -> int:
    """Write expected pixels as DST/CLASS/00000.png, and return their number.

    A sample depends on the seed, its class and its number alone.
    """
    codec = Codec.load(options.model)
    classes = codec.config.classes or ("",)
    for label, name in enumerate(classes):
        make_folder(options.dst / name)
        keys = fold(options.seed, label, torch.arange(options.count))
        z = normal(keys, (codec.config.latent_channels, options.size, options.size))
        pixels = in_rgb(codec.decode_uint8(z, torch.full((options.count,), label)))
        pixels = pad(pixels, [options.border] * 4)  # (n, 3, h, w)
        mode = "L" if codec.config.image_channels == 1 else "RGB"
        geometry = Geometry(width=pixels.shape[3], height=pixels.shape[2], orientation=1, mode=mode, background=None)
        for i, image in enumerate(pixels):
            write_image(options.dst / name / f"{i:05d}.png", image, geometry, "png")
    return len(classes) * options.count


if __name__ == "__main__":
    main()
