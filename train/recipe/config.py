"""Configure the recipe that trains a codec and its context prior on one GPU."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from latent_codec.errors import UserError
from latent_codec.model.config import CodecConfig, LiteConfig
from train.config.presets import photo, photo_joint
from train.config.prior import PriorConfig
from train.config.vae import IWAEConfig, JointConfig, TrainConfig

Objective = Literal["joint", "elbo"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Configure a recipe and one call of it."""

    data: tuple[Path, ...]
    """Tar shards or folders of images to train on."""
    val: Path
    """Tar file or folder of other images, to measure the quantiser and the model on."""
    out: Path
    """Folder of the recipe. An existing one is continued."""
    minutes: float
    """Wall time of this call from the start of the process, with reading, compiling and saving."""
    total_minutes: float = 30.0
    """Training time over all calls, without reading, compiling and measuring.
    The first call measures the speed and turns it into a number of steps, with which the learning rates reach 0."""
    prior_share: float = 0.2
    """Share of the training time that the context prior gets."""
    start_from: str = "photo"
    """Model to start from: a `lite` model's file or a shipped model's name.
    Networks and likelihood stay; patches overlap at least as much as the preset's."""
    objective: Objective = "joint"
    """`joint`: train the codec together with its context prior, as `photo_joint`.
    `elbo`: train as `photo`, for a model without a quantiser or with new channels."""
    latent_channels: int | None = None
    """Number of latent channels to grow to. None: as many as the model has."""
    batch_size: int | None = None
    """Crops per step of the codec. None: by a GPU's memory, 256 of 128x128 on 16 GB; 8 on a CPU."""
    crop: int = 128
    """Side of the codec's training crops in pixels."""
    learning_rate: float | None = None
    """Peak learning rate of the codec. None: scale the preset's by the square root of the batch size, up to 0.001."""
    lpips_weight: float = 0.0
    """Nats per pixel for one unit of LPIPS in the codec's training; 0 leaves LPIPS out."""
    lpips_backbone: Path | None = None
    """Local safetensors file with AlexNet's ImageNet features for LPIPS. None: download it."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """Context prior. Its steps follow from the measured speed, and a batch size of 8 becomes 256 on a GPU."""
    compile: bool | None = None
    """Compile the codec's training step with torch.compile. None: only on a GPU."""
    probe_steps: int = 80
    """Steps of the discarded run that measures the speed; the last quarter of them counts."""
    save_minutes: float = 2.0
    """Minutes between two checkpoints."""
    margin_minutes: float = 0.3
    """Minutes of a call to keep for the last checkpoint."""
    finish_minutes: float = 2.0
    """Start a stage only if this many minutes of the call are left: some stages cannot be interrupted."""
    figure_images: int = 24
    """Validation images to compare the models on, those whose names hash lowest; 0 skips the comparison."""


_CROP_BYTES = 48 * 2**20
"""Memory for one crop of 128x128. The joint step of `photo` keeps 12 MiB a crop for its gradient; kernels, LPIPS and
the images take the rest."""

_FEWEST_CROPS, _MOST_CROPS = 8, 1024  # at about 800 the learning rate has grown to its limit of 0.001


def gpu_batch(memory: int, crop: int) -> int:
    """Return how many crops, of `crop` pixels a side, a step takes on a GPU with so many bytes: a power of two."""
    fit = memory * 128**2 // (_CROP_BYTES * crop**2)
    return min(max(2 ** (fit.bit_length() - 1) if fit else 0, _FEWEST_CROPS), _MOST_CROPS)


def codec_config(recipe: Recipe, model: TrainConfig, batch_size: int, steps: int, on_gpu: bool) -> TrainConfig:
    """Return the codec's training configuration; `model` is the preset with the parts of the starting model."""
    growth, objective = (batch_size / model.batch_size) ** 0.5, model.objective
    assert not isinstance(objective, IWAEConfig)
    objective = replace(objective, lpips_weight=recipe.lpips_weight)
    if isinstance(objective, JointConfig):
        objective = replace(
            objective,
            prior_groups=recipe.prior.groups,
            prior_levels=recipe.prior.levels,
            prior_width=recipe.prior.width,
            prior_learning_rate=min(recipe.prior.learning_rate, objective.prior_learning_rate * growth),
        )
    rate = min(1e-3, model.learning_rate * growth) if recipe.learning_rate is None else recipe.learning_rate
    return replace(
        model,
        objective=objective,
        closed_form=False,
        steps=steps,
        batch_size=batch_size,
        crop=recipe.crop,
        learning_rate=rate,
        lr_warmup_steps=min(500, steps // 10),
        compile=on_gpu if recipe.compile is None else recipe.compile,
        keep_checkpoints=1,
    )


def preset_of(codec: CodecConfig, objective: Objective, latent_channels: int | None = None) -> TrainConfig:
    """Return the objective's preset with a `lite` model's parts, at least the preset's overlap, and the model's
    channels unless others are given. Raises `UserError` for another kind of model."""
    if not isinstance(codec.backbone, LiteConfig) or codec.bottleneck.kind != "gaussian":
        raise UserError(
            f"the recipe trains lite models with a gaussian posterior, not {codec.backbone.kind} and "
            f"{codec.bottleneck.kind}: use train.vae and train.prior"
        )
    base = photo_joint() if objective == "joint" else photo()
    assert isinstance(base.codec.backbone, LiteConfig)
    overlap = min(max(codec.backbone.overlap, base.codec.backbone.overlap), codec.backbone.patch)
    channels = codec.latent_channels if latent_channels is None else latent_channels
    backbone = replace(codec.backbone, overlap=overlap)
    return replace(base, codec=replace(codec, backbone=backbone, latent_channels=channels))


def check(recipe: Recipe) -> None:
    """Raise `UserError` for values that no plan can be made from."""
    if recipe.minutes <= recipe.margin_minutes or recipe.total_minutes <= 0:
        raise UserError(
            f"minutes {recipe.minutes:g} must exceed margin_minutes {recipe.margin_minutes:g}, and total_minutes "
            f"{recipe.total_minutes:g} must be positive"
        )
    if recipe.objective == "joint" and recipe.latent_channels is not None:
        raise UserError(
            f"latent_channels is {recipe.latent_channels}, but a joint objective needs a quantiser for these channels: "
            "grow them with --objective elbo, then start from that model"
        )
    if not 0 < recipe.prior_share < 1:
        raise UserError(f"prior_share is {recipe.prior_share:g}; it must be between 0 and 1")
    if recipe.probe_steps < 4:
        raise UserError(f"probe_steps is {recipe.probe_steps}; measuring the speed needs at least 4")
