"""Decode folders of latents to images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from latent_codec.errors import UserError
from latent_codec.folders.decode_images import DecodeOptions, ImageDecoder, Latent
from latent_codec.folders.jobs import Input, Resume, Shape, Work
from latent_codec.folders.outputs import Output, make_outputs
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes
from latent_codec.images.sources import LeftOut, Listing, Source
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry, latent_size
from latent_codec.model.checks import check_channels, check_prefix
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key


def decode_latents(
    runner: Runner,
    where: Path,
    folder: Path,
    options: DecodeOptions = DecodeOptions(),
    *,
    resume: Resume = Resume(),
    quiet: bool = False,
) -> Summary:
    """Decode latents, `a/b.jpg` to `folder/a/b.jpg.png`; raises as `make_outputs`, and for those of another model."""
    check_channels(runner.codec)
    decoder = _LatentsDecoder(runner, where, options)
    listing = Listing(decoder.sources(), LeftOut(), {})
    decoder.shorten(source.name for source in listing.sources)
    return make_outputs(listing, folder, decoder, tar=options.tar, resume=resume, quiet=quiet)


class _LatentsDecoder(ImageDecoder):
    """Make images of stored posteriors."""

    def __init__(self, runner: Runner, where: Path, options: DecodeOptions) -> None:
        super().__init__([runner], options)
        self._where, self._codec = where, runner.codec
        self._latents = Latents(where, model_id=runner.model_id)
        if self._latents.header.channels is not None:
            check_prefix(runner.codec, self._latents.header.channels)
            if (options.channels or 0) > self._latents.header.channels:
                raise UserError(f"{where}: holds {self._latents.header.channels} channels, not {options.channels}")
        self._rows = {entry.path: index for index, entry in enumerate(self._latents.entries)}

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"sample": self.options.sample}

    def sources(self) -> list[Source]:
        """Return a source for each image's latents; `offset` is the row in its shard."""
        return sorted(
            (
                Source(e.path, self._where / e.shard, e.row, self._size(e), label=e.label, sidecars=_sidecars(e))
                for e in self._latents.entries
            ),
            key=lambda source: source.name,
        )

    def _size(self, entry: LatentsEntry) -> int:
        h, w = latent_size(entry.geometry, self._codec.factor)
        return 2 * 4 * self._channels * h * w

    @property
    def _channels(self) -> int:
        return self._latents.header.channels or self._codec.config.latent_channels

    def load(self, source: Source) -> bytes:
        posterior = self._latents.posterior(self._rows[source.name])
        return torch.stack([posterior.mean, posterior.logvar]).numpy().tobytes()

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, Latent]:
        self._codec.class_numbers([source.label])  # here it fails for this image alone
        entry = self._latents.entries[self._rows[source.name]]
        both = torch.frombuffer(bytearray(data), dtype=torch.float32)
        both = both.reshape(2, 1, -1, *latent_size(entry.geometry, self._codec.factor))
        shape = tuple(both.shape[2:])
        if shape[0] != self._channels:
            raise UserError(f"{source.name}: {source.path.name} holds {shape[0]} latent channels, not {self._channels}")
        posterior, sample = DiagonalGaussian(*both), self.options.sample
        if sample is None:
            return shape, Latent(entry.geometry, posterior.mode()[0])
        key = fold(sample, text_key(source.name))
        return shape, Latent(entry.geometry, posterior.sample(normal(key[None], shape))[0])

    def make(self, batches: Iterable[list[Input[Latent]]], work: Work) -> Iterator[Output]:
        for batch in batches:
            yield from self.images(batch, work)


def _sidecars(entry: LatentsEntry) -> tuple[tuple[str, bytes], ...]:
    """Return what a tar file said of the image, for a tar shard of decoded images."""
    texts = {".txt": entry.caption, ".cls": entry.label if entry.key is not None else None}
    return tuple((suffix, text.encode()) for suffix, text in texts.items() if text is not None)
