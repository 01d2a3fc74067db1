"""Define the command `latent-codec decode`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latent_codec.commands.options import ResumeOptions
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.program import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode .lc files or latents to images; names are kept whole: a.jpg.lc becomes a.jpg.png."""

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Output of `encode`: a folder, a tar file, or one .lc file."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder for the images."""
    model: str = "photo"
    """The model that encoded them: the name of a shipped model, or a model file."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    """Format of the images."""
    tar: bool = False
    """Put the images into tar shards of about 128 images each, as WebDataset reads them."""
    sample: int | None = None
    """Latents: decode a draw from the posterior with this seed, by default its mode; .lc files hold their own draw."""
    max_pixels: int = 2**27
    """Refuse .lc files of larger images before anything is allocated for them."""
    follow_links: bool = False
    """Search linked folders too, each once."""
    resume: tyro.conf.OmitArgPrefixes[ResumeOptions] = dataclasses.field(default_factory=ResumeOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        """Decode, print the summary and return the exit code."""
        from latent_codec.folders.decode_images import DecodeOptions
        from latent_codec.folders.decode_latents import decode_latents
        from latent_codec.folders.decode_lc import decode_lc, is_lc
        from latent_codec.images.sources import ListOptions

        options = DecodeOptions(
            image_format=self.image_format,
            sample=self.sample,
            max_pixels=self.max_pixels,
            tar=self.tar,
            search=ListOptions(follow_links=self.follow_links),
        )
        decode = decode_lc if is_lc(self.src) else decode_latents
        summary = decode(load(self.model, self.compute), self.src, self.dst, options, resume=self.resume.resume())
        say(summary)
        return 1 if summary.failures else 0
