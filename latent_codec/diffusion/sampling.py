"""Sample images from a latent diffusion model: noise, latents, the codec's decoder, image files."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from latent_codec.diffusion.config import SampleOptions
from latent_codec.diffusion.model import TIMES, Diffusion
from latent_codec.errors import UserError
from latent_codec.folders.resume.names import check_absent
from latent_codec.images.geometry import Geometry
from latent_codec.images.write import write_image
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal, text_key
from latent_codec.program import say
from latent_codec.storage.files import make_folder, write_text
from latent_codec.storage.json_config import loads
from latent_codec.storage.run_folder import newest_checkpoint

SETTINGS = "samples.json"
"""Name of the file with the settings that a folder's images were drawn with."""


class SampleId(NamedTuple):
    """Identify one image of a model by its label and its number."""

    label: int
    """Index of the label among the model's classes, or -1 for none."""
    number: int


@torch.no_grad()
def draw(model: Diffusion, noise: torch.Tensor, labels: torch.Tensor, *, steps: int, guidance: float) -> torch.Tensor:
    """Return raw latents (b, z, s, s) float32 from standard normal noise of that shape and labels (b,) int64.

    Follows the flow by `steps` steps of Euler's method, with classifier-free guidance (Ho & Salimans 2022): 1 is the
    model as it is, and larger values push samples towards what is typical of their label.
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


def draw_latents(model: Diffusion, ids: Sequence[SampleId], *, seed: int, steps: int, guidance: float) -> torch.Tensor:
    """Return raw latents (b, z, s, s) float32 on the model's device.
    Each depends on nothing but the seed, its label's name and its number."""
    device = next(model.parameters()).device
    keys = torch.stack([fold(seed, text_key(_name(model, one.label)), one.number) for one in ids])
    labels = torch.tensor([one.label for one in ids], device=device)
    return draw(model, normal(keys.to(device), tuple(model.shape)), labels, steps=steps, guidance=guidance)


def _name(model: Diffusion, label: int) -> str:
    return model.latents.classes[label] if label >= 0 else ""


def load(run_or_file: Path, device: str | torch.device = "cpu") -> Diffusion:
    """Load a model from its file, or the averaged weights of a run's newest checkpoint; raises `UserError`."""
    path = newest_checkpoint(run_or_file) / "ema.safetensors" if run_or_file.is_dir() else run_or_file
    return Diffusion.load(path, device)


def check_codec(model: Diffusion, codec: Codec) -> None:
    """Raise `UserError` unless this codec decodes the model's latents."""
    if codec.model_id != model.latents.codec_id:
        raise UserError(
            f"the diffusion model makes latents of model {model.latents.codec_id[:12]}, but the model given is "
            f"{codec.model_id[:12]}; give the right one with --model"
        )


def choose(model: Diffusion, labels: Sequence[str], count: int) -> list[SampleId]:
    """Return the ids of the first `count` images of each label, by default of every class.
    Raises `UserError` for an unknown label."""
    classes = model.latents.classes
    if count < 1:
        raise UserError(f"--count {count} must be at least 1")
    if unknown := sorted(set(labels) - set(classes)):
        raise UserError(f"no label {', '.join(unknown)}; the model's are: {', '.join(classes) or 'none'}")
    chosen = [classes.index(label) for label in dict.fromkeys(labels or classes)] or [-1]
    return [SampleId(label, number) for label in chosen for number in range(count)]


class Sampled(NamedTuple):
    """Report where images are, how many of them were drawn now, and which could not be."""

    paths: list[Path]
    made: int
    failures: dict[str, str]
    """Reason for each image that has none, by its name within the folder."""

    def __str__(self) -> str:
        there = f"{len(self.paths) - self.made} were there"
        return f"{self.made} images drawn, {there}" + (f", {len(self.failures)} failed" if self.failures else "")


def sample(
    model: Diffusion,
    runner: Runner,
    ids: Sequence[SampleId],
    folder: Path,
    options: SampleOptions = SampleOptions(),
    *,
    quiet: bool = False,
) -> Sampled:
    """Draw images into `folder`/LABEL/00000.png ..., or `folder`/00000.png ... if the model has no labels.

    An image depends on its id and the options, not on its batch except for rounding. Images that exist are kept.
    Raises `UserError` for options out of range, another model's codec, a folder of images by other settings, or files
    of these names that it did not draw.
    """
    options.check()
    check_codec(model, runner.codec)
    settings = {
        "diffusion_id": model.model_id,
        "codec_id": runner.model_id,
        "seed": options.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "dtype": runner.options.dtype,
        "format": options.image_format,
    }
    paths = {one: folder / _name(model, one.label) / f"{one.number:05d}.{options.image_format}" for one in ids}
    if not (options.overwrite or (folder / SETTINGS).exists()):  # the settings are there before the first image
        check_absent(paths.values())
    _claim(folder, settings, options.overwrite)
    missing = [one for one in ids if options.overwrite or not paths[one].is_file()]
    for parent in sorted({paths[one].parent for one in missing}):
        make_folder(parent)
    side, size = model.config.size * model.latents.factor, runner.options.batch_size
    geometry = Geometry(width=side, height=side, orientation=1, mode="RGB", background=None)
    backoff, failures = OutOfMemoryBackoff(), dict[str, str]()
    with tqdm(total=len(missing), unit="image", disable=quiet or None) as bar:
        for batch in (missing[first : first + size] for first in range(0, len(missing), size)):
            with runner.autocast():
                z = draw_latents(model, batch, seed=options.seed, steps=options.steps, guidance=options.guidance)
            decoded = backoff.map(lambda part: runner.decode_uint8(part).unbind(), list(z.unbind()), z[0].numel())
            for one, (_, image) in zip(batch, decoded, strict=True):
                if isinstance(image, UserError):
                    path = paths.pop(one).relative_to(folder).as_posix()
                    failures[path] = str(image)
                    say(f"{path}: {image}", error=True)
                else:
                    write_image(paths[one], image, geometry, options.image_format)
            bar.update(len(batch))
    return Sampled(list(paths.values()), len(missing) - len(failures), failures)


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Write the folder's settings, or check that they are the same."""
    path = folder / SETTINGS
    make_folder(folder)
    found = None
    if path.exists() and not overwrite:
        with contextlib.suppress(OSError, ValueError):
            found = loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise UserError(f"{folder}: holds images by other settings; give another folder, or --overwrite")
    write_text(path, json.dumps(settings, indent=1) + "\n")
