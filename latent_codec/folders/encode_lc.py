"""Folders of images -> folders of `.lc` files, and back. One bad file never ends the work of the others."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from latent_codec.bitstream.container import SUFFIX
from latent_codec.bitstream.rate_control import Rate, compress_at_rate
from latent_codec.bitstream.refinement import Refiner
from latent_codec.bitstream.stream_codec import CompressedImage, StreamCodec, dither_seed
from latent_codec.errors import UserError
from latent_codec.folders.batching import in_batches
from latent_codec.folders.jobs import RESUME, Input, Job, Resume, Work
from latent_codec.folders.outputs import Output, make_outputs
from latent_codec.folders.read_images import parse_image_in
from latent_codec.folders.run import check_options
from latent_codec.folders.shards import are_whole
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Image, crop
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.images.sources import Source, find_images
from latent_codec.inference.out_of_memory import Halving
from latent_codec.inference.runner import Runner
from latent_codec.latents.format import stored_files
from latent_codec.model.checks import check_channels, check_unconditional
from latent_codec.model.codec import Codec
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import DEAD_ZONE, Scaled

T = TypeVar("T")


def encode_streams(
    runner: Runner,
    where: str | Path,
    folder: Path,
    *,
    rate: Rate,
    refine: int = 0,
    sample: int | None = None,
    prior: PriorKind | None = None,
    background: str = "#ffffff",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    tar: bool = False,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Compress every image found at `where`; `a/b.jpg` becomes `folder/a/b.jpg.lc`, or with `tar` a tar's member.

    The posterior's mean is rounded, or with `sample` dithered by (sample, name) alone: what is decoded is then a draw
    around it. `refine` are rounds of `refining.Refiner`, which move latents before they are rounded. `prior` is the
    kind to code under, by default the best the model has. Raises `UserError` before any work if nothing is found, an
    option makes no sense, the model has no such prior or is none of grey or RGB images, or `folder` holds latents; and
    as `outputs.make_outputs` does.
    """
    codec = runner.codec
    check_channels(codec)
    check_unconditional(codec, "a .lc file")
    check_options(background, max_pixels)
    if sample is not None and not 0 <= sample < 2**64:
        raise UserError(f"--sample {sample} is no seed of 64 bits; give one from 0 to {2**64 - 1}")
    if sample is not None and refine:
        raise UserError("--refine moves what is rounded, and --sample draws around the mean; leave out one of the two")
    _check_rate(codec, rate, sample)
    coder = StreamCodec(codec, runner.options.device, prior)
    refiner = Refiner(coder, runner, refine)
    sources = find_images(where)
    if stored_files(folder):
        raise UserError(f"{folder}: holds latents for training on; give another folder for .lc files")
    settings = {
        "stream_id": coder.stream_id.hex(),
        "rate": dataclasses.asdict(rate),
        "sample": sample,
        "dead_zone": DEAD_ZONE,
        "background": background,
    } | runner.settings
    settings |= {"refine": refine} if refine else {}
    settings |= {"feedback": coder.feedback.digest} if coder.feedback else {}
    options = {"factor": codec.factor, "background": background, "max_pixels": max_pixels}
    fitting, fitting_coder = Halving(), Halving()

    def encode(batch: list[Input[Image]]) -> Sequence[torch.Tensor]:
        return runner.encode([i.content.pixels for i in batch]).coded.unbind()

    def encoded(jobs: Iterable[Job], work: Work) -> Iterator[list[_Encoded]]:
        for batch in in_batches(
            jobs,
            Source.read_bytes,
            partial(parse_image_in, work.decoders, **options),
            batch_size=runner.options.batch_size,
            resume=resume,
            work=work,
            is_large=runner.cuts_pixels,
            is_whole=are_whole if tar else None,
        ):
            with work.summary.timing("network"):
                yield [_Encoded(*one) for one in fitting(encode, batch, math.prod(batch[0].shape))]

    def make(jobs: Iterable[Job], work: Work) -> Iterator[Output]:
        def code(batch: list[_Encoded]) -> list[tuple[Input[Image], CompressedImage | UserError]]:
            with work.summary.timing("coding"):
                return list(_coded(refiner, batch, rate, sample, runner.options.tile, fitting_coder))

        for _, future in work.coder.map(code, encoded(jobs, work), ahead=2):
            for item, coded in future.result():
                if isinstance(coded, UserError):
                    work.fail(item.job, coded)
                else:
                    geometry = item.content.geometry
                    data = partial(bytes, coded.data)
                    yield Output(item, f"{item.job.name}{SUFFIX}", data, geometry.width * geometry.height)

    names = [f"{s.name}{SUFFIX}" for s in sources]
    return make_outputs(
        "encode",
        "streams",
        sources,
        names,
        folder,
        settings,
        resume,
        make,
        tar=tar,
        compute=runner.options,
        quiet=quiet,
    )


def _check_rate(codec: Codec, rate: Rate, sample: int | None) -> None:
    """Raise `UserError` for what a codebook's indices leave no choice of."""
    given = [f"--{k.replace('_', '-')}" for k, v in dataclasses.asdict(rate).items() if v is not None]
    given += ["--sample"] if sample is not None else []
    if given and codec.config.codes is not None:
        raise UserError(
            f"{' and '.join(given)}: this model's files hold the indices of its {codec.config.codes} codes, which are "
            "neither rounded nor drawn; leave it out"
        )


class _Encoded(NamedTuple):
    item: Input[Image]
    mean: torch.Tensor | UserError
    """What is coded: of the posterior, (z, h, w), or a codebook's indices (1, h, w); or why there is none."""


def _coded(
    refiner: Refiner, batch: list[_Encoded], rate: Rate, sample: int | None, tile: int, fitting: Halving
) -> Iterator[tuple[Input[Image], CompressedImage | UserError]]:
    """Streams of images of one shape: together where all take one step, else one by one."""
    coder = refiner.coder
    scaled: list[tuple[Input[Image], Scaled]] = []
    elements = math.prod(batch[0].item.shape)

    def alone(call: Callable[[], T]) -> T:
        ((_, found),) = fitting(lambda _: [call()], [None], elements)
        if isinstance(found, UserError):
            raise found
        return found

    for item, mean in batch:
        name, (pixels, geometry) = item.job.name, item.content
        seed = None if sample is None else dither_seed(sample, name)
        try:
            if isinstance(mean, UserError):
                raise mean
            if not bool(torch.isfinite(mean).all()):
                raise UserError("the model's latents are not finite; try --dtype float32")
            shown = crop(pixels, geometry)
            scale = partial(refiner.scale, mean, shown, seed=seed)
            if rate.fixed_step is not None:
                scaled.append((item, alone(partial(scale, rate.fixed_step))))
            else:
                yield item, alone(partial(compress_at_rate, coder, scale, geometry, shown, rate, tile))
        except UserError as error:
            yield item, error

    def compress(images: list[tuple[Input[Image], Scaled]]) -> list[CompressedImage]:
        return coder.compress([(own, item.content.geometry) for item, own in images])

    for (item, _), coded in fitting(compress, scaled, elements):
        yield item, coded
