"""Define the commands `latent-codec info`, `export` and `import`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latent_codec.errors import UserError, printable
from latent_codec.program import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a model file, a .lc file, a folder or tar file of them, or latents."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A file or folder, or the name of a shipped model."""
    model: str | None = None
    """.lc files: a model to tell whether it made them; by default the shipped models are tried."""

    def run(self) -> int:
        """Print the description and what is damaged, and return the exit code."""
        from latent_codec.info import describe

        damaged: list[str] = []
        say(describe(self.file, self.model, damaged))
        for reason in damaged:
            say(printable(reason), error=True)
        return 1 if damaged else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Export a training run's averaged weights, or a model, as one self-describing model file."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """A run's folder, or a model file."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The model file to write; with --to diffusers, a folder."""
    to: Literal["safetensors", "diffusers"] = "safetensors"
    """safetensors: a model file of this project. diffusers: the folder of an AutoencoderKL for pipelines."""
    data: tuple[Path, ...] = ()
    """Images (folders or tar files) to measure latent statistics on; without, a model keeps its own."""
    images: int = 256
    """Number of images to measure on, from the first."""
    half: bool = False
    """Store float16 weights."""
    fold: bool = True
    """diffusers: normalise latents within the model, for any pipeline; without, config.json holds scale and shift."""

    def run(self) -> int:
        """Write the model, say where it is and return the exit code."""
        if self.to == "diffusers":
            return self._to_diffusers()
        if not self.fold:
            raise UserError("--no-fold is for --to diffusers; a model file of ours keeps its latents as they are")
        from latent_codec.export import export

        codec = export(self.source, self.dst, data=self.data, images=self.images, half=self.half)
        say(f"wrote {self.dst} ({self.dst.stat().st_size / 1e6:.2f} MB), model {codec.model_id}")
        return 0

    def _to_diffusers(self) -> int:
        from latent_codec.export import prepare
        from latent_codec.inference.calibration import calibration_images
        from latent_codec.interop.autoencoder_kl.exporting import check_folder, export_folder

        check_folder(self.dst)
        codec = prepare(self.source, data=self.data, images=self.images)
        images = calibration_images(codec, self.data, self.images)
        measured = export_folder(codec, self.dst, images=images, normalize=self.fold, half=self.half)
        say(f"wrote {self.dst}, an AutoencoderKL; {measured}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Import an AutoencoderKL (diffusers' folder, or a safetensors file in its or the original layout) as a model file.

    What `export --to diffusers` wrote becomes the model that it was.
    """

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """A folder with config.json, or one safetensors file: an autoencoder's, or a whole checkpoint with one in it."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The model file to write."""
    scaling_factor: float | None = None
    """Factor by which pipelines multiply its latents, unless config.json has it; sets the latent statistics."""
    shift_factor: float | None = None
    """Number that pipelines subtract from its latents before that."""
    half: bool = False
    """Store float16 weights."""

    def run(self) -> int:
        """Write the model file, describe it and return the exit code."""
        from latent_codec.interop.autoencoder_kl.importing import import_model

        codec = import_model(
            self.src, self.dst, scaling_factor=self.scaling_factor, shift_factor=self.shift_factor, half=self.half
        )
        say(f"wrote {self.dst} ({self.dst.stat().st_size / 1e6:.2f} MB), model {codec.model_id}")
        say(f"  {codec.config.backbone}, {codec.config.latent_channels} latent channels")
        statistics = codec.statistics
        say(f"  latent statistics: {statistics.source if statistics else 'none; measure them with export --data'}")
        return 0
