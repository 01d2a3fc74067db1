"""The command line. Nothing here imports torch until a command runs, so that --help answers at once."""

import dataclasses
import gc
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal, Union

import tyro

from latent_codec.caches.options import CacheName, Options
from latent_codec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compute:
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks; posteriors are float32 always."""
    batch_size: int = 8
    workers: int | None = None
    """Images that are read, decoded and written at once, by default 4, with a GPU one a core up to 16."""
    decode_in: Literal["threads", "processes"] | None = None
    """Where images are decoded, by default in threads, with a GPU, which outruns threads, in processes."""
    compile: bool = False
    """Have torch compile the networks: slow to start, then faster; results differ in their last bits."""
    tile: int | None = None
    """Side in pixels of the tiles that larger images are cut into, by default 1536; only results of conv change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Resume:
    check: Literal["hash", "mtime"] = "hash"
    """What tells a repeated command that an output is done: the bytes of it and its source, or sizes and times."""
    shard: str | None = None
    """i/n, from 0/n: do this part of the work only; n processes need not know of each other."""
    overwrite: bool = False
    """Make everything again, and replace files that were there before."""

    def options(self):
        from latent_codec.pipeline import Resume
        from latent_codec.plan import Share

        share = Share.of_launcher() if self.shard is None else Share.parse(self.shard)
        return Resume(self.check, self.overwrite, share)


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
    resume: tyro.conf.OmitArgPrefixes[_Resume] = _Resume()
    compute: tyro.conf.OmitArgPrefixes[_Compute] = _Compute()

    def run(self) -> int:
        summary = self._to_streams() if self.format == "lc" else self._to_latents()
        print(summary)
        return 1 if summary.failures else 0

    def _to_streams(self):
        self._refuse(("store",), "for --format safetensors; a .lc file's numbers are integers")
        if self.flips:
            raise UserError("--flips is for --format safetensors; a .lc file is of one image")
        from latent_codec.lc_folder import encode_streams
        from latent_codec.rate import Rate

        rate = Rate(step=self.step, bpp=self.bpp, psnr=self.psnr, max_bytes=self.max_bytes)
        codec, compute = _load(self.model, self.compute)
        return encode_streams(
            codec,
            self.src,
            self.dst,
            compute,
            rate=rate,
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
        if self.tar:
            raise UserError("--tar is for --format lc; latents in safetensors are in shards as it is")
        from latent_codec.compression import encode_folder

        codec, compute = _load(self.model, self.compute)
        return encode_folder(
            codec,
            self.src,
            self.dst,
            compute,
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
    resume: tyro.conf.OmitArgPrefixes[_Resume] = _Resume()
    compute: tyro.conf.OmitArgPrefixes[_Compute] = _Compute()

    def run(self) -> int:
        from latent_codec.compression import decode_folder
        from latent_codec.lc_folder import decode_streams, is_streams

        streams = is_streams(self.src)
        if streams and self.sample is not None:
            raise UserError(
                f"{self.src}: what a .lc file draws is decided when it is made; give --sample to encode, not to decode"
            )
        codec, compute = _load(self.model, self.compute)
        if streams:
            summary = decode_streams(
                codec,
                self.src,
                self.dst,
                compute,
                image_format=self.image_format,
                max_pixels=self.max_pixels,
                tar=self.tar,
                resume=self.resume.options(),
            )
        else:
            summary = decode_folder(
                codec,
                self.src,
                self.dst,
                compute,
                image_format=self.image_format,
                sample=self.sample,
                tar=self.tar,
                resume=self.resume.options(),
            )
        print(summary)
        return 1 if summary.failures else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a model file, a .lc file or a folder of them, or latents are."""

    file: tyro.conf.Positional[str]
    model: str | None = None
    """For .lc files: the model that is compared with theirs, by default photo."""

    def run(self) -> int:
        from latent_codec.info import describe

        print(describe(self.file, self.model))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Report:
    report: bool = False
    """Write report.html into --out: one page that opens without a network; and report.json with the same numbers."""
    report_images: int = 6
    """Images in the report's pictures, spread evenly over all."""
    bound_images: int = 16
    """Images of which the report bounds the likelihood, spread evenly over all."""
    bound_samples: int = 50
    """Importance samples for each of them, up to thousands."""
    baseline: tuple[str, ...] = ()
    """Models to set beside this one in the report, such as an autoencoder of the same latent size."""
    baseline_data: str | None = None
    """Images that the report's PCA is fitted to, by default one half of DIR to be measured on the other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model on a folder of images: PSNR, SSIM, MS-SSIM, LPIPS, KL and bytes on disk in bits per pixel.

    With --rd: whole .lc files at several steps, decoded again, with JPEG, WebP and AVIF beside them on the same images.
    With --report: all that tells whether a model works, in one page with pictures.
    """

    model: tyro.conf.Positional[str]
    dir: tyro.conf.Positional[str]
    out: Path | None = None
    """Folder for results.json, the latents, the reconstructions and the report; with --rd for rd.json and rd.png."""
    rd: bool = False
    """Rate-distortion curves; needs the extra `rd`."""
    steps: tuple[float, ...] = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
    """Quantiser steps of --rd."""
    sample: int = 0
    """Seed of the dither in the row of --rd that has one, at step 1, and of all that the report draws."""
    lpips_net: Literal["alex", "squeeze", "vgg", "none"] = "alex"
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""
    pages: tyro.conf.OmitArgPrefixes[_Report] = _Report()
    compute: tyro.conf.OmitArgPrefixes[_Compute] = _Compute()

    def run(self) -> int:
        if self.pages.report:
            return self._report()
        report = self._rate_distortion() if self.rd else self._evaluate()
        print(report.table())
        return 1 if report.failures else 0

    def _report(self) -> int:
        if self.out is None:
            raise UserError("--report needs a folder to write report.html into; give --out DIR")
        from latent_codec.curves import check_extra

        check_extra()
        from latent_codec.inputs import find_images
        from latent_codec.report import Evaluated, Options, write_report

        options = Options(
            report_images=self.pages.report_images,
            bound_images=self.pages.bound_images,
            bound_samples=self.pages.bound_samples,
            baseline_data=self.pages.baseline_data,
            seed=self.sample,
        )
        if options.baseline_data is not None:
            find_images(options.baseline_data)  # refuses what it cannot find before anything is measured
        others = [(name, _load(name, self.compute)[0]) for name in self.pages.baseline]
        report = self._evaluate()
        rd = self._rate_distortion() if self.rd else None
        print(report.table())
        codec, compute = _load(self.model, self.compute)
        write_report(
            Evaluated(codec, self.model, self.dir, report, rd, self._command(*self._report_flags())),
            self.out,
            compute,
            options,
            others,
            lpips_net=self._net,
            lpips_backbone=self.lpips_backbone,
        )
        print(f"wrote {self.out / 'report.html'}")
        return 1 if report.failures else 0

    def _evaluate(self):
        from latent_codec.evaluation import evaluate

        codec, compute = _load(self.model, self.compute)
        return evaluate(codec, self.dir, compute, out=self.out, lpips_net=self._net, lpips_backbone=self.lpips_backbone)

    def _rate_distortion(self):
        from latent_codec.ratedistortion import rate_distortion

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
            command=self._command("--rd", "--steps", *(f"{s:g}" for s in self.steps)),
        )

    def _report_flags(self) -> list[str]:
        numbers = ("report_images", "bound_images", "bound_samples")
        flags = ["--report", *(f"--{n.replace('_', '-')}={getattr(self.pages, n)}" for n in numbers)]
        flags += ["--rd", "--steps", *(f"{s:g}" for s in self.steps)] if self.rd else []
        flags += ["--baseline", *self.pages.baseline] if self.pages.baseline else []
        return flags + (["--baseline-data", self.pages.baseline_data] if self.pages.baseline_data else [])

    def _command(self, *flags: str) -> str:
        """What makes the same results again; where they go and how fast is not part of it."""
        command = ["latent-codec", "evaluate", self.model, self.dir, *flags]
        command += ["--sample", str(self.sample), "--lpips-net", self.lpips_net]
        if self.lpips_backbone is not None:
            command += ["--lpips-backbone", str(self.lpips_backbone)]
        return shlex.join(command)

    @property
    def _net(self) -> Literal["alex", "squeeze", "vgg"] | None:
        return None if self.lpips_net == "none" else self.lpips_net


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Turn a training run (its averaged weights) or a model into one self-describing model file."""

    source: tyro.conf.Positional[Path]
    """A run's folder, or a model file."""
    dst: tyro.conf.Positional[Path]
    """A model file; with --to diffusers a folder."""
    to: Literal["safetensors", "diffusers"] = "safetensors"
    """A model file of ours, or the folder of an AutoencoderKL for pipelines of diffusers."""
    data: tuple[Path, ...] = ()
    """Images (folders or tar files) to measure latent statistics on; a model keeps those it has without it."""
    images: int = 256
    """How many of them, from the first."""
    half: bool = False
    """Store float16."""
    fold: bool = True
    """diffusers: latents normalised within the model, right for any pipeline; without, they stay as they are, and
    scaling_factor, shift_factor and (4 channels) latents_mean and latents_std tell the pipeline what to do."""

    def run(self) -> int:
        if self.to == "diffusers":
            return self._to_diffusers()
        if not self.fold:
            raise UserError("--no-fold is for --to diffusers; a model file of ours keeps its latents as they are")
        from latent_codec.export import export

        codec = export(self.source, self.dst, data=self.data, images=self.images, half=self.half)
        print(f"wrote {self.dst} ({self.dst.stat().st_size / 1e6:.2f} MB), model {codec.model_id}")
        return 0

    def _to_diffusers(self) -> int:
        from latent_codec.autoencoder_kl.exporting import check_folder, export_folder
        from latent_codec.export import calibration_images, prepare

        check_folder(self.dst)
        codec = prepare(self.source, data=self.data, images=self.images)
        images = calibration_images(codec, self.data, self.images)
        measured = export_folder(codec, self.dst, images=images, normalize=self.fold, half=self.half)
        print(f"wrote {self.dst}, an AutoencoderKL; {measured}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Turn an AutoencoderKL (diffusers' folder, or a safetensors file in its or the original layout) into a model file.

    What `export --to diffusers` wrote becomes the model that it was.
    """

    src: tyro.conf.Positional[Path]
    """A folder with config.json, or one safetensors file: an autoencoder's, or a whole checkpoint with one in it."""
    dst: tyro.conf.Positional[Path]
    """A model file."""
    scaling_factor: float | None = None
    """What pipelines multiply its latents by, if no config.json says it: latents get statistics by it."""
    shift_factor: float | None = None
    """What pipelines subtract before that."""
    half: bool = False
    """Store float16."""

    def run(self) -> int:
        from latent_codec.autoencoder_kl.importing import import_model

        codec = import_model(
            self.src,
            self.dst,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            half=self.half,
        )
        print(f"wrote {self.dst} ({self.dst.stat().st_size / 1e6:.2f} MB), model {codec.model_id}")
        print(f"  {codec.config.backbone}, {codec.config.latent_channels} latent channels")
        statistics = codec.statistics
        print(f"  latent statistics: {statistics.source if statistics else 'none; measure them with export --data'}")
        return 0


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
    compute: tyro.conf.OmitArgPrefixes[_Compute] = _Compute()

    def run(self) -> int:
        from latent_codec.diffusion.sampling import choose, load, sample, write_grid_of

        codec, compute = _load(self.model, self.compute)
        diffusion = load(self.run_or_file, compute.device)
        wanted = choose(diffusion, self.label, self.count)
        drawn = sample(
            diffusion,
            codec,
            wanted,
            self.dst,
            compute,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            image_format=self.image_format,
            overwrite=self.overwrite,
        )
        print(drawn)
        if self.grid is not None:
            write_grid_of(drawn.paths, self.count, self.grid)
            print(f"wrote {self.grid}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Write latents as other programs train from them; with --from make latents of such files."""

    src: tyro.conf.Positional[Path]
    """Latents that `encode --format safetensors` made; with --from what another program made."""
    dst: tyro.conf.Positional[Path]
    """A folder."""
    to: CacheName | None = None
    from_: Annotated[CacheName | None, tyro.conf.arg(name="from")] = None
    model: str | None = None
    """from: the model whose latents they are."""
    arch: str | None = None
    """kohya: sd, sdxl or flux. musubi: hv, hv15, wan, qi, kr2, zi, f2d, f2k4b or f2k9b."""
    scale: Literal["raw", "normalized"] | None = None
    """npy, webdataset: latents as the model gives them, or scaled."""
    scaling_factor: float | None = None
    """Where latents are scaled: (z - shift) * factor, instead of each channel by the model's statistics."""
    shift_factor: float | None = None
    seed: int | None = None
    """to: of the draw, by default 0; MAR and EDM2 take the whole posterior."""
    epoch: int | None = None
    """to: draws of different epochs are independent; by default 0."""
    store: Literal["float16", "bfloat16", "float32"] | None = None
    """from: number type on disk, by default float16."""
    overwrite: bool = False
    """Replace files that are there already and differ."""

    def run(self) -> int:
        if (self.to is None) == (self.from_ is None):
            raise UserError("give either --to and the name of a program, or --from and one")
        converted = self._to(self.to) if self.to is not None else self._from()
        for note in converted.notes:
            print(note)
        print(converted.summary)
        return 1 if converted.summary.failures else 0

    def _options(self) -> Options:
        fields = (field.name for field in dataclasses.fields(Options))
        return Options(**{name: getattr(self, name) for name in fields})

    def _to(self, name: CacheName):
        if self.model is not None or self.store is not None:
            raise UserError("--model and --store are for --from; --to writes latents as they were stored")
        from latent_codec.caches.convert import convert

        return convert(self.src, self.dst, name, self._options(), overwrite=self.overwrite)

    def _from(self):
        assert self.from_ is not None
        if self.model is None:
            raise UserError("no cache says for certain which model its latents are of; give --model")
        from latent_codec.caches.recover import recover
        from latent_codec.codec import Codec

        codec, store = Codec.load(self.model), self.store or "float16"
        return recover(self.src, self.dst, self.from_, codec, self._options(), store=store, overwrite=self.overwrite)


Command = Union[
    Annotated[Encode, tyro.conf.subcommand("encode")],
    Annotated[Decode, tyro.conf.subcommand("decode")],
    Annotated[Info, tyro.conf.subcommand("info")],
    Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
    Annotated[Export, tyro.conf.subcommand("export")],
    Annotated[Import, tyro.conf.subcommand("import")],
    Annotated[Sample, tyro.conf.subcommand("sample")],
    Annotated[Convert, tyro.conf.subcommand("convert")],
]


def main(args: list[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (some images failed), 2 (usage or a user's mistake) or 130 (Ctrl-C)."""
    from latent_codec import __version__

    if (args if args is not None else sys.argv[1:]) == ["--version"]:
        print(f"latent-codec {__version__}")
        return
    command: Command = tyro.cli(Command, prog="latent-codec", args=args, description=_DESCRIPTION)  # pyright: ignore
    _import_torch()
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


def _import_torch() -> None:
    """What every command needs; its objects, which stay, are kept from the garbage collector, then and later."""
    if "torch" not in sys.modules:
        gc.disable()
        import torch  # noqa: F401

        gc.freeze()
        gc.enable()


def _load(model: str, options: _Compute):
    """The codec on its device, and the `Compute` that says how it runs; raises `UserError` for what cannot be."""
    import torch

    from latent_codec.codec import Codec
    from latent_codec.compute import Compute
    from latent_codec.tiling import default_tile

    if options.batch_size < 1 or (options.workers is not None and options.workers < 1):
        raise UserError(f"--batch-size {options.batch_size} and --workers {options.workers} must both be at least 1")
    device = options.device or ("cpu" if not torch.cuda.is_available() else _own_gpu(torch.cuda.device_count()))
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device} is not usable: {str(error).splitlines()[0]}") from error
    codec = Codec.load(model, device).to(memory_format=torch.channels_last)
    tile = default_tile(codec) if options.tile is None else options.tile
    on_cpu = device.startswith("cpu")
    workers = options.workers or (4 if on_cpu else max(1, min(16, _own_cores())))
    decode_in = options.decode_in or ("threads" if on_cpu else "processes")
    return codec, Compute(device, options.dtype, options.batch_size, workers, tile, decode_in, options.compile)


def _own_cores() -> int:
    """Of the machine's cores those for this process, which shares them with the others of its launcher."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return cores // max(1, int(processes) if processes.isdecimal() else 1)


def _own_gpu(count: int) -> str:
    """Of several processes that a launcher started on one machine each has another."""
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % count}" if rank.isdecimal() else "cuda"


if __name__ == "__main__":
    main()
