"""The command line. Nothing here imports torch until a command runs, so that --help answers at once."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal, Union

import tyro

from latent_codec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compute:
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks; posteriors are float32 always."""
    batch_size: int = 8
    workers: int = 4
    """Threads that read and write image files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Compress images to stochastic latents: the posterior's mean and log-variance, for training on."""

    src: tyro.conf.Positional[str]
    """An image, a folder (its tree is kept), a tar file, or a quoted glob."""
    dst: tyro.conf.Positional[Path]
    """Folder for the safetensors shards and their index."""
    model: str = "photo"
    """A shipped model's name or a file."""
    format: Literal["safetensors"] = "safetensors"
    store: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number type on disk."""
    background: str = "#ffffff"
    """Colour that transparent images are laid on; alpha itself is not kept."""
    max_pixels: int = 2**27
    """Larger images are refused before they are decoded."""
    overwrite: bool = False
    compute: tyro.conf.OmitArgPrefixes[_Compute] = _Compute()

    def run(self) -> int:
        from latent_codec.compression import encode_folder

        codec, compute = _load(self.model, self.compute)
        summary = encode_folder(
            codec,
            self.src,
            self.dst,
            compute,
            store=self.store,
            background=self.background,
            max_pixels=self.max_pixels,
            overwrite=self.overwrite,
        )
        print(summary)
        return 1 if summary.failures else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode a folder of latents to images; names are kept whole: a.jpg becomes a.jpg.png."""

    src: tyro.conf.Positional[Path]
    """Folder that `encode` wrote."""
    dst: tyro.conf.Positional[Path]
    model: str = "photo"
    """The model that made the latents."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    sample: int | None = None
    """Decode a draw from the posterior with this seed; by default its mode."""
    overwrite: bool = False
    compute: tyro.conf.OmitArgPrefixes[_Compute] = _Compute()

    def run(self) -> int:
        from latent_codec.compression import decode_folder

        codec, compute = _load(self.model, self.compute)
        summary = decode_folder(
            codec,
            self.src,
            self.dst,
            compute,
            image_format=self.image_format,
            sample=self.sample,
            overwrite=self.overwrite,
        )
        print(summary)
        return 1 if summary.failures else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a model file, a folder of latents or one of its shards is."""

    file: tyro.conf.Positional[str]

    def run(self) -> int:
        from latent_codec.info import describe

        print(describe(self.file))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model on a folder of images: PSNR, SSIM, MS-SSIM, LPIPS, KL and bytes on disk in bits per pixel.

    With --rd: whole .lc files at several steps, decoded again, with JPEG, WebP and AVIF beside them on the same images.
    """

    model: tyro.conf.Positional[str]
    dir: tyro.conf.Positional[str]
    out: Path | None = None
    """Folder for results.json, the latents and the reconstructions; with --rd for rd.json and rd.png."""
    rd: bool = False
    """Rate-distortion curves; needs the extra `rd`."""
    steps: tuple[float, ...] = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
    """Quantiser steps of --rd."""
    sample: int = 0
    """Seed of the dither in the row of --rd that has one, at step 1."""
    lpips_net: Literal["alex", "squeeze", "vgg", "none"] = "alex"
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""
    compute: tyro.conf.OmitArgPrefixes[_Compute] = _Compute()

    def run(self) -> int:
        report = self._rate_distortion() if self.rd else self._evaluate()
        print(report.table())
        return 1 if report.failures else 0

    def _evaluate(self):
        from latent_codec.evaluation import evaluate

        codec, compute = _load(self.model, self.compute)
        return evaluate(codec, self.dir, compute, out=self.out, lpips_net=self._net, lpips_backbone=self.lpips_backbone)

    def _rate_distortion(self):
        from latent_codec.ratedistortion import rate_distortion

        command = ["latent-codec", "evaluate", self.model, self.dir, "--rd", "--steps", *(f"{s:g}" for s in self.steps)]
        command += ["--sample", str(self.sample), "--lpips-net", self.lpips_net]
        if self.lpips_backbone is not None:
            command += ["--lpips-backbone", str(self.lpips_backbone)]
        codec, compute = _load(self.model, self.compute)
        return rate_distortion(
            codec,
            self.dir,
            compute,
            steps=self.steps,
            sample=self.sample,
            out=self.out,
            lpips_net=self._net,
            lpips_backbone=self.lpips_backbone,
            command=shlex.join(command),
        )

    @property
    def _net(self) -> Literal["alex", "squeeze", "vgg"] | None:
        return None if self.lpips_net == "none" else self.lpips_net


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Turn a training run (its averaged weights) or a model into one self-describing model file."""

    source: tyro.conf.Positional[Path]
    """A run's folder, or a model file."""
    dst: tyro.conf.Positional[Path]
    data: tuple[Path, ...] = ()
    """Images (folders or tar files) to measure latent statistics on; a model keeps those it has without it."""
    images: int = 256
    """How many of them, from the first."""
    half: bool = False
    """Store float16."""

    def run(self) -> int:
        from latent_codec.export import export

        codec = export(self.source, self.dst, data=self.data, images=self.images, half=self.half)
        print(f"wrote {self.dst} ({self.dst.stat().st_size / 1e6:.2f} MB), model {codec.model_id}")
        return 0


Command = Union[
    Annotated[Encode, tyro.conf.subcommand("encode")],
    Annotated[Decode, tyro.conf.subcommand("decode")],
    Annotated[Info, tyro.conf.subcommand("info")],
    Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
    Annotated[Export, tyro.conf.subcommand("export")],
]


def main(args: list[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (some images failed), 2 (usage or a user's mistake) or 130 (Ctrl-C)."""
    from latent_codec import __version__

    if (args if args is not None else sys.argv[1:]) == ["--version"]:
        print(f"latent-codec {__version__}")
        return
    command: Command = tyro.cli(Command, prog="latent-codec", args=args, description=_DESCRIPTION)  # pyright: ignore
    try:
        code = command.run()
    except (UserError, OSError) as error:  # an OSError is a full disk, a missing permission and the like
        print(f"latent-codec: {' '.join(str(error).splitlines())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("latent-codec: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


_DESCRIPTION = "Image VAEs: compress images to stochastic latents, decode them, measure and export models."


def _load(model: str, options: _Compute):
    """The codec on its device, and the `Compute` that says how it runs; raises `UserError` for what cannot be."""
    import torch

    from latent_codec.codec import Codec
    from latent_codec.compression import Compute

    if options.batch_size < 1 or options.workers < 1:
        raise UserError(f"--batch-size {options.batch_size} and --workers {options.workers} must both be at least 1")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device} is not usable: {str(error).splitlines()[0]}") from error
    codec = Codec.load(model, device).to(memory_format=torch.channels_last)
    return codec, Compute(device, options.dtype, options.batch_size, options.workers)


if __name__ == "__main__":
    main()
