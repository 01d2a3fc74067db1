"""Decode folders of `.lc` files to images. One bad file never ends the work of the others."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from latent_codec.bitstream import container
from latent_codec.bitstream.container import SUFFIX, Stream
from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import UserError
from latent_codec.folders.decode_images import DecodeOptions, ImageDecoder, Latent
from latent_codec.folders.jobs import Input, Resume, Shape, Work
from latent_codec.folders.outputs import Output, make_outputs
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes
from latent_codec.images.sources import Listing, ListOptions, Source, list_files
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner
from latent_codec.latents.format import INDEX
from latent_codec.model.checks import check_channels, check_unconditional
from latent_codec.prior.priors import PriorKind

PRIORS = get_args(PriorKind)


def decode_lc(
    runner: Runner,
    where: Path,
    folder: Path,
    options: DecodeOptions = DecodeOptions(),
    *,
    resume: Resume = Resume(),
    quiet: bool = False,
) -> Summary:
    """Decode one `.lc` file, or those of a folder or tar file; `a/b.jpg.lc` becomes `folder/a/b.jpg.png`.

    Raises `UserError` before any work if there are none or the model has no prior, and as `make_outputs` does.
    """
    check_channels(runner.codec)
    check_unconditional(runner.codec, "a .lc file")
    if options.sample is not None:
        raise UserError(
            f"{where}: a .lc file's draw is decided when it is made; give --sample to encode, not to decode"
        )
    listing = list_lc(where, options.search.without(folder))
    if not listing.sources:
        raise UserError(f"{where}: no {SUFFIX} files there; make them with `latent-codec encode`")
    decoder = _LcDecoder(runner, options)
    return make_outputs(listing, folder, decoder, tar=options.tar, resume=resume, quiet=quiet)


class _LcDecoder(ImageDecoder):
    """Make images of `.lc` files: entropy decoding in a thread, networks in this one."""

    def __init__(self, runner: Runner, options: DecodeOptions) -> None:
        super().__init__(runner, options)
        self._reader, self._coder_backoff = StreamReader(runner.codec, runner.options.device), OutOfMemoryBackoff()

    def name(self, source: str) -> str:
        return super().name(source.removesuffix(SUFFIX))

    def load(self, source: Source) -> bytes:
        return container.read_bytes(source.path, source.offset, source.size)

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, Stream]:
        stream = container.unpack(data, max_pixels=self.options.max_pixels)
        prior, shape = self._reader.check(stream, max_pixels=self.options.max_pixels)
        return (PRIORS.index(prior), *shape), stream

    def make(self, batches: Iterable[list[Input[Stream]]], work: Work) -> Iterator[Output]:
        for _, future in work.coder.map(partial(self._decompress, work=work), batches, ahead=2):
            sound = work.sound(future.result())
            if latents := [item.holding(Latent(item.content.geometry, z)) for item, z in sound]:
                yield from self.images(latents, work)

    def _decompress(
        self, batch: list[Input[Stream]], work: Work
    ) -> list[tuple[Input[Stream], torch.Tensor | UserError]]:
        with work.summary.timing("coding"):
            return list(self._coder_backoff.map(self._z, batch, math.prod(batch[0].shape[1:])))

    def _z(self, batch: list[Input[Stream]]) -> list[torch.Tensor | UserError]:
        return self._reader.decompress([item.content for item in batch])


def is_lc(where: Path) -> bool:
    """Return whether a place is for `decode_lc` rather than `decode_latents`: a `.lc` file, or what has some in it."""
    return bool(find_lc(where)) or (where.suffix in (SUFFIX, ".tar") and not where.is_dir())


def find_lc(where: Path) -> list[Source]:
    """Return the `.lc` files at a place; raises `UserError` as `list_lc` does."""
    return list_lc(where, ListOptions()).sources


def list_lc(where: Path, options: ListOptions) -> Listing:
    """List the `.lc` files at a place; raises `UserError` if latents lie beside them."""
    listing = list_files(where, SUFFIX, options)
    if (sources := listing.sources) and where.is_dir() and (where / INDEX).is_file():
        raise UserError(
            f"{where}: holds both latents ({INDEX}) and {len(sources)} {SUFFIX} files, which could decode to the same "
            "names; move one kind into a folder of its own"
        )
    return listing
