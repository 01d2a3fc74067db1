"""Configure the training of a latent diffusion model."""

import dataclasses

from latent_codec.diffusion.config import TransformerConfig
from latent_codec.errors import UserError
from train.config.common import _check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    time_mean: float
    """Of the normal variable whose logistic function t is, t = 1 being pure noise."""
    time_std: float
    label_dropout: float
    """Share of the images that are trained on without their label; guidance needs some."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    transformer: TransformerConfig
    objective: FlowConfig
    flip: bool
    """Take the mirrored image's latents half of the time; the latents need to have them (`encode --flips`)."""
    steps: int
    """Optimizer steps in all; the cosine learning rate ends here."""
    batch_size: int
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: int
    """Micro-batches per optimizer step on each process."""
    learning_rate: float
    lr_warmup_steps: int
    weight_decay: float
    max_grad_norm: float | None
    ema_decay: float
    """Decay of the averaged weights, which are what is evaluated and sampled from; 0 keeps the raw weights."""
    compile: bool
    seed: int
    log_every: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    max_skipped: int
    """Non-finite steps in a row after which the run stops."""


def check_diffusion(config: DiffusionConfig) -> None:
    """As `check`."""
    _check_numbers(config)
    if not 0 <= config.objective.label_dropout <= 1 or config.objective.time_std < 0:
        raise UserError(
            f"label_dropout {config.objective.label_dropout} must be from 0 to 1, and time_std "
            f"{config.objective.time_std} not negative"
        )
