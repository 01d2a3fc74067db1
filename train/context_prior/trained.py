"""Train the context prior together with the encoder."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.model.file import LatentStatistics
from latent_codec.prior.context import ContextConfig
from latent_codec.storage.tensors import save_tensors
from train.config.prior import context_groups, context_levels
from train.config.vae import JointConfig
from train.context_prior.network import ContextNet


class TrainedPrior(ContextNet):
    """A context prior that a run's checkpoints hold: `prior.safetensors`, and averaged in `prior_ema.safetensors`."""

    def __init__(
        self,
        config: ContextConfig,
        channel_steps: np.ndarray,
        statistics: LatentStatistics,
        order: np.ndarray | None = None,
    ) -> None:
        super().__init__(config, channel_steps, statistics, order)
        self.register_buffer("channels", torch.from_numpy(self.order))  # for those that go on from the weights

    def save(self, path: Path) -> None:
        save_tensors(path, {k: t.detach().cpu().contiguous() for k, t in self.state_dict().items()}, {"format": "pt"})


def prior_of(config: JointConfig, source: str) -> TrainedPrior:
    """The prior to begin with: that of a model if it has one of this shape, else random weights for its quantiser.

    Raises `UserError` if the model has no quantiser, or if the decoder alone is to learn and it has no such prior.
    """
    model = Codec.load(source)
    if model.priors is None or model.statistics is None:
        raise UserError(f"--start-from {source}: it has no quantiser yet; `latent-codec export` it with --data")
    groups = context_groups(config.prior_groups, model.config.latent_channels)
    levels = context_levels(config.prior_levels, groups)
    wanted = ContextConfig(groups=groups, width=config.prior_width, centred=True, levels=levels)
    context = model.priors.context
    if config.decoder_alone and (context is None or context.config != wanted):
        found = "none" if context is None else context.config
        raise UserError(
            f"--start-from {source}: its context prior is to stay and should be {wanted}, not {found}; give the "
            "model's --prior-groups, --prior-levels and --prior-width, or train one by train.prior first"
        )
    if context is None or dataclasses.replace(context.config, centred=True) != wanted:
        net = TrainedPrior(wanted, model.priors.channel_steps, model.statistics)
    else:
        net = TrainedPrior(wanted, model.priors.channel_steps, model.statistics, context.order)
        net.thaw(context)
    net.round_by(model.priors.feedback)
    return net
