"""Detect posterior collapse from the measurements of an evaluation. Free of torch.

In a collapse the posterior becomes the prior (the KL vanishes) and the decoder ignores the latents: Bowman et al.
(2016), section 3.1; Lucas et al. (2019). KL warm-up and free bits prevent it.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from train.config.vae import TrainConfig

LEAST_KL = 0.01
"""Lower limit of the KL in nats per latent element."""
LEAST_ACTIVE = 0.25
"""Lower limit of the share of active channels."""
MOST_CLAMPED = 0.05
"""Upper limit of the share of clamped log-variances."""
LEAST_SHUFFLE_COST = 1.0
"""Lower limit of the nats per image that another image's latents cost."""


class Sign(NamedTuple):
    """Name one sign of collapse, and describe it with its remedy."""

    name: str
    text: str


def signs_of_collapse(values: Mapping[str, float], config: TrainConfig, step: int) -> Iterator[Sign]:
    """Yield the signs of collapse in values of `Validation.measure`, none before a warm-up ends; NaN is no sign."""
    if step < max(config.lr_warmup_steps, getattr(config.objective, "warmup_steps", 0)):
        return
    remedy = "lower --beta, lengthen --warmup-steps or give --free-bits"
    is_gaussian = config.codec.bottleneck.kind == "gaussian"  # other bottlenecks' KL is a constant
    if is_gaussian and (kl := values["kl_per_latent"]) < LEAST_KL:
        text = f"the KL is {kl:.2g} nats per latent element, below {LEAST_KL}: latents say nothing; {remedy}"
        yield Sign("kl_vanished", text)
    active, channels = values["active_channels"], config.codec.latent_channels
    if active < LEAST_ACTIVE * channels:
        text = f"{active:.0f} of {channels} latent channels are active, below {LEAST_ACTIVE:.0%}; {remedy}"
        yield Sign("channels_inactive", text)
    if (clamped := values["clamped"]) > MOST_CLAMPED:
        text = f"{clamped:.0%} of the log-variances are clamped, above {MOST_CLAMPED:.0%}; lower --learning-rate"
        yield Sign("logvar_clamped", text)
    if (cost := values["shuffle_cost"]) < LEAST_SHUFFLE_COST:
        text = f"another image's latents cost {cost:.2g} nats per image, below {LEAST_SHUFFLE_COST:g}: the decoder"
        yield Sign("latents_ignored", f"{text} ignores them; {remedy}")
