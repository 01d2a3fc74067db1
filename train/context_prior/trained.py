"""Create the context prior that a run trains, with random weights or those of a model or of another run."""

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.prior.context import ContextConfig
from latent_codec.storage.run_folder import checkpoints_in
from latent_codec.storage.tensors import check_state
from train.config.prior import context_layout
from train.config.vae import JointConfig
from train.context_prior.network import ContextNet


def prior_of(config: JointConfig, source: str) -> ContextNet:
    """Return a model's context prior for a joint phase, or random weights for its quantiser if the shape differs.
    Raises `UserError` if it has no quantiser, or if only the decoder is trained and the prior does not fit."""
    model = Codec.load(source)
    if model.priors is None or model.statistics is None:
        raise UserError(f"--start-from {source}: it has no quantiser yet; `latent-codec export` it with --data")
    groups, levels = context_layout(config.prior_groups, config.prior_levels, model.config.latent_channels)
    nested = bool(model.config.prefixes)
    wanted = ContextConfig(groups=groups, width=config.prior_width, centred=True, levels=levels, nested=nested)
    context = model.priors.context
    if config.decoder_alone and (context is None or context.config != wanted):
        found = "none" if context is None else context.config
        raise UserError(
            f"--start-from {source}: its context prior is to stay and should be {wanted}, not {found}; give the "
            "model's --prior-groups, --prior-levels and --prior-width, or train one by train.prior first"
        )
    if context is None or dataclasses.replace(context.config, centred=True, nested=nested) != wanted:
        net = ContextNet(wanted, model.priors.channel_steps, model.statistics, order_of(model))
    else:
        net = ContextNet(wanted, model.priors.channel_steps, model.statistics, context.order)
        net.thaw(context)
    net.round_by(model.priors.feedback)
    return net


def order_of(codec: Codec) -> np.ndarray | None:
    """Return the order in which a prior codes a model's channels if it has prefixes: their own. None: any order."""
    return np.arange(codec.config.latent_channels) if codec.config.prefixes else None


def prior_from(source: Path | None, context: ContextConfig, codec: Codec) -> ContextNet:
    """Return a context prior for a codec with the weights of a model or of a joint run, or random ones without a
    source. Raises `UserError` if the source has no prior that fits."""
    assert codec.priors is not None and codec.statistics is not None
    channel_steps, statistics, order = codec.priors.channel_steps, codec.statistics, order_of(codec)
    if source is None:
        return ContextNet(context, channel_steps, statistics, order)
    try:
        if not source.is_dir():
            priors = Codec.load(source).priors
            if priors is None or priors.context is None:
                raise UserError(f"--start-from {source}: the model has no context prior")
            net = ContextNet(context, channel_steps, statistics, priors.context.order if order is None else order)
            net.thaw(priors.context)
            return net
        found = [path / "prior_ema.safetensors" for path in checkpoints_in(source / "checkpoints")]
        if not (files := [file for file in found if file.is_file()]):
            raise UserError(f"--start-from {source}: no checkpoint with a prior, as runs of a joint objective have")
        tensors = load_file(files[-1])
        net = ContextNet(context, channel_steps, statistics, tensors["channels"].numpy())
        check_state(net.state_dict(), tensors, str(files[-1]))
        net.load_state_dict(tensors)
    except ValueError as error:
        raise UserError(f"--start-from {source}: {error}") from error
    return net
