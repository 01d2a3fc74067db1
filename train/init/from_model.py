"""Initialise a codec with the weights of another model, which may have fewer channels or blocks, or less overlap."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from torch.nn.functional import pad

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, DiagonalGaussianConfig, LiteConfig
from latent_codec.model.likelihoods import Gaussian
from latent_codec.model.posteriors import DiagonalGaussian, Posterior
from latent_codec.storage.tensors import check_state
from train.data.crops import Batch
from train.init.closed_form import covariance_around

State = dict[str, torch.Tensor]

_FINEST_STEP = 0.1
"""Noise that the new channels of a model with prefixes are made for, over the likelihood's sigma: that of this step."""


def start_from_model(codec: Codec, source: str, batches: Iterable[Batch]) -> None:
    """Copy a model's weights; raises `UserError` unless it has the same kinds of parts and the same tensors.

    A `lite` model may have less overlap or fewer blocks: what is added starts without effect. With a Gaussian posterior
    and likelihood it may also have fewer latent channels: new ones learn from the crops of `batches` what it misses.
    If `codec` has prefixes, they follow the model's channels in the order of its context prior, strongest first. Where
    `codec` predicts fewer log-variances, the others take their average over `batches`.
    """
    model = Codec.load(source)
    nested = codec.config.prefixes != model.config.prefixes
    state, backbone, own = model.state_dict(), model.config.backbone, codec.config.backbone
    more = codec.config.latent_channels - model.config.latent_channels
    if isinstance(backbone, LiteConfig) and isinstance(own, LiteConfig):
        overlap, before = max(backbone.overlap, own.overlap), backbone
        backbone = dataclasses.replace(backbone, overlap=overlap)
        if _is_deeper(own, backbone):
            depths = {"encoder_depths": own.encoder_depths, "decoder_depths": own.decoder_depths}
            backbone = dataclasses.replace(backbone, **depths)
        can_grow = backbone == own and codec.config.bottleneck.kind == model.config.bottleneck.kind == "gaussian"
        if more > 0 and can_grow and isinstance(codec.likelihood, Gaussian) and isinstance(model.likelihood, Gaussian):
            sigma = float(codec.likelihood.sigma.detach())
            if nested:
                _reorder(model)
            state = _add_channels(model, more, batches, sigma, sigma * (_FINEST_STEP if nested else 1))
            more = 0
        if can_grow and more == 0:
            state = _fix_logvars(state, model, codec.config, batches)
        for name in ("backbone.linear.encoder.weight", "backbone.linear.decoder.weight"):
            state[name] = pad(state[name], (overlap - before.overlap,) * 4)
        if backbone == own:
            state = _add_blocks(state, before, own, codec.state_dict())
    if backbone != own or more:
        raise UserError(f"--start-from {source}: its backbone or channels differ from this model's: {model.config}")
    check_state(codec.state_dict(), state, f"--start-from {source}")
    codec.load_state_dict(state)


def _is_deeper(own: LiteConfig, model: LiteConfig) -> bool:
    """Return whether each resolution has at least as many blocks as the model's."""
    pairs = ((own.encoder_depths, model.encoder_depths), (own.decoder_depths, model.decoder_depths))
    return all(len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True)) for a, b in pairs)


def _add_blocks(state: State, model: LiteConfig, own: LiteConfig, fresh: State) -> State:
    """Return the state of a deeper `lite`, whose new blocks follow the model's at each resolution and add nothing yet.
    They take their first convolutions from `fresh`, a state of the deeper network."""
    for name, before, after, first in (
        ("encoder", model.encoder_depths, own.encoder_depths, 1),  # after the space-to-depth layer
        ("decoder", model.decoder_depths[::-1], own.decoder_depths[::-1], 0),
    ):
        prefix, places = f"backbone.{name}.", {part: first + i for i, part in enumerate(_parts(after))}
        number = {str(first + i): str(places[part]) for i, part in enumerate(_parts(before))}
        moved = {}
        for key, tensor in state.items():
            old, _, rest = key.removeprefix(prefix).partition(".")
            moved[f"{prefix}{number[old]}.{rest}" if key.startswith(prefix) else key] = tensor
        state = moved | {
            key: torch.zeros_like(tensor) if ".conv2." in key else tensor
            for key, tensor in fresh.items()
            if key.startswith(prefix) and key not in moved
        }
    return state


def _parts(depths: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """List the layers of a residual network of a `lite` in order, by kind, resolution and number."""
    parts = [("first", 0, 0)]
    for i, depth in enumerate(depths):
        parts += [("scale", i, 0)] * (i > 0) + [("block", i, k) for k in range(depth)]
    return [*parts, ("activation", 0, 0), ("last", 0, 0)]


def _reorder(model: Codec) -> None:
    """Bring a `lite` model's channels into the order in which its context prior codes them."""
    if model.priors is None or model.priors.context is None:
        return
    order = torch.from_numpy(model.priors.context.order)
    state, z = model.state_dict(), len(order)
    last = _last_layer(model)
    for name in ("backbone.linear.encoder.weight", "backbone.linear.encoder.bias", f"{last}.weight", f"{last}.bias"):
        state[name] = torch.cat([part[order] for part in state[name].split(z)])
    state["backbone.linear.decoder.weight"] = state["backbone.linear.decoder.weight"][order]
    first = state["backbone.decoder.0.weight"]  # (width, z + classes, 3, 3)
    state["backbone.decoder.0.weight"] = torch.cat([first[:, order], first[:, z:]], 1)
    model.load_state_dict(state)


def _last_layer(model: Codec) -> str:
    """Return the name of the last convolution of a `lite` encoder's residual network."""
    return f"backbone.encoder.{len(model.backbone.get_submodule('encoder')) - 1}"  # pyright: ignore[reportArgumentType]


def _add_channels(model: Codec, more: int, batches: Iterable[Batch], sigma: float, finest: float) -> State:
    """Return the state of a `lite` with `more` channels after its own, which only its linear path uses.

    They are found by reduced-rank regression of a patch's reconstruction error on the pixels that the linear encoder
    sees (Izenman 1975): probabilistic principal components, with noise `finest`, of the error that a linear map of
    these pixels predicts. Their posteriors have the noise `sigma`.
    """
    z, p, c = model.config.latent_channels, model.factor, model.config.image_channels
    new = _components(model, more, batches, sigma, finest)
    state = dict(model.state_dict())

    def append(name: str, rows: torch.Tensor, *, parts: int = 1) -> None:
        """Insert rows after the model's channels, or after them in each of the means and log-variances."""
        old = state[name]
        rest, own = old[parts * z :], old[: parts * z].reshape(parts, z, *old.shape[1:])  # classes' rows come last
        both = torch.cat([own, rows.to(old).reshape(parts, more, *old.shape[1:])], 1)
        state[name] = torch.cat([both.flatten(0, 1), rest])

    side = model.state_dict()["backbone.linear.encoder.weight"].shape[-1]
    means = new.project.T.reshape(more, c, side, side)
    append("backbone.linear.encoder.weight", torch.stack([means, torch.zeros_like(means)]), parts=2)
    append("backbone.linear.encoder.bias", torch.stack([new.offset, new.logvar]), parts=2)
    own = state["backbone.linear.decoder.weight"]
    back = pad(new.back.T.reshape(more, c, p, p), (side // 2 - p // 2,) * 4)
    append("backbone.linear.decoder.weight", pad(back, (0, 0, 0, 0, 0, own.shape[1] - c)))
    last = _last_layer(model)
    for name in (f"{last}.weight", f"{last}.bias"):
        append(name, torch.zeros(2, more, *state[name].shape[1:]), parts=2)
    first = "backbone.decoder.0.weight"  # (width, z + classes, 3, 3)
    state[first] = state[first].transpose(0, 1)
    append(first, torch.zeros(more, *state[first].shape[1:]))
    state[first] = state[first].transpose(0, 1).contiguous()
    return state


@torch.no_grad()
def _fix_logvars(state: State, model: Codec, config: CodecConfig, batches: Iterable[Batch]) -> State:
    """Return the state of a `lite` whose encoder predicts fewer log-variances than the model's, if `config` says so."""
    own, before, z = config.bottleneck, model.config.bottleneck, config.latent_channels
    assert isinstance(own, DiagonalGaussianConfig) and isinstance(before, DiagonalGaussianConfig)
    n = own.logvar_channels
    if n is None or before.logvar_channels is not None:
        return state
    logvar = state["backbone.linear.encoder.bias"][z:].clone()  # that of new channels, which nothing else predicts
    found = [model.encode(batch.pixels.cpu(), batch.labels.cpu()) for batch in itertools.islice(batches, 16)]
    if found:  # none are left where they were used to add channels
        average = torch.stack([_logvar(posterior).mean((0, 2, 3)) for posterior in found]).mean(0)
        logvar[: len(average)] = average
    kept, last = dict(state), _last_layer(model)
    for name in ("backbone.linear.encoder.weight", "backbone.linear.encoder.bias", f"{last}.weight", f"{last}.bias"):
        kept[name] = state[name][: z + n]
    return kept | {"bottleneck.logvar": logvar[n:]}


def _logvar(posterior: Posterior) -> torch.Tensor:
    assert isinstance(posterior, DiagonalGaussian)
    return posterior.logvar


class _Components(NamedTuple):
    """Hold n linear latents of a window x (d,) of pixels: z = project' x + offset, with log-variance `logvar`. The
    error (e,) of the patch in the window's middle is back z."""

    project: torch.Tensor  # (d, n) float64
    offset: torch.Tensor  # (n,)
    back: torch.Tensor  # (e, n)
    logvar: torch.Tensor  # (n,)


@torch.no_grad()
def _components(model: Codec, count: int, batches: Iterable[Batch], sigma: float, finest: float) -> _Components:
    p, c = model.factor, model.config.image_channels
    side = model.state_dict()["backbone.linear.encoder.weight"].shape[-1]
    d, e = c * side**2, c * p**2
    inner = -(-(side - p) // (2 * p))  # patches at the edge, whose windows leave the crop
    total, outer, n = torch.zeros(d + e, dtype=torch.float64), torch.zeros(d + e, d + e, dtype=torch.float64), 0
    for batch in batches:
        labels = batch.labels.cpu()
        x = model.likelihood.from_uint8(batch.pixels.cpu())
        error = x - model.decode(model.encode(x, labels).mode(), labels)
        first = inner * p - (side - p) // 2  # pixel of the first window
        windows = x[:, :, first:, first:].unfold(2, side, p).unfold(3, side, p)  # (b, c, h, w, side, side)
        errors = error.unfold(2, p, p).unfold(3, p, p)[:, :, inner : -inner or None, inner : -inner or None]
        both = torch.cat([rearrange(t, "b c h w p q -> (b h w) (c p q)") for t in (windows, errors)], 1).double()
        total, outer, n = total + both.sum(0), outer + both.T @ both, n + len(both)
    pixel = rearrange(total[:d] / n, "(c d) -> c d", c=c).mean(1)  # one value per channel
    mean = torch.cat([pixel.repeat_interleave(side**2), torch.zeros(e, dtype=torch.float64)])  # errors are not centred
    moments = covariance_around(mean, total / n, outer / n)
    of_x, of_both = moments[:d, :d], moments[:d, d:]
    predict = torch.linalg.lstsq(of_x, of_both, driver="gelsd").solution  # (d, d); of_x may be singular
    variance, basis = torch.linalg.eigh(predict.T @ of_x @ predict)  # of the predicted error
    variance, basis = variance.flip(0)[:count].clamp(min=1.05 * finest**2), basis.flip(1)[:, :count]
    gain = torch.sqrt(variance - finest**2)
    project = predict @ basis * (gain / variance)
    return _Components(project, -(mean[:d] @ project), gain * basis, torch.log(sigma**2 / variance))
