"""Define the command `latent-codec convert`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from latent_codec.errors import UserError, printable
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.registry import CacheName
from latent_codec.program import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert latents to the files that other programs train from; with --from, make latents of such files."""

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Latents that `encode --format safetensors` made; with --from, the files of another program."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder for the result."""
    to: CacheName | None = None
    """Program to write files for."""
    from_: Annotated[CacheName | None, tyro.conf.arg(name="from")] = None
    """Program whose files are read."""
    model: str | None = None
    """from: the model that made the latents."""
    overwrite: bool = False
    """Replace files that are there already and differ."""
    latents: tyro.conf.OmitArgPrefixes[CacheOptions] = dataclasses.field(default_factory=CacheOptions)

    def run(self) -> int:
        """Convert, print notes and the summary, and return the exit code."""
        if self.to is not None and self.from_ is None:
            if self.model is not None or self.latents.store is not None:
                raise UserError("--model and --store are for --from; --to writes latents as they were stored")
            from latent_codec.interop.caches.write import write_cache

            converted = write_cache(self.src, self.dst, self.to, self.latents, overwrite=self.overwrite)
        elif self.from_ is not None and self.to is None:
            if self.model is None:
                raise UserError("no cache says for certain which model its latents are of; give --model")
            from latent_codec.interop.caches.read import read_cache
            from latent_codec.model.codec import Codec

            codec = Codec.load(self.model)
            converted = read_cache(self.src, self.dst, self.from_, codec, self.latents, overwrite=self.overwrite)
        else:
            raise UserError("give either --to and the name of a program, or --from and one")
        for note in converted.notes:
            say(printable(note))
        say(converted.summary)
        return 1 if converted.summary.failures else 0
