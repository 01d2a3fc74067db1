"""Define the command `latent-codec decode`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from latent_codec.commands.options import ResumeOptions
from latent_codec.errors import UserError
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode .lc files or latents to images; names are kept whole: a.jpg.lc becomes a.jpg.png."""

    src: tyro.conf.Positional[Path]
    """What `encode` wrote: a folder, a tar file, or one .lc file."""
    dst: tyro.conf.Positional[Path]
    """Folder for the images."""
    model: str = "photo"
    """The model that made them."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    tar: bool = False
    """Put the images into tar shards, as WebDataset reads them, about 128 in each."""
    sample: int | None = None
    """Latents: decode a draw from the posterior with this seed; by default its mode. A .lc file's draw is in it."""
    max_pixels: int = 2**27
    """Of .lc files those of larger images are refused before anything is allocated for them."""
    resume: tyro.conf.OmitArgPrefixes[ResumeOptions] = dataclasses.field(default_factory=ResumeOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        from latent_codec.folders.decode_latents import decode_folder
        from latent_codec.folders.decode_lc import decode_streams, is_streams

        streams = is_streams(self.src)
        if streams and self.sample is not None:
            raise UserError(
                f"{self.src}: what a .lc file draws is decided when it is made; give --sample to encode, not to decode"
            )
        runner = load(self.model, self.compute)
        if streams:
            summary = decode_streams(
                runner,
                self.src,
                self.dst,
                image_format=self.image_format,
                max_pixels=self.max_pixels,
                tar=self.tar,
                resume=self.resume.options(),
            )
        else:
            summary = decode_folder(
                runner,
                self.src,
                self.dst,
                image_format=self.image_format,
                sample=self.sample,
                tar=self.tar,
                resume=self.resume.options(),
            )
        print(summary)
        return 1 if summary.failures else 0
