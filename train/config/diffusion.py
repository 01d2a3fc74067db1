"""Configure the training of a latent diffusion model, by presets whose fields the command line overrides."""

import dataclasses
from collections.abc import Callable

from latent_codec.diffusion.config import TransformerConfig
from latent_codec.errors import UserError
from train.config.common import LoopConfig, check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Configure flow matching: the distribution of times, and classifier-free guidance."""

    time_mean: float
    """Mean of the normal variable whose logistic function is the time t; t = 1 is pure noise."""
    time_std: float
    """Standard deviation of that variable."""
    label_dropout: float
    """Share of the images trained without their label. Classifier-free guidance needs more than 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig(LoopConfig):
    """Configure `train.diffusion`; the learning rate follows half a cosine to 0 after its warm-up."""

    transformer: TransformerConfig
    objective: FlowConfig
    flip: bool
    """Train on the latents of mirrored images half of the time. They must be stored (`encode --flips`)."""


def check_diffusion(config: DiffusionConfig) -> None:
    """Raise `UserError` for values that would only fail, or fail to resume, later."""
    check_numbers(config)
    if not 0 <= config.objective.label_dropout <= 1 or config.objective.time_std < 0:
        raise UserError(
            f"label_dropout {config.objective.label_dropout} must be from 0 to 1, and time_std "
            f"{config.objective.time_std} not negative"
        )


def photo() -> DiffusionConfig:
    """Train DiT-S on latents of 256x256 photographs: 32x32 positions, tokens of 2x2; needs a GPU."""
    return DiffusionConfig(
        transformer=TransformerConfig(size=32, patch=2, depth=12, heads=6, head_width=64),
        objective=FlowConfig(time_mean=0.0, time_std=1.0, label_dropout=0.1),
        flip=False,
        steps=100_000,
        batch_size=256,
        accumulation=1,
        learning_rate=2e-4,
        lr_warmup_steps=1_000,
        weight_decay=0.0,
        max_grad_norm=1.0,
        ema_decay=0.9995,
        compile=False,
        seed=0,
        log_every=100,
        eval_every=5_000,
        save_every=1_000,
        keep_checkpoints=2,
        max_skipped=25,
    )


def mnist() -> DiffusionConfig:
    """Train on latents of MNIST: 8x8 positions, tokens of 2x2; takes minutes on two CPU cores."""
    return dataclasses.replace(
        photo(),
        transformer=TransformerConfig(size=8, patch=2, depth=6, heads=4, head_width=32),
        steps=2_000,
        batch_size=128,
        learning_rate=1e-3,
        lr_warmup_steps=100,
        ema_decay=0.998,
        eval_every=1_000,
        save_every=500,
    )


PRESETS: dict[str, Callable[[], DiffusionConfig]] = {"photo": photo, "mnist": mnist}
