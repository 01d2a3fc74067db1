"""Images of a latent diffusion model: noise -> latents -> the codec's decoder -> files."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from latent_codec.diffusion.model import TIMES, Diffusion
from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry
from latent_codec.images.read import read_image
from latent_codec.images.write import ImageFormat, write_image
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal, text_key
from latent_codec.storage.files import atomic_path, make_folder, write_text
from latent_codec.storage.run_folder import newest_checkpoint

SETTINGS = "samples.json"
"""What the images of a folder were made by; they are kept by the same command and by no other."""


class Wanted(NamedTuple):
    """One image."""

    label: int
    """Of the model's classes, or -1."""
    number: int


@torch.no_grad()
def draw(model: Diffusion, noise: torch.Tensor, labels: torch.Tensor, *, steps: int, guidance: float) -> torch.Tensor:
    """Raw latents (b, z, s, s) float32 from standard normal noise of that shape and labels (b,) int64.

    `steps` steps of Euler's method along the flow; `guidance` is classifier-free (Ho & Salimans 2022): 1 is the model
    as it is, larger values push samples towards what is typical of their label.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES)
    scheduler.set_timesteps(steps, device=noise.device)
    z, guided = noise, guidance != 1.0 and bool(model.latents.classes)
    for time in scheduler.timesteps:
        t = (time / TIMES).expand(len(z))
        velocity = model(z, t, labels)
        if guided:
            free = model(z, t, torch.full_like(labels, -1))
            velocity = free + guidance * (velocity - free)
        z = scheduler.step(velocity, time, z, return_dict=False)[0]
    return model.denormalize(z)


def draw_latents(model: Diffusion, wanted: Sequence[Wanted], *, seed: int, steps: int, guidance: float) -> torch.Tensor:
    """Raw latents (b, z, s, s) float32 on the model's device, each of (seed, its label's name, its number) alone."""
    device = next(model.parameters()).device
    keys = torch.stack([fold(seed, text_key(_name(model, one.label)), one.number) for one in wanted])
    labels = torch.tensor([one.label for one in wanted], device=device)
    return draw(model, normal(keys.to(device), tuple(model.shape)), labels, steps=steps, guidance=guidance)


def _name(model: Diffusion, label: int) -> str:
    return model.latents.classes[label] if label >= 0 else ""


def load(run_or_file: Path, device: str | torch.device = "cpu") -> Diffusion:
    """A model from its file, or the averaged weights of a run's newest checkpoint; raises `UserError`."""
    path = newest_checkpoint(run_or_file) / "ema.safetensors" if run_or_file.is_dir() else run_or_file
    return Diffusion.load(path, device)


def check_codec(model: Diffusion, codec: Codec) -> None:
    """Raise `UserError` unless this codec decodes the model's latents."""
    if codec.model_id != model.latents.codec_id:
        raise UserError(
            f"the diffusion model makes latents of model {model.latents.codec_id[:12]}, but the model given is "
            f"{codec.model_id[:12]}; give the right one with --model"
        )


def choose(model: Diffusion, labels: Sequence[str], count: int) -> list[Wanted]:
    """`count` images of each label, by default of each class; raises `UserError` for a label that there is not."""
    classes = model.latents.classes
    if count < 1:
        raise UserError(f"--count {count} must be at least 1")
    if unknown := sorted(set(labels) - set(classes)):
        raise UserError(f"no label {', '.join(unknown)}; the model's are: {', '.join(classes) or 'none'}")
    chosen = [classes.index(label) for label in dict.fromkeys(labels or classes)] or [-1]
    return [Wanted(label, number) for label in chosen for number in range(count)]


class Sampled(NamedTuple):
    paths: list[Path]
    """Of all that were wanted, in their order."""
    made: int

    def __str__(self) -> str:
        return f"{self.made} images drawn, {len(self.paths) - self.made} were there"


def sample(
    model: Diffusion,
    runner: Runner,
    wanted: Sequence[Wanted],
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 1.0,
    image_format: ImageFormat = "png",
    overwrite: bool = False,
    quiet: bool = False,
) -> Sampled:
    """Draw images into `folder`/LABEL/00000.png ..., without a folder for each label if the model has none.

    Images depend on (seed, label, index), not on the batch they are drawn in, but for rounding. Those that the same
    settings made are kept. Raises `UserError` for settings that make no sense, another model's codec, or a folder with
    images by other settings.
    """
    codec = runner.codec
    check_codec(model, codec)
    if steps < 1 or not math.isfinite(guidance):
        raise UserError(f"--steps {steps} must be at least 1, and --guidance {guidance} a finite number")
    settings = {
        "diffusion_id": model.model_id,
        "codec_id": codec.model_id,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "dtype": runner.options.dtype,
        "format": image_format,
    }
    _claim(folder, settings, overwrite)
    paths = {one: folder / _name(model, one.label) / f"{one.number:05d}.{image_format}" for one in wanted}
    missing = [one for one in wanted if overwrite or not paths[one].is_file()]
    for parent in sorted({paths[one].parent for one in missing}):
        make_folder(parent)
    side = model.config.size * model.latents.factor
    geometry = Geometry(width=side, height=side, orientation=1, mode="RGB", background=None)
    with tqdm(total=len(missing), unit="image", disable=quiet or None) as bar:
        for batch in _split(missing, runner.options.batch_size):
            with runner.autocast():
                z = draw_latents(model, batch, seed=seed, steps=steps, guidance=guidance)
            for one, image in zip(batch, runner.decode_uint8(z.unbind()), strict=True):
                write_image(paths[one], image, geometry, image_format)
            bar.update(len(batch))
    return Sampled(list(paths.values()), len(missing))


def _split(wanted: Sequence[Wanted], size: int) -> Iterator[Sequence[Wanted]]:
    for first in range(0, len(wanted), size):
        yield wanted[first : first + size]


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Write the folder's settings, or check that they are these."""
    path = folder / SETTINGS
    make_folder(folder)
    found = None
    if path.exists() and not overwrite:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise UserError(f"{folder}: holds images by other settings; give another folder, or --overwrite")
    write_text(path, json.dumps(settings, indent=1) + "\n")


def write_grid_of(paths: Sequence[Path], columns: int, path: Path) -> None:
    """`write_grid` of image files of one size."""
    write_grid(torch.stack([read_image(one).pixels for one in paths]), columns, path)


def write_grid(pixels: torch.Tensor, columns: int, path: Path) -> None:
    """One PNG of images (n, 3, h, w) uint8, n a multiple of `columns`, row by row."""
    picture = rearrange(pixels.cpu(), "(r n) c h w -> (r h) (n w) c", n=columns).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
