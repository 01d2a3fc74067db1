"""Decode folders of `.lc` files to images. One bad file never ends the work of the others."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from latent_codec.bitstream.container import SUFFIX, Stream
from latent_codec.errors import UserError
from latent_codec.folders.decode_images import DecodeOptions, ImageDecoder, Latent
from latent_codec.folders.jobs import Input, Resume, Work
from latent_codec.folders.outputs import Output, make_outputs
from latent_codec.folders.read_lc import LcReader, list_lc, model_number
from latent_codec.folders.summary import Summary
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner


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
    decoder = _LcDecoder([runner] if isinstance(runner, Runner) else runner, options)
    if options.sample is not None:
        raise UserError(
            f"{where}: a .lc file's draw is decided when it is made; give --sample to encode, not to decode"
        )
    listing = list_lc(where, options.search.without(folder), some=True)
    decoder.shorten(source.name.removesuffix(SUFFIX) for source in listing.sources)
    return make_outputs(listing, folder, decoder, tar=options.tar, resume=resume, quiet=quiet)


class _LcDecoder(LcReader, ImageDecoder):
    """Make images of `.lc` files: entropy decoding in a thread, networks in this one."""

    def __init__(self, runners: Sequence[Runner], options: DecodeOptions) -> None:
        LcReader.__init__(self, runners, options.max_pixels)
        ImageDecoder.__init__(self, runners, options)
        self._coder_backoff = OutOfMemoryBackoff()

    def name(self, source: str) -> str:
        return super().name(source.removesuffix(SUFFIX))

    def make(self, batches: Iterable[list[Input[Stream]]], work: Work) -> Iterator[Output]:
        for _, future in work.coder.map(partial(self._decompress, work=work), batches, ahead=2):
            sound = work.sound(future.result())
            if latents := [item.holding(Latent(item.content.geometry, z, model_number(item))) for item, z in sound]:
                yield from self.images(latents, work)

    def _decompress(
        self, batch: list[Input[Stream]], work: Work
    ) -> list[tuple[Input[Stream], torch.Tensor | UserError]]:
        with work.summary.timing("coding"):
            return list(self._coder_backoff.map(self._z, batch, math.prod(batch[0].shape[1:])))

    def _z(self, batch: list[Input[Stream]]) -> list[torch.Tensor | UserError]:
        return self.readers[model_number(batch[0])].decompress([item.content for item in batch])
