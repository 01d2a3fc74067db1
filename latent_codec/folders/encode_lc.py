"""Encode folders of images to `.lc` files. One bad image never ends the work of the others."""

import dataclasses
import math
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latent_codec.bitstream.container import SUFFIX
from latent_codec.bitstream.rate_control import Rate, compress_at_rate
from latent_codec.bitstream.refinement import Refiner
from latent_codec.bitstream.stream_codec import CompressedImage, StreamCodec, dither_seed
from latent_codec.errors import UserError
from latent_codec.folders.jobs import Input, Resume, Shape, Work
from latent_codec.folders.outputs import Output, make_outputs
from latent_codec.folders.read_images import ImageReader
from latent_codec.folders.resume.ledger import Kind
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes
from latent_codec.images.geometry import Image, crop
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import ListOptions, Source, list_images
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner
from latent_codec.latents.format import stored_files
from latent_codec.model.checks import check_channels, check_unconditional
from latent_codec.model.finite import check_finite
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import DEAD_ZONE, Scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Choose how images become `.lc` files; raises `UserError` for values that make no sense."""

    rate: Rate = dataclasses.field(default_factory=Rate)
    refine: int = 0
    """Rounds of `Refiner`, which moves latents before they are rounded."""
    sample: int | None = None
    """Seed of a dither that depends on (sample, name) alone, so that a file holds a draw around the posterior's mean;
    None rounds the mean."""
    prior: PriorKind | None = None
    """Kind of prior to code under, by default the best the model has."""
    read: ReadOptions = ReadOptions()
    search: ListOptions = ListOptions()
    tar: bool = False
    """Put the files into tar shards."""

    def __post_init__(self) -> None:
        if self.sample is not None and not 0 <= self.sample < 2**64:
            raise UserError(f"--sample {self.sample} is no seed of 64 bits; give one from 0 to {2**64 - 1}")
        if self.sample is not None and self.refine:
            raise UserError("--refine moves what is rounded, and --sample draws around the mean; leave out one of them")


def encode_lc(
    runner: Runner,
    where: str | Path,
    folder: Path,
    options: EncodeOptions = EncodeOptions(),
    *,
    resume: Resume = Resume(),
    quiet: bool = False,
) -> Summary:
    """Compress every image found at `where`; `a/b.jpg` becomes `folder/a/b.jpg.lc`, or the member of a tar shard.

    Raises `UserError` before any work if nothing is found, the model has no such prior or is none of grey or RGB
    images, its files leave no choice of an option, or `folder` holds latents; and as `make_outputs` does.
    """
    check_channels(runner.codec)
    check_unconditional(runner.codec, "a .lc file")
    given = [f"--{k.replace('_', '-')}" for k, v in dataclasses.asdict(options.rate).items() if v is not None]
    given += ["--sample"] if options.sample is not None else []
    if given and runner.codec.config.codes is not None:
        raise UserError(
            f"{' and '.join(given)}: this model's files hold the indices of its {runner.codec.config.codes} codes, "
            "which are neither rounded nor drawn; leave it out"
        )
    encoder = _LcEncoder(runner, options)
    if stored_files(folder):
        raise UserError(f"{folder}: holds latents for training on; give another folder for .lc files")
    listing = list_images(where, options.search.without(folder))
    return make_outputs(listing, folder, encoder, tar=options.tar, resume=resume, quiet=quiet)


_EncodedImage = tuple[Input[Image], torch.Tensor | UserError]
"""An image and its posterior's mean (z, h, w) or a codebook's indices (1, h, w); or why it has none."""


_LONGEST_NAME = 255 - len(".png")
"""Bytes of a name, of the 255 that file systems allow, that a decoded image's name begins with."""


class _LcEncoder(ImageReader):
    """Make `.lc` files of images: networks in this thread, entropy coding in another."""

    kind: Kind = "streams"

    def __init__(self, runner: Runner, options: EncodeOptions) -> None:
        super().__init__(runner, options.read)
        self._options = options
        self._coder = StreamCodec(runner.codec, runner.options.device, options.prior)
        self._refiner = Refiner(self._coder, runner, options.refine)
        self._network_backoff, self._coder_backoff = OutOfMemoryBackoff(), OutOfMemoryBackoff()

    @property
    def settings(self) -> dict[str, Any]:
        """Return what a file depends on beside its image, as JSON."""
        settings: dict[str, Any] = {
            "stream_id": self._coder.stream_id.hex(),
            "rate": dataclasses.asdict(self._options.rate),
            "sample": self._options.sample,
            "dead_zone": DEAD_ZONE,
            "background": self._options.read.background,
        } | self.runner.settings
        settings |= {"refine": self._options.refine} if self._options.refine else {}
        return settings | ({"feedback": self._coder.feedback.digest} if self._coder.feedback else {})

    def name(self, source: str) -> str:
        return f"{source}{SUFFIX}"

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, Image]:
        """Raise `UserError` also for a name that leaves no room for that of the decoded image."""
        size = len(os.fsencode(posixpath.basename(source.name)))
        if not self._options.tar and size > _LONGEST_NAME:
            raise UserError(
                f"{source.name}: its name of {size} bytes leaves no room for the decoded image's .png; give it one of "
                f"{_LONGEST_NAME} bytes or fewer, or encode with --tar"
            )
        return super().parse(source, data, decoders)

    def make(self, batches: Iterable[list[Input[Image]]], work: Work) -> Iterator[Output]:
        code = partial(self._code, work=work)
        for _, future in work.coder.map(code, self._encode_all(batches, work), ahead=2):
            for item, coded in work.sound(future.result()):
                geometry = item.content.geometry
                data = partial(bytes, coded.data)
                yield Output(item, self.name(item.job.name), data, geometry.width * geometry.height)

    def _encode_all(self, batches: Iterable[list[Input[Image]]], work: Work) -> Iterator[list[_EncodedImage]]:
        for batch in batches:
            with work.summary.timing("network"):
                images = list(self._network_backoff.map(self._encode, batch, math.prod(batch[0].shape)))
            yield images

    def _encode(self, batch: list[Input[Image]]) -> Sequence[torch.Tensor]:
        return self.runner.encode([item.content.pixels for item in batch]).coded.unbind()

    def _code(self, batch: list[_EncodedImage], work: Work) -> list[tuple[Input[Image], CompressedImage | UserError]]:
        """Compress images of one shape, together where all take one step."""
        results: list[tuple[Input[Image], CompressedImage | UserError]] = []
        scaled: list[tuple[Input[Image], Scaled]] = []
        with work.summary.timing("coding"):
            for item, latents in batch:
                try:
                    found = self._scale_or_compress(item, latents)
                except UserError as error:
                    found = error
                if isinstance(found, Scaled):
                    scaled.append((item, found))
                else:
                    results.append((item, found))
            elements = math.prod(batch[0][0].shape)
            compressed = self._coder_backoff.map(self._compress, scaled, elements)
            results += [(item, coded) for (item, _), coded in compressed]
        return results

    def _scale_or_compress(self, item: Input[Image], coded: torch.Tensor | UserError) -> Scaled | CompressedImage:
        """Return what is coded at the step that all images take, or the file that the rate asks for."""
        if isinstance(coded, UserError):
            raise coded
        check_finite(coded, "the model's latents are")
        options, (pixels, geometry) = self._options, item.content
        seed = None if options.sample is None else dither_seed(options.sample, item.job.name)
        shown = crop(pixels, geometry)
        scale = partial(self._refiner.scale, coded, shown, seed=seed)
        if options.rate.fixed_step is not None:
            return self._coder_backoff.call(partial(scale, options.rate.fixed_step))
        tile = self.runner.options.tile
        return self._coder_backoff.call(
            partial(compress_at_rate, self._coder, scale, geometry, shown, options.rate, tile)
        )

    def _compress(self, images: list[tuple[Input[Image], Scaled]]) -> list[CompressedImage]:
        return self._coder.compress([(scaled, item.content.geometry) for item, scaled in images])
