"""Define the command `latent-codec decode`."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latent_codec.commands.options import ResumeOptions
from latent_codec.errors import UserError
from latent_codec.folders.makers import has_id, makes_streams, runners_for
from latent_codec.inference.options import ComputeOptions
from latent_codec.program import say

_FORMATS: dict[str, Literal["png", "webp", "jpg"]] = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
"""Format of an image by the suffix of its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode .lc files or latents to images: a.jpg.lc becomes a.jpg.png, or a.png in a tar file."""

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Output of `encode`: a folder, a tar file, or one .lc file."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder for the images. For one .lc file, also an image's name that ends in .png, .webp, .jpg or .jpeg."""
    model: str | None = None
    """The model that encoded them: a shipped model's name or a file; by default found by what the files say."""
    models: Path | None = None
    """A folder of model files to find it in, beside the shipped models."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    """Format of the images."""
    channels: int | None = None
    """Decode the first channels alone, a prefix of a model that has some; by default all that are stored."""
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
        from latent_codec.bitstream.container import SUFFIX
        from latent_codec.folders.decode_images import DecodeOptions
        from latent_codec.folders.decode_latents import decode_latents
        from latent_codec.folders.decode_lc import decode_lc
        from latent_codec.folders.read_lc import is_lc, makers_of
        from latent_codec.folders.single import is_single, make_single
        from latent_codec.images.read import EXTENSIONS
        from latent_codec.images.sources import ListOptions
        from latent_codec.latents.format import INDEX, read_index

        suffix = self.dst.suffix.lower()
        if self.src.suffix == SUFFIX and not self.dst.is_dir() and suffix in EXTENSIONS and suffix not in _FORMATS:
            raise UserError(
                f"{self.dst}: images are written as {', '.join(_FORMATS)}, not as {suffix}; give one of these"
            )
        single = not self.tar and is_single(self.src, self.dst, _FORMATS)
        options = DecodeOptions(
            image_format=_FORMATS[self.dst.suffix.lower()] if single else self.image_format,
            sample=self.sample,
            max_pixels=self.max_pixels,
            channels=self.channels,
            tar=self.tar,
            search=ListOptions(follow_links=self.follow_links),
        )
        resume = self.resume.resume()
        if is_lc(self.src):
            makers = partial(makers_of, self.src, options.search.without(self.dst))
            runners = runners_for(self.model, self.models, makers, makes_streams, self.compute)
            if single:
                make = partial(decode_lc, runners, self.src, options=options, resume=resume)
                suffix = f".{options.image_format}"
                summary = make_single(make, self.dst, suffix, overwrite=resume.overwrite, is_ours=lambda _: False)
            else:
                summary = decode_lc(runners, self.src, self.dst, options, resume=resume)
        else:
            (runner,) = runners_for(
                self.model, self.models, lambda: {read_index(self.src / INDEX)[0].model_id}, has_id, self.compute
            )
            summary = decode_latents(runner, self.src, self.dst, options, resume=resume)
        say(summary)
        return 1 if summary.failures else 0
