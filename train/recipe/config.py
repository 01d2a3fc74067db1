"""Configure the recipe that trains a codec on one GPU."""

import dataclasses
from pathlib import Path
from typing import Literal

from latent_codec.errors import UserError
from latent_codec.model.config import CodecConfig, LiteConfig
from train.config.presets import photo, photo_joint
from train.config.prior import PriorConfig
from train.config.vae import IWAEConfig, JointConfig, TrainConfig

Objective = Literal["joint", "elbo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    data: tuple[Path, ...]
    """Tar shards or folders of images to train on."""
    val: Path
    """A tar file or a folder of other images: for the quantiser, and to measure on."""
    out: Path
    """The recipe's folder. What is there goes on."""
    minutes: float
    """Wall time of this call, from the start of the process: reading, compiling and saving are within it."""
    total_minutes: float = 30.0
    """Training time of the whole plan, over all calls, without reading, compiling and measuring. At the speed that the
    first call measures it is a number of steps, at which the learning rates' cosines end."""
    prior_share: float = 0.2
    """Of the training time, what the context prior gets."""
    start_from: str = "photo"
    """A `lite` model (a file or a shipped one's name) to start from. Its networks and likelihood stay, but patches
    overlap as the preset's."""
    objective: Objective = "joint"
    """`joint`: the codec trains as by `photo_joint`, its context prior with it. `elbo`: as by `photo`, for a model
    that has no quantiser yet, or whose channels grow."""
    latent_channels: int | None = None
    """What its channels grow to; by default they stay as many."""
    batch_size: int | None = None
    """Crops per step of the codec; by default 256 on a GPU of 16 GiB or more, 64 on a smaller one, 8 on a CPU."""
    crop: int = 128
    """Side of the codec's crops, in pixels."""
    learning_rate: float | None = None
    """Of the codec; by default the preset's times the square root of how much larger the batch is, up to 0.001."""
    lpips_weight: float = 0.0
    """Nats per pixel for one unit of LPIPS in the codec's training; 0 leaves LPIPS out."""
    lpips_backbone: Path | None = None
    """Local safetensors file with AlexNet's ImageNet features for it; otherwise they are downloaded."""
    prior: PriorConfig = dataclasses.field(default_factory=PriorConfig)
    """Of the context prior; steps follow from the plan, and a batch of 8 becomes 256 on a GPU."""
    compile: bool | None = None
    """Have torch compile the codec's training step; by default on a GPU."""
    probe_steps: int = 80
    """Steps of the throwaway run that measures the speed, the last quarter of which counts."""
    save_minutes: float = 2.0
    """Between two checkpoints."""
    margin_minutes: float = 0.3
    """Of a call, kept for the last checkpoint."""
    finish_minutes: float = 2.0
    """A stage starts only if a call has this much left: some cannot be interrupted, and a network compiles first."""
    figure_images: int = 24
    """Validation images of the figure, by the hashes of their names; 0 draws none."""


def codec_config(recipe: Recipe, model: TrainConfig, batch_size: int, steps: int, on_gpu: bool) -> TrainConfig:
    """The codec's training; `model` holds the parts of the model that it starts from."""
    more = (batch_size / model.batch_size) ** 0.5
    rate, objective = min(1e-3, model.learning_rate * more), model.objective
    assert not isinstance(objective, IWAEConfig)
    objective = dataclasses.replace(objective, lpips_weight=recipe.lpips_weight)
    if isinstance(objective, JointConfig):
        objective = dataclasses.replace(
            objective,
            prior_groups=recipe.prior.groups,
            prior_levels=recipe.prior.levels,
            prior_width=recipe.prior.width,
            prior_learning_rate=min(recipe.prior.learning_rate, objective.prior_learning_rate * more),
        )
    return dataclasses.replace(
        model,
        objective=objective,
        closed_form=False,
        steps=steps,
        batch_size=batch_size,
        crop=recipe.crop,
        learning_rate=rate if recipe.learning_rate is None else recipe.learning_rate,
        lr_warmup_steps=min(500, steps // 10),
        compile=on_gpu if recipe.compile is None else recipe.compile,
        keep_checkpoints=1,
    )


def preset_of(codec: CodecConfig, objective: Objective, latent_channels: int | None = None) -> TrainConfig:
    """Return the objective's preset with the parts of a `lite` model and at least the preset's overlap of patches; with
    `latent_channels` if given. Raises `UserError` for another kind of model."""
    if not isinstance(codec.backbone, LiteConfig) or codec.bottleneck.kind != "gaussian":
        raise UserError(
            f"the recipe trains lite models with a gaussian posterior, not {codec.backbone.kind} and "
            f"{codec.bottleneck.kind}: use train.vae and train.prior"
        )
    base = photo_joint() if objective == "joint" else photo()
    assert isinstance(base.codec.backbone, LiteConfig)
    overlap = min(max(codec.backbone.overlap, base.codec.backbone.overlap), codec.backbone.patch)
    backbone = dataclasses.replace(codec.backbone, overlap=overlap)
    channels = codec.latent_channels if latent_channels is None else latent_channels
    return dataclasses.replace(base, codec=dataclasses.replace(codec, backbone=backbone, latent_channels=channels))


def check(recipe: Recipe) -> None:
    """Raise `UserError` for values of which no plan can be made."""
    if recipe.minutes <= recipe.margin_minutes or recipe.total_minutes <= 0:
        raise UserError(
            f"minutes {recipe.minutes:g} must exceed margin_minutes {recipe.margin_minutes:g}, and total_minutes "
            f"{recipe.total_minutes:g} must be positive"
        )
    if recipe.objective == "joint" and recipe.latent_channels is not None:
        raise UserError(
            f"latent_channels {recipe.latent_channels} and a joint objective, whose model needs a quantiser for them: "
            "let them grow with --objective elbo, then start from that model"
        )
    if not 0 < recipe.prior_share < 1:
        raise UserError(f"prior_share is {recipe.prior_share:g}; it is a share, between 0 and 1")
    if recipe.probe_steps < 4:
        raise UserError(f"probe_steps is {recipe.probe_steps}; the speed of fewer than 4 steps says nothing")
