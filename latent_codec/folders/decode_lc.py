"""Decode a folder of `.lc` files to images."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from latent_codec.bitstream import container
from latent_codec.bitstream.container import SUFFIX, Stream
from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import UserError
from latent_codec.folders.batching import in_batches
from latent_codec.folders.jobs import RESUME, Input, Job, Resume, Work
from latent_codec.folders.outputs import Output, image_output, make_outputs
from latent_codec.folders.run import check_options
from latent_codec.folders.shards import are_whole
from latent_codec.folders.summary import Summary
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.images.sources import Source, find_files
from latent_codec.images.write import ImageFormat
from latent_codec.inference.out_of_memory import Halving
from latent_codec.inference.runner import Runner
from latent_codec.latents.format import INDEX
from latent_codec.model.checks import check_channels, check_unconditional
from latent_codec.prior.priors import PriorKind

PRIORS = get_args(PriorKind)


def decode_streams(
    runner: Runner,
    where: Path,
    folder: Path,
    *,
    image_format: ImageFormat = "png",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    tar: bool = False,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Decode one `.lc` file, or those of a folder or tar file; `a/b.jpg.lc` becomes `folder/a/b.jpg.png`.

    With `tar` it becomes a member of a tar shard. Damaged files and those of another model fail, the others go on.
    Raises `UserError` before any work if there are none or the model has no prior, and as `outputs.make_outputs` does.
    """
    codec = runner.codec
    check_channels(codec)
    check_unconditional(codec, "a .lc file")
    check_options("#ffffff", max_pixels)
    sources = find_streams(where)
    if not sources:
        raise UserError(f"{where}: no {SUFFIX} files there; make them with `latent-codec encode`")
    reader = StreamReader(codec, runner.options.device)
    settings = {
        "model_id": runner.model_id,
        "format": image_format,
    } | runner.settings
    fitting, fitting_coder = Halving(), Halving()

    def load(source: Source) -> bytes:
        return container.read_bytes(source.path, source.offset, source.size)

    def parse(source: Source, data: bytes) -> tuple[tuple[int, ...], Stream]:
        stream = container.unpack(data, max_pixels=max_pixels)
        prior, shape = reader.check(stream)
        return (PRIORS.index(prior), *shape), stream

    def decompress(batch: list[Input[Stream]]) -> list[torch.Tensor | UserError]:
        return reader.decompress([i.content for i in batch])

    def decode(batch: list[_Decompressed]) -> Sequence[torch.Tensor]:
        return runner.decode_uint8([z for _, z in batch]).unbind()

    def make(jobs: Iterable[Job], work: Work) -> Iterator[Output]:
        def uncode(batch: list[Input[Stream]]) -> list[tuple[Input[Stream], torch.Tensor | UserError]]:
            with work.summary.timing("coding"):
                return list(fitting_coder(decompress, batch, math.prod(batch[0].shape[1:])))

        read = in_batches(
            jobs,
            load,
            parse,
            batch_size=runner.options.batch_size,
            resume=resume,
            work=work,
            is_large=runner.cuts_latents,
            is_whole=are_whole if tar else None,
        )
        for _, future in work.coder.map(uncode, read, ahead=2):
            sound: list[_Decompressed] = []
            for item, z in future.result():
                if isinstance(z, UserError):
                    work.fail(item.job, z)
                else:
                    sound.append(_Decompressed(item, z))
            with work.summary.timing("network"):
                decoded = list(fitting(decode, sound, math.prod(sound[0].z.shape))) if sound else []
            for (item, _), pixels in decoded:
                name = f"{item.job.name.removesuffix(SUFFIX)}.{image_format}"
                yield from image_output(item, name, pixels, item.content.header.geometry, image_format, work)

    names = [f"{s.name.removesuffix(SUFFIX)}.{image_format}" for s in sources]
    return make_outputs(
        "decode", "images", sources, names, folder, settings, resume, make, tar=tar, compute=runner.options, quiet=quiet
    )


class _Decompressed(NamedTuple):
    item: Input[Stream]
    z: torch.Tensor  # (z, h, w)


def is_streams(where: Path) -> bool:
    """Whether a place is for `decode_streams` rather than for latents: a `.lc` file, or what has some in it."""
    return bool(find_streams(where)) or (where.suffix in (SUFFIX, ".tar") and not where.is_dir())


def find_streams(where: Path) -> list[Source]:
    """`.lc` files at a place; raises `UserError` if latents lie beside them."""
    sources = find_files(where, SUFFIX)
    if sources and where.is_dir() and (where / INDEX).is_file():
        raise UserError(
            f"{where}: holds both latents ({INDEX}) and {len(sources)} {SUFFIX} files, which could decode to the same "
            "names; move one kind into a folder of its own"
        )
    return sources
