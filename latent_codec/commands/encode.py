"""Define the command `latent-codec encode`."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latent_codec.commands.options import ResumeOptions
from latent_codec.errors import UserError
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.program import say

_REFUSED = {
    "lc": (
        ("store", "flips", "channels", "resize", "crop", "buckets"),
        "for --format safetensors; a .lc file holds integers of one image in its own size",
    ),
    "safetensors": (
        ("quality", "step", "bpp", "psnr", "max_bytes", "refine", "sample", "prior", "tar"),
        "for --format lc; latents in safetensors keep the whole posterior, in shards",
    ),
}
"""Flags that a format takes no notice of, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Compress images to small .lc files, or encode them to latents in safetensors for training on."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """An image, a folder (its tree is kept), a tar file, or a quoted glob."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder for the outputs: a/b.jpg becomes a/b.jpg.lc. For one image, also a file's name that ends in .lc."""
    model: str = "photo"
    """Name of a shipped model, or a model file."""
    format: Literal["lc", "safetensors"] = "lc"
    """lc: one entropy-coded file per image. safetensors: shards of posterior means and log-variances to train on."""
    quality: int | None = None
    """lc: quality from 1 to 100 instead of --step: 50 is step 1, and 12.5 more halve the step."""
    step: float | None = None
    """lc: the quantiser step, by default 1; a larger step makes files smaller and images worse."""
    bpp: float | None = None
    """lc: find each image's step so that its file has at most this many bits per pixel, instead of --step."""
    psnr: float | None = None
    """lc: find each image's step so that it decodes with at least this PSNR in dB, instead of --step."""
    max_bytes: int | None = None
    """lc: limit every file to this size; the limit comes before --step, --bpp and --psnr."""
    refine: int = 0
    """lc: rounds of encoder-side optimisation, which improve files and take about 3 encodings' time each; try 3."""
    sample: int | None = None
    """lc: store a random draw around the posterior's mean, with this seed; by default the rounded mean."""
    prior: Literal["context", "factorized"] | None = None
    """lc: prior of the entropy coder: context makes smaller files, factorized is faster; by default the best one."""
    store: Literal["float16", "bfloat16", "float32"] | None = None
    """safetensors: number type on disk, by default float16."""
    flips: bool = False
    """safetensors: store the posteriors of the images mirrored left to right as well."""
    channels: int | None = None
    """safetensors: store only the first channels, a prefix of a model that has some; by default all."""
    resize: str | None = None
    """safetensors: scale each image until its shorter side is N, or until it just covers WxH."""
    crop: bool = False
    """safetensors: cut the centre square, or WxH, out of the images that --resize scaled."""
    buckets: str | None = None
    """safetensors: scale and crop as a trainer does: kohya-sdxl, kohya-sd, flux, musubi, or N for an area of NxN."""
    tar: bool = False
    """lc: put the files into tar shards of about 128 files each, as WebDataset reads them."""
    background: str = "#ffffff"
    """Colour that transparent images are composited on; alpha itself is not kept."""
    max_pixels: int = 2**27
    """Refuse larger images before they are decoded."""
    follow_links: bool = False
    """Search linked folders too, each once."""
    resume: tyro.conf.OmitArgPrefixes[ResumeOptions] = dataclasses.field(default_factory=ResumeOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        """Encode, print the summary and return the exit code."""
        flags, reason = _REFUSED[self.format]
        if given := [f"--{name.replace('_', '-')}" for name in flags if getattr(self, name) != getattr(Encode, name)]:
            raise UserError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} {reason}")
        from latent_codec.bitstream.container import SUFFIX, is_stream
        from latent_codec.bitstream.rate_control import Rate, step_of_quality
        from latent_codec.folders.encode_latents import LatentsOptions, encode_latents
        from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
        from latent_codec.folders.single import is_single, make_single
        from latent_codec.images.buckets import resize_options
        from latent_codec.images.read import ReadOptions
        from latent_codec.images.sources import ListOptions

        resize = resize_options(self.resize, self.crop, self.buckets)
        read = ReadOptions(background=self.background, max_pixels=self.max_pixels, resize=resize)
        search = ListOptions(follow_links=self.follow_links)
        if self.format == "lc":
            others = [f"--{name}" for name in ("step", "bpp", "psnr") if getattr(self, name) is not None]
            if self.quality is not None and others:
                raise UserError(f"--quality {self.quality} and {' and '.join(others)} each decide; give one of them")
            step = self.step if self.quality is None else step_of_quality(self.quality)
            rate = Rate(step=step, bpp=self.bpp, psnr=self.psnr, max_bytes=self.max_bytes)
            options = EncodeOptions(
                rate=rate,
                refine=self.refine,
                sample=self.sample,
                prior=self.prior,
                read=read,
                tar=self.tar,
                search=search,
            )
            encode = partial(encode_lc, options=options)
        else:
            store = self.store or "float16"
            options = LatentsOptions(store=store, flips=self.flips, channels=self.channels, read=read, search=search)
            encode = partial(encode_latents, options=options)
        resume = self.resume.resume()
        if self.format == "lc" and not self.tar and is_single(self.src, self.dst, (SUFFIX,)):
            runner = load(self.model, self.compute)
            make = partial(encode, runner, self.src, resume=resume)
            summary = make_single(make, self.dst, SUFFIX, overwrite=resume.overwrite, is_ours=is_stream)
        else:
            summary = encode(load(self.model, self.compute), self.src, self.dst, resume=resume)
        say(summary)
        return 1 if summary.failures else 0
