"""Define a run of `train.vae`: its options, what is checked before work, and its images."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from accelerate import Accelerator

from latent_codec.errors import UserError
from latent_codec.images.buckets import ResizeOptions
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import ListOptions, Source, identity, list_all
from latent_codec.model.codec import Codec
from latent_codec.noise import text_key
from train.config.prior import context_layout, context_spacing
from train.config.vae import ELBOConfig, JointConfig, TrainConfig, check
from train.data.crops import ImageSet, fingerprint
from train.init.closed_form import check_closed_form, check_mean_start
from train.loop.claim import check_processes
from train.loop.program import RunOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(RunOptions):
    """Hold the options of one run."""

    data: tuple[Path, ...]
    """Folders of images (read recursively) or tar shards."""
    val: tuple[Path, ...] = ()
    """Folders or tar shards of validation images. Without them, `val_images` of the data are held out."""
    val_images: int = 64
    """Number of validation images."""
    follow_links: bool = False
    """Search linked folders too, each once."""
    data_mode: Literal["memory", "stream"] = "memory"
    """`memory`: decode all images once and keep them on the device; `stream`: decode in workers as needed."""
    workers: int = 4
    """Worker processes of `stream`."""
    start_from: str | None = None
    """A model (a file or a shipped one's name) whose weights a new run starts from, in place of the closed form."""
    lpips_backbone: Path | None = None
    """Local safetensors file with the ImageNet features of the LPIPS network. Without it, they are downloaded."""
    config: tyro.conf.OmitArgPrefixes[TrainConfig]


def check_run(run: Run, accelerator: Accelerator) -> None:
    """Raise `UserError` for options that would only fail later."""
    config, objective = run.config, run.config.objective
    check(config)
    check_processes(config, run.log_with, accelerator)
    if isinstance(objective, JointConfig) and run.start_from is None:
        raise UserError("a joint phase begins with a model that has a quantiser: name it with --start-from")
    adversarial = isinstance(objective, ELBOConfig) and objective.adversarial is not None
    if adversarial and accelerator.mixed_precision == "fp16":
        raise UserError("fp16 is too coarse for the gradients of an adversary's adaptive weight: choose bf16")
    codec = Codec(config.codec)
    if config.codec.image_channels not in (1, 3):
        raise UserError(f"image_channels is {config.codec.image_channels}; set it to 1 (grey) or 3 (RGB)")
    unit, why = codec.factor, "the model's factor"
    if isinstance(objective, JointConfig):
        _, levels = context_layout(objective.prior_groups, objective.prior_levels, config.codec.latent_channels)
        unit *= context_spacing(levels)
        why += " times the spacing of its context prior's coarsest grid"
    for name, side in (("crop", config.crop), ("eval_crop", config.eval_crop)):
        if side % unit:
            raise UserError(f"{name} {side} is no multiple of {unit}, {why}")
    if config.closed_form:
        check_closed_form(codec)
    if config.mean_start:
        check_mean_start(codec)


class Split(NamedTuple):
    """Hold the images of a run, and sentences on what was left out of them."""

    sources: list[Source]
    held_out: list[Source]
    notes: list[str]


def split(run: Run) -> Split:
    """Return the training and the validation sources; without --val, those whose names hash lowest are held out.

    No validation image is trained on, though --val may lie within --data; and nothing within --out is an image.
    """
    if run.val_images < 1:
        raise UserError(f"val_images is {run.val_images}; it must be at least 1")
    search = ListOptions(follow_links=run.follow_links, exclude=(run.out,))
    data, val = list_all(run.data, search), list_all(run.val, search)
    notes = [reason for listing in (data, val) for reason in listing.failures.values()]
    notes += [f"left out: {listing.left_out}" for listing in (data, val) if listing.left_out.total]
    sources = data.sources
    held_out = sorted(val.sources if run.val else sources, key=lambda s: text_key(s.name))[: run.val_images]
    unseen = set(map(identity, val.sources if run.val else held_out))
    if kept := [source for source in sources if identity(source) not in unseen]:
        if run.val and len(kept) < len(sources):
            notes.append(f"left out of --data: {len(sources) - len(kept)} images of --val")
        return Split(kept, held_out, notes)
    raise UserError(f"all {len(sources)} images are held out; lower --val-images or give --val")


def read_options(config: TrainConfig) -> ReadOptions:
    """Return how the images of a run are read."""
    return ReadOptions(resize=None if config.resize is None else ResizeOptions(size=(config.resize, config.resize)))


def labelled(codec: Codec, sources: list[Source], read: ReadOptions = ReadOptions()) -> ImageSet:
    """Return the sources with the numbers of their classes; raises `UserError` for an image of no known class."""
    try:
        labels = codec.class_numbers([source.label for source in sources])
    except UserError as error:
        known = codec.config.classes
        name = next(source.name for source in sources if source.label not in known)
        raise UserError(f"{name}: {error}, or name the folders with --classes") from error
    return ImageSet(sources=sources, labels=labels, channels=codec.config.image_channels, read=read)


def describe_data(run: Run, sources: list[Source]) -> dict[str, Any]:
    """Return the record of what the run is trained on."""
    return {
        "data_sha256": fingerprint(sources),
        "data_images": len(sources),
        "data": sorted(p.name for p in run.data),
        "start_from": None if run.start_from is None else Codec.load(run.start_from).model_id,
    }
