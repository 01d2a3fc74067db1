"""Trim `.lc` files of nested latents to fewer channels: smaller files of lower quality, without the images."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from latent_codec.bitstream.container import Stream
from latent_codec.errors import UserError
from latent_codec.folders.jobs import Input, Resume, Shape, Work
from latent_codec.folders.outputs import Output, make_outputs
from latent_codec.folders.read_lc import LcReader, list_lc, model_number
from latent_codec.folders.resume.ledger import Kind
from latent_codec.folders.summary import Summary
from latent_codec.images.sources import ListOptions
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner
from latent_codec.model.checks import check_prefix


def trim_lc(
    runners: Sequence[Runner],
    where: Path,
    folder: Path,
    channels: int,
    *,
    search: ListOptions = ListOptions(),
    resume: Resume = Resume(),
) -> Summary:
    """Write each `.lc` file at `where` into `folder` with the groups that hold its first `channels` channels.

    A file that holds no more than them stays as it is. Raises `UserError` before any work if there are no files or the
    channels are no prefix of a model, and as `make_outputs` does.
    """
    trimmer = _Trimmer(runners, channels)
    return make_outputs(
        list_lc(where, search.without(folder), some=True), folder, trimmer, tar=False, resume=resume, quiet=False
    )


class _Trimmer(LcReader):
    """Make trimmed streams, in the coder's thread."""

    verb: Literal["encode", "decode", "trim"] = "trim"
    kind: Kind = "streams"

    def __init__(self, runners: Sequence[Runner], channels: int) -> None:
        super().__init__(runners)
        for runner in runners:
            check_prefix(runner.codec, channels)
        self.runner, self._runners, self._channels = runners[0], runners, channels
        self._backoff = OutOfMemoryBackoff()

    @property
    def settings(self) -> dict[str, Any]:
        """Return what a trimmed file depends on beside the file, as JSON."""
        return {"trimmed_to": self._channels, "model_ids": sorted(runner.model_id for runner in self._runners)}

    def name(self, source: str) -> str:
        return source

    def is_large(self, shape: Shape) -> bool:
        return False

    def make(self, batches: Iterable[list[Input[Stream]]], work: Work) -> Iterator[Output]:
        for _, future in work.coder.map(partial(self._trim_all, work=work), batches, ahead=2):
            for item, data in work.sound(future.result()):
                geometry = item.content.geometry
                yield Output(item, item.job.name, partial(bytes, data), geometry.width * geometry.height)

    def _trim_all(self, batch: list[Input[Stream]], work: Work) -> list[tuple[Input[Stream], bytes | UserError]]:
        with work.summary.timing("coding"):
            return list(self._backoff.map(self._trim, batch, math.prod(batch[0].shape[1:])))

    def _trim(self, batch: list[Input[Stream]]) -> list[bytes | UserError]:
        reader = self.readers[model_number(batch[0])]
        return reader.trim([item.content for item in batch], self._channels)
