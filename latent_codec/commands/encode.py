"""Folders of images, streams and latents: encode, decode, convert."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from latent_codec.commands.options import ResumeOptions
from latent_codec.errors import UserError
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Compress images: to small .lc files, or to latents in safetensors for training on."""

    src: tyro.conf.Positional[str]
    """An image, a folder (its tree is kept), a tar file, or a quoted glob."""
    dst: tyro.conf.Positional[Path]
    """Folder for the outputs: a/b.jpg becomes a/b.jpg.lc."""
    model: str = "photo"
    """A shipped model's name or a file."""
    format: Literal["lc", "safetensors"] = "lc"
    """Entropy-coded files, one an image; or the posteriors' means and log-variances in shards under an index."""
    step: float | None = None
    """lc: the quantiser's step; larger is smaller and worse, 1 is the default."""
    bpp: float | None = None
    """lc: find each image's step so that its file has at most this many bits per pixel, instead of --step."""
    psnr: float | None = None
    """lc: find each image's step so that it decodes with at least this PSNR in dB, instead of --step."""
    max_bytes: int | None = None
    """lc: no file exceeds this; it comes before --step, --bpp and --psnr."""
    refine: int = 0
    """lc: rounds of moving the latents by what the decoder makes of them before they are rounded: better files of about
    the same size, for two decodings' time or three each; 3 is usual."""
    sample: int | None = None
    """lc: store a draw around the posterior's mean, by this seed and the image's name; by default the mean, rounded."""
    prior: Literal["context", "factorized"] | None = None
    """lc: what the entropy coder goes by: context is smaller, factorized faster; by default the best of the model's."""
    store: Literal["float16", "bfloat16", "float32"] | None = None
    """safetensors: number type on disk, by default float16."""
    flips: bool = False
    """safetensors: store the posteriors of the images mirrored left to right as well."""
    tar: bool = False
    """lc: put the files into tar shards, as WebDataset reads them, about 128 in each."""
    background: str = "#ffffff"
    """Colour that transparent images are laid on; alpha itself is not kept."""
    max_pixels: int = 2**27
    """Larger images are refused before they are decoded."""
    resume: tyro.conf.OmitArgPrefixes[ResumeOptions] = dataclasses.field(default_factory=ResumeOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        summary = self._to_streams() if self.format == "lc" else self._to_latents()
        print(summary)
        return 1 if summary.failures else 0

    def _to_streams(self):
        self._refuse(("store",), "for --format safetensors; a .lc file's numbers are integers")
        if self.flips:
            raise UserError("--flips is for --format safetensors; a .lc file is of one image")
        from latent_codec.bitstream.rate_control import Rate
        from latent_codec.folders.encode_lc import encode_streams

        rate = Rate(step=self.step, bpp=self.bpp, psnr=self.psnr, max_bytes=self.max_bytes)
        runner = load(self.model, self.compute)
        return encode_streams(
            runner,
            self.src,
            self.dst,
            rate=rate,
            refine=self.refine,
            sample=self.sample,
            prior=self.prior,
            background=self.background,
            max_pixels=self.max_pixels,
            tar=self.tar,
            resume=self.resume.options(),
        )

    def _to_latents(self):
        flags = ("step", "bpp", "psnr", "max_bytes", "sample", "prior")
        self._refuse(flags, "for --format lc; latents in safetensors keep the whole posterior")
        if self.refine:
            raise UserError("--refine is for --format lc; latents in safetensors keep the whole posterior")
        if self.tar:
            raise UserError("--tar is for --format lc; latents in safetensors are in shards as it is")
        from latent_codec.folders.encode_latents import encode_folder

        runner = load(self.model, self.compute)
        return encode_folder(
            runner,
            self.src,
            self.dst,
            store=self.store or "float16",
            flips=self.flips,
            background=self.background,
            max_pixels=self.max_pixels,
            resume=self.resume.options(),
        )

    def _refuse(self, fields: tuple[str, ...], reason: str) -> None:
        """Raise `UserError` if any of these was given."""
        if given := [f"--{name.replace('_', '-')}" for name in fields if getattr(self, name) is not None]:
            raise UserError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} {reason}")
