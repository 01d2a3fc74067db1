"""Compute the KL weight and the learning rate as pure functions of the step."""

import math

from train.config.common import LoopConfig
from train.config.vae import ELBOConfig, IWAEConfig, JointConfig, TrainConfig


def beta_at(config: ELBOConfig | IWAEConfig | JointConfig, step: int) -> float:
    """Return the weight of the KL at a step; objectives other than the ELBO have a weight of 1."""
    if not isinstance(config, ELBOConfig):
        return 1.0
    if config.warmup == "none" or config.warmup_steps == 0:
        return config.beta
    if config.warmup == "cyclical":  # Fu et al. 2019: rise over the first half of each cycle, hold over the second
        return config.beta * min(1.0, 2.0 * (step % config.warmup_steps) / config.warmup_steps)
    share = min(1.0, step / config.warmup_steps)
    if config.warmup == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return config.beta * share


def learning_rate_at(config: LoopConfig, step: int) -> float:
    """Return the rate at a step: a linear warm-up, then half a cosine to zero at the last step (Loshchilov & Hutter
    2017), or falling stages if the configuration says so."""
    if isinstance(config, TrainConfig) and config.lr_schedule == "stages":
        return _staged_rate_at(config, step)
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    share = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _staged_rate_at(config: LoopConfig, step: int) -> float:
    """Return the rate of eight falling stages without warm-up; stage i has 10^(-i/7) of it for a share of 3^i / 3280 of
    the steps. Over 3,280 passes this is the schedule of Burda et al. (2016, section 5)."""
    # 1 + 3 + ... + 3^(i-1) = (3^i - 1) / 2 passes come before stage i.
    stage = sum(2 * 3280 * step >= (3**i - 1) * config.steps for i in range(1, 8))
    return config.learning_rate * 10 ** (-stage / 7)
