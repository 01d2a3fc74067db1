"""Decode folders of `.lc` files to images. One bad file never ends the work of the others."""

import math
from collections.abc import Iterable, Iterator, Sequence
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
    runner: Runner | Sequence[Runner],
    where: Path,
    folder: Path,
    options: DecodeOptions = DecodeOptions(),
    *,
    resume: Resume = Resume(),
    quiet: bool = False,
) -> Summary:
    """Decode one `.lc` file, or those of a folder or tar file; `a/b.jpg.lc` becomes `folder/a/b.jpg.png`.

    Of several runners, each file is decoded by that of the model that made it. Raises `UserError` before any work if
    there are no files or a model has no prior, and as `make_outputs` does.
    """
    runners = [runner] if isinstance(runner, Runner) else runner
    for one in runners:
        check_channels(one.codec)
        check_unconditional(one.codec, "a .lc file")
    if options.sample is not None:
        raise UserError(
            f"{where}: a .lc file's draw is decided when it is made; give --sample to encode, not to decode"
        )
    listing = list_lc(where, options.search.without(folder))
    if not listing.sources:
        raise UserError(f"{where}: no {SUFFIX} files there; make them with `latent-codec encode`")
    decoder = _LcDecoder(runners, options)
    return make_outputs(listing, folder, decoder, tar=options.tar, resume=resume, quiet=quiet)


class _LcDecoder(ImageDecoder):
    """Make images of `.lc` files: entropy decoding in a thread, networks in this one."""

    def __init__(self, runners: Sequence[Runner], options: DecodeOptions) -> None:
        super().__init__(runners, options)
        self._readers = [StreamReader(runner.codec, runner.options.device) for runner in runners]
        self._coder_backoff = OutOfMemoryBackoff()

    def name(self, source: str) -> str:
        return super().name(source.removesuffix(SUFFIX))

    def load(self, source: Source) -> bytes:
        return container.read_bytes(source.path, source.offset, source.size)

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, Stream]:
        stream = container.unpack(data, max_pixels=self.options.max_pixels)
        model = next((i for i, reader in enumerate(self._readers) if reader.is_maker(stream)), 0)
        prior, shape = self._readers[model].check(stream, max_pixels=self.options.max_pixels)
        return (len(PRIORS) * model + PRIORS.index(prior), *shape), stream

    def make(self, batches: Iterable[list[Input[Stream]]], work: Work) -> Iterator[Output]:
        for _, future in work.coder.map(partial(self._decompress, work=work), batches, ahead=2):
            sound = work.sound(future.result())
            if latents := [item.holding(Latent(item.content.geometry, z, _model(item))) for item, z in sound]:
                yield from self.images(latents, work)

    def _decompress(
        self, batch: list[Input[Stream]], work: Work
    ) -> list[tuple[Input[Stream], torch.Tensor | UserError]]:
        with work.summary.timing("coding"):
            return list(self._coder_backoff.map(self._z, batch, math.prod(batch[0].shape[1:])))

    def _z(self, batch: list[Input[Stream]]) -> list[torch.Tensor | UserError]:
        return self._readers[_model(batch[0])].decompress([item.content for item in batch])


def _model(item: Input[Stream]) -> int:
    """Return the number of an input's model, which the first number of its shape says together with the prior."""
    return item.shape[0] // len(PRIORS)


def makers_of(where: Path, search: ListOptions) -> set[tuple[PriorKind, bytes]]:
    """Return the kinds of prior and the stream ids that sound `.lc` files at a place name."""
    found = set[tuple[PriorKind, bytes]]()
    for source in list_lc(where, search).sources:
        try:
            found |= {container.maker_of(source.path, source.offset)}
        except (OSError, UserError):
            continue  # it fails when it is decoded
    return found


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
