"""List and read `.lc` files of one or several models."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from latent_codec.bitstream import container
from latent_codec.bitstream.container import SUFFIX, Stream
from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import UserError
from latent_codec.folders.jobs import Input, Shape
from latent_codec.folders.workers import Processes
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.images.sources import Listing, ListOptions, Source, list_files
from latent_codec.inference.runner import Runner
from latent_codec.latents.format import INDEX
from latent_codec.model.checks import check_channels, check_unconditional
from latent_codec.prior.priors import PriorKind

_PRIORS = get_args(PriorKind)


class LcReader:
    """Read `.lc` files, each with the model that made it: half of a `Maker`."""

    def __init__(self, runners: Sequence[Runner], max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        """Raise `UserError` if a model is none of grey or RGB images, is conditional or has no prior."""
        for runner in runners:
            check_channels(runner.codec)
            check_unconditional(runner.codec, "a .lc file")
        self.readers = [StreamReader(runner.codec, runner.options.device) for runner in runners]
        self._max_pixels = max_pixels

    def load(self, source: Source) -> bytes:
        """Return a file's bytes; raises as `read_bytes` does."""
        return container.read_bytes(source.path, source.offset, source.size)

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, Stream]:
        """Return a sound stream, and the shape of its latents after a number for its model and prior.
        Raises `UserError` for any other."""
        stream = container.unpack(data, max_pixels=self._max_pixels)
        model = next((i for i, reader in enumerate(self.readers) if reader.is_maker(stream)), 0)
        prior, shape = self.readers[model].check(stream, max_pixels=self._max_pixels)
        return (len(_PRIORS) * model + _PRIORS.index(prior), *shape), stream


def model_number(item: Input[Stream]) -> int:
    """Return the number of the model, among the reader's, that made an input's stream."""
    return item.shape[0] // len(_PRIORS)


def makers_of(where: Path, search: ListOptions) -> set[tuple[PriorKind, bytes]]:
    """Return the kinds of prior and the stream ids that sound `.lc` files at a place name."""
    found = set[tuple[PriorKind, bytes]]()
    for source in list_lc(where, search).sources:
        try:
            found |= {container.maker_of(source.path, source.offset)}
        except (OSError, UserError):
            continue  # it fails when it is read
    return found


def is_lc(where: Path) -> bool:
    """Return whether a place is a `.lc` file or has some in it, rather than latents."""
    return bool(find_lc(where)) or (where.suffix in (SUFFIX, ".tar") and not where.is_dir())


def find_lc(where: Path) -> list[Source]:
    """Return the `.lc` files at a place; raises `UserError` as `list_lc` does."""
    return list_lc(where, ListOptions()).sources


def list_lc(where: Path, options: ListOptions, *, some: bool = False) -> Listing:
    """List the `.lc` files at a place; raises `UserError` if latents lie beside them, or if there should be `some`."""
    listing = list_files(where, SUFFIX, options)
    if (sources := listing.sources) and where.is_dir() and (where / INDEX).is_file():
        raise UserError(
            f"{where}: holds both latents ({INDEX}) and {len(sources)} {SUFFIX} files, which could decode to the same "
            "names; move one kind into a folder of its own"
        )
    if some and not sources:
        raise UserError(f"{where}: no {SUFFIX} files there; make them with `latent-codec encode`")
    return listing
