"""Share what the decoders of `.lc` files and of latents have in common."""

import dataclasses
import math
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from latent_codec.folders.jobs import Input, Work
from latent_codec.folders.outputs import Output
from latent_codec.folders.resume.ledger import Kind
from latent_codec.images.geometry import Geometry, crop
from latent_codec.images.read import DEFAULT_MAX_PIXELS, EXTENSIONS, ReadOptions
from latent_codec.images.sources import ListOptions
from latent_codec.images.write import ImageFormat, image_bytes
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner
from latent_codec.model.checks import check_prefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Choose how images are decoded; raises `UserError` for a value out of range."""

    image_format: ImageFormat = "png"
    sample: int | None = None
    """Seed of a draw from a stored posterior that depends on (sample, path) alone; None decodes the mode."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """`.lc` files of larger images are refused before anything is allocated for them."""
    channels: int | None = None
    """Decode the first channels alone, a prefix of the model's; None decodes all that are stored."""
    search: ListOptions = ListOptions()
    tar: bool = False
    """Put the images into tar shards."""

    def __post_init__(self) -> None:
        ReadOptions(max_pixels=self.max_pixels)


class Latent(NamedTuple):
    """Hold what is decoded to one image."""

    geometry: Geometry
    z: torch.Tensor
    """(z, h, w) float32, on the CPU."""
    model: int = 0
    """Number of the model among the decoder's."""


class ImageDecoder:
    """Decode latents to image files: half of a `Maker`."""

    verb: Literal["encode", "decode", "trim"] = "decode"
    kind: Kind = "images"

    whole: frozenset[str] = frozenset()
    """Sources in tar files whose images keep the whole name, because another one would have the same short one."""

    def __init__(self, runners: Sequence[Runner], options: DecodeOptions) -> None:
        runner, self.runners = runners[0], runners
        self.runner, self.options, self.backoff = runner, options, OutOfMemoryBackoff()
        if options.channels is not None:
            for one in runners:
                check_prefix(one.codec, options.channels)
        self.is_large = partial(runner.cuts, factor=runner.codec.factor)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what an image depends on beside its source, as JSON."""
        ids = [runner.model_id for runner in self.runners]
        model = ids[0] if len(ids) == 1 else sorted(ids)
        settings: dict[str, Any] = {"model_id": model, "format": self.options.image_format} | self.runner.settings
        settings |= {} if self.options.channels is None else {"channels": self.options.channels}
        return settings | ({"names": "short"} if self.options.tar else {})

    def name(self, source: str) -> str:
        """Return the name of a source's image: a.jpg becomes a.jpg.png, and in a tar file a.png, of the key a."""
        short = self.options.tar and source not in self.whole
        return f"{_short(source) if short else source}.{self.options.image_format}"

    def shorten(self, sources: Iterable[str]) -> None:
        """Set `whole` for these sources."""
        names = list(sources)
        count = Counter(map(_short, names))
        self.whole = frozenset(name for name in names if count[_short(name)] > 1)

    def images(self, batch: list[Input[Latent]], work: Work) -> Iterator[Output]:
        """Yield the files of a batch of one model's latents; inputs that memory does not suffice for fail."""
        with work.summary.timing("network"):
            decoded = list(self.backoff.map(self._decode, batch, math.prod(batch[0].content.z.shape)))
        for item, pixels in work.sound(decoded):
            geometry = item.content.geometry
            data = partial(image_bytes, crop(pixels, geometry), geometry, self.options.image_format)
            yield Output(item, self.name(item.job.name), data)

    def _decode(self, batch: list[Input[Latent]]) -> Sequence[torch.Tensor]:
        runner = self.runners[batch[0].content.model]
        labels = runner.codec.class_numbers([item.job.source.label for item in batch])
        z = [item.content.z[: self.options.channels] for item in batch]
        return runner.decode_uint8(z, labels).unbind()


def _short(source: str) -> str:
    """Return a source's name without the suffix of an image."""
    stem, suffix = posixpath.splitext(source)
    return stem if suffix.lower() in EXTENSIONS else source
