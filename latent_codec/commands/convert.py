"""Define the command `latent-codec convert`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latent_codec.errors import UserError
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.registry import CacheName


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
    arch: str | None = None
    """kohya: sd, sdxl or flux. musubi: hv, hv15, wan, qi, kr2, zi, f2d, f2k4b or f2k9b."""
    scale: Literal["raw", "normalized"] | None = None
    """npy, webdataset: write latents as the model gives them, or normalized."""
    scaling_factor: float | None = None
    """Scale latents to (z - shift) * factor, instead of each channel by the model's statistics."""
    shift_factor: float | None = None
    """Shift of --scaling-factor, by default 0."""
    seed: int | None = None
    """to: seed of the draw from each posterior, by default 0; MAR and EDM2 take the whole posterior."""
    epoch: int | None = None
    """to: epoch of the draw, by default 0; draws of different epochs are independent."""
    store: Literal["float16", "bfloat16", "float32"] | None = None
    """from: number type on disk, by default float16."""
    overwrite: bool = False
    """Replace files that are there already and differ."""

    def run(self) -> int:
        """Convert, print notes and the summary, and return the exit code."""
        if (self.to is None) == (self.from_ is None):
            raise UserError("give either --to and the name of a program, or --from and one")
        converted = self._to(self.to) if self.to is not None else self._from()
        for note in converted.notes:
            print(note)
        print(converted.summary)
        return 1 if converted.summary.failures else 0

    def _options(self) -> CacheOptions:
        return CacheOptions(
            arch=self.arch,
            scale=self.scale,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            seed=self.seed,
            epoch=self.epoch,
            store=self.store,
        )

    def _to(self, name: CacheName):
        if self.model is not None or self.store is not None:
            raise UserError("--model and --store are for --from; --to writes latents as they were stored")
        from latent_codec.interop.caches.write import write_cache

        return write_cache(self.src, self.dst, name, self._options(), overwrite=self.overwrite)

    def _from(self):
        assert self.from_ is not None
        if self.model is None:
            raise UserError("no cache says for certain which model its latents are of; give --model")
        from latent_codec.interop.caches.read import read_cache
        from latent_codec.model.codec import Codec

        codec = Codec.load(self.model)
        return read_cache(self.src, self.dst, self.from_, codec, self._options(), overwrite=self.overwrite)
