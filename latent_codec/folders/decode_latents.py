"""Decode a folder of latents to images."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from latent_codec.errors import UserError
from latent_codec.folders.batching import in_batches
from latent_codec.folders.jobs import RESUME, Input, Job, Resume, Work
from latent_codec.folders.outputs import Output, image_output, make_outputs
from latent_codec.folders.shards import are_whole
from latent_codec.folders.summary import Summary
from latent_codec.images.sources import Source
from latent_codec.images.write import ImageFormat
from latent_codec.inference.out_of_memory import Halving
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry, latent_size
from latent_codec.model.checks import check_channels
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key


def decode_folder(
    runner: Runner,
    where: Path,
    folder: Path,
    *,
    image_format: ImageFormat = "png",
    sample: int | None = None,
    tar: bool = False,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Decode a folder of latents; `a/b.jpg` becomes `folder/a/b.jpg.png`, or with `tar` a member of a tar shard.

    The posterior's mode is decoded, or with `sample` a draw that depends on (sample, path) alone. Raises `UserError`
    before any work if the latents are another model's, and as `outputs.make_outputs` does.
    """
    codec = runner.codec
    check_channels(codec)
    latents = Latents(where, model_id=runner.model_id)
    rows = {entry.path: index for index, entry in enumerate(latents.entries)}
    z = codec.config.latent_channels
    settings = {
        "model_id": runner.model_id,
        "sample": sample,
        "format": image_format,
    } | runner.settings
    fitting = Halving()

    def sides(entry: LatentsEntry) -> tuple[int, int]:
        return latent_size(entry.geometry, codec.factor)

    def source(entry: LatentsEntry) -> Source:
        h, w = sides(entry)
        return Source(entry.path, where / entry.shard, entry.row, 2 * 4 * z * h * w)

    def load(source: Source) -> bytes:
        posterior = latents.posterior(rows[source.name])
        return torch.stack([posterior.mean, posterior.logvar]).numpy().tobytes()

    def parse(source: Source, data: bytes) -> tuple[tuple[int, ...], DiagonalGaussian]:
        codec.class_numbers([source.label])
        h, w = sides(latents.entries[rows[source.name]])
        both = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(2, 1, -1, h, w)
        if both.shape[2] != z:
            raise UserError(f"{source.name}: {source.path.name} holds {both.shape[2]} latent channels, not {z}")
        return tuple(both.shape[2:]), DiagonalGaussian(both[0], both[1])

    def decode(batch: list[Input[DiagonalGaussian]]) -> Sequence[torch.Tensor]:
        labels = codec.class_numbers([i.job.source.label for i in batch])
        return runner.decode_uint8([_drawn(i.job.name, i.content, sample)[0] for i in batch], labels).unbind()

    def make(jobs: Iterable[Job], work: Work) -> Iterator[Output]:
        for batch in in_batches(
            jobs,
            load,
            parse,
            batch_size=runner.options.batch_size,
            resume=resume,
            work=work,
            is_large=runner.cuts_latents,
            is_whole=are_whole if tar else None,
        ):
            with work.summary.timing("network"):
                decoded = list(fitting(decode, batch, math.prod(batch[0].shape)))
            for item, pixels in decoded:
                geometry = latents.entries[rows[item.job.name]].geometry
                yield from image_output(item, f"{item.job.name}.{image_format}", pixels, geometry, image_format, work)

    sources = sorted(source(entry) for entry in latents.entries)
    names = [f"{s.name}.{image_format}" for s in sources]
    return make_outputs(
        "decode", "images", sources, names, folder, settings, resume, make, tar=tar, compute=runner.options, quiet=quiet
    )


def _drawn(path: str, posterior: DiagonalGaussian, sample: int | None) -> torch.Tensor:
    """The latent (1, z, h, w) to decode."""
    if sample is None:
        return posterior.mode()
    key = fold(sample, text_key(path))
    return posterior.sample(normal(key[None], tuple(posterior.mean.shape[1:])))
