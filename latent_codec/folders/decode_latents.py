"""Decode folders of latents to images."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from latent_codec.errors import UserError
from latent_codec.folders.decode_images import DECODE_DEFAULTS, DecodeOptions, ImageDecoder
from latent_codec.folders.jobs import RESUME, Input, Resume, Shape, Task, Work
from latent_codec.folders.outputs import Output, make_outputs
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes
from latent_codec.images.sources import Source
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry, latent_size
from latent_codec.model.checks import check_channels
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key


def decode_latents(
    runner: Runner,
    where: Path,
    folder: Path,
    options: DecodeOptions = DECODE_DEFAULTS,
    *,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Decode a folder of latents; `a/b.jpg` becomes `folder/a/b.jpg.png`, or the member of a tar shard.

    Raises `UserError` before any work if the latents are another model's, and as `make_outputs` does.
    """
    check_channels(runner.codec)
    decoder = _LatentsDecoder(runner, where, options)
    return make_outputs(Task(decoder.sources(), folder, resume, quiet), decoder, tar=options.tar)


class _LatentsDecoder(ImageDecoder):
    """Make images of stored posteriors."""

    def __init__(self, runner: Runner, where: Path, options: DecodeOptions) -> None:
        super().__init__(runner, options)
        self._where, self._codec = where, runner.codec
        self._latents = Latents(where, model_id=runner.model_id)
        self._rows = {entry.path: index for index, entry in enumerate(self._latents.entries)}

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"sample": self.options.sample}

    def sources(self) -> list[Source]:
        """Return a source for each image's latents; `offset` is the row in its shard."""
        z, factor = self._codec.config.latent_channels, self._codec.factor
        return sorted(
            Source(entry.path, self._where / entry.shard, entry.row, 2 * 4 * z * math.prod(_size(entry, factor)))
            for entry in self._latents.entries
        )

    def load(self, source: Source) -> bytes:
        posterior = self._latents.posterior(self._rows[source.name])
        return torch.stack([posterior.mean, posterior.logvar]).numpy().tobytes()

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, DiagonalGaussian]:
        self._codec.class_numbers([source.label])
        h, w = _size(self._entry(source.name), self._codec.factor)
        z = self._codec.config.latent_channels
        both = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(2, 1, -1, h, w)
        if both.shape[2] != z:
            raise UserError(f"{source.name}: {source.path.name} holds {both.shape[2]} latent channels, not {z}")
        return tuple(both.shape[2:]), DiagonalGaussian(both[0], both[1])

    def make(self, batches: Iterable[list[Input[DiagonalGaussian]]], work: Work) -> Iterator[Output]:
        for batch in batches:
            with work.summary.timing("network"):
                decoded = list(self.backoff.map(self._decode, batch, math.prod(batch[0].shape)))
            yield from self.images(((i, self._entry(i.job.name).geometry, pixels) for i, pixels in decoded), work)

    def _decode(self, batch: list[Input[DiagonalGaussian]]) -> Sequence[torch.Tensor]:
        labels = self._codec.class_numbers([item.job.source.label for item in batch])
        return self.runner.decode_uint8([self._latent(item)[0] for item in batch], labels).unbind()

    def _latent(self, item: Input[DiagonalGaussian]) -> torch.Tensor:
        posterior, sample = item.content, self.options.sample
        if sample is None:
            return posterior.mode()  # (1, z, h, w)
        key = fold(sample, text_key(item.job.name))
        return posterior.sample(normal(key[None], tuple(posterior.mean.shape[1:])))

    def _entry(self, path: str) -> LatentsEntry:
        return self._latents.entries[self._rows[path]]


def _size(entry: LatentsEntry, factor: int) -> tuple[int, int]:
    return latent_size(entry.geometry, factor)
