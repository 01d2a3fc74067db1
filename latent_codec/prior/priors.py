"""What the entropy coder believes about quantised latents: integer tables, frozen when a model is exported.

No floating-point result of a network reaches the coder, so a stream decodes alike everywhere.
"""

import dataclasses
import hashlib
from typing import Literal, NamedTuple

import numpy as np
import torch

from latent_codec.prior.context import ContextConfig, ContextPrior, Layer, PassNetwork, pass_layouts
from latent_codec.prior.error_feedback import REACH, Feedback
from latent_codec.prior.factorized import FactorizedPrior
from latent_codec.prior.tables import Tables
from latent_codec.storage.json_config import dumps

PriorKind = Literal["context", "factorized"]
PREFIX = "prior."
"""Of the names of a prior's tensors in a model file; they keep their integer types."""


class Priors(NamedTuple):
    """A model's quantiser and priors."""

    channel_steps: np.ndarray
    """(z,) float32: each channel's quantisation step at step 1; of a codebook's indices (1,), 1."""
    factorized: FactorizedPrior
    context: ContextPrior | None
    feedback: Feedback | None = None
    """What an encoder rounds by under the context prior; streams do not depend on it."""

    def choose(self, kind: PriorKind | None) -> FactorizedPrior | ContextPrior:
        """The prior of a kind, by default the best there is; raises `KeyError` if there is none of that kind."""
        if kind == "factorized" or (kind is None and self.context is None):
            return self.factorized
        if self.context is None:
            raise KeyError(kind)
        return self.context

    def stream_id(self, model_id: str, kind: str) -> bytes:
        """8 bytes that name all that a stream's meaning depends on: the model, the quantiser and one prior.

        The first bytes of SHA-256 over the model id in ASCII, then the quantiser's and that prior's tensors by sorted
        name, each as its JSON [name, shape] in ASCII and its little-endian bytes.
        """
        digest = hashlib.sha256(model_id.encode())
        for name, tensor in sorted(to_tensors(self).items()):
            if name == f"{PREFIX}base" or name.startswith(f"{PREFIX}{kind}."):
                digest.update(dumps([name, list(tensor.shape)]).encode())
                array = tensor.numpy()
                digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.digest()[:8]


def to_tensors(priors: Priors) -> dict[str, torch.Tensor]:
    """All numbers by name; `from_tensors` is the inverse."""
    tensors = {"base": torch.from_numpy(priors.channel_steps)} | _tables_to_tensors(
        "factorized", priors.factorized.tables
    )
    if priors.feedback is not None:
        tensors["feedback"] = torch.from_numpy(priors.feedback.weights)
    if (context := priors.context) is not None:
        tensors |= _tables_to_tensors("context", context.tables)
        for name in _ARRAYS:
            tensors[f"context.{name}"] = torch.from_numpy(getattr(context, name).astype(np.int32))
        for p, net in enumerate(context.networks):
            for i, layer in enumerate(net.layers):
                for name, tensor in layer._asdict().items():
                    tensors[f"context.passes.{p}.layers.{i}.{name}"] = tensor
    return {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}


_ARRAYS = ("order", "gain", "width_offset")


def _tables_to_tensors(kind: str, tables: Tables) -> dict[str, torch.Tensor]:
    return {f"{kind}.{name}": torch.from_numpy(getattr(tables, name)) for name in ("counts", "sizes", "first")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorsHeader:
    """What the tensors do not say."""

    context: ContextConfig | None


def to_header(priors: Priors) -> PriorsHeader:
    return PriorsHeader(context=None if priors.context is None else priors.context.config)


def from_tensors(header: PriorsHeader, tensors: dict[str, torch.Tensor], channels: int, codes: int | None) -> Priors:
    """Priors of a model whose streams hold `channels` integers at each position, or an index of `codes`.

    Raises `ValueError` for anything missing, extra or unsound.
    """
    left = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}

    def take(name: str, dtype: torch.dtype) -> torch.Tensor:
        if name not in left:
            raise ValueError(f"tensor {PREFIX}{name} is missing")
        tensor = left.pop(name)
        if tensor.dtype != dtype:
            raise ValueError(f"tensor {PREFIX}{name} is {tensor.dtype}, not {dtype}")
        return tensor

    def take_tables(kind: str) -> Tables:
        return Tables(*(take(f"{kind}.{name}", torch.int32).numpy() for name in ("counts", "sizes", "first")))

    channel_steps = take("base", torch.float32).numpy()
    if channel_steps.shape != (channels,) or not (np.isfinite(channel_steps).all() and (channel_steps > 0).all()):
        raise ValueError(f"the quantiser's steps {channel_steps.shape} are not {channels} positive numbers")
    factorized = FactorizedPrior(channels, codes, take_tables("factorized"))
    if codes is not None and (channel_steps[0] != 1 or header.context is not None):
        raise ValueError("a codebook's indices have a step of 1 and no context prior")
    context = None
    if (config := header.context) is not None:
        order, gain, width_offset = (take(f"context.{name}", torch.int32).numpy() for name in _ARRAYS)
        dtypes = {"weight": torch.int8, "bias": torch.int32, "shift": torch.int32}
        nets = []
        for p in range(len(pass_layouts(config))):
            names = [f"context.passes.{p}.layers.{i}" for i in range(4)]
            layers = (Layer(**{k: take(f"{name}.{k}", dtype) for k, dtype in dtypes.items()}) for name in names)
            nets.append(PassNetwork(tuple(layers)))  # pyright: ignore[reportArgumentType]
        context = ContextPrior(config, order, gain, width_offset, nets, take_tables("context"))
        if context.channels != channels:
            raise ValueError(f"a context prior of {context.channels} channels for latents of {channels}")
    feedback = None
    if "feedback" in left:
        weights = take("feedback", torch.int16).numpy()
        if weights.shape != (shape := (channels, channels, *[2 * REACH + 1] * 2)):
            raise ValueError(f"error feedback has weights of shape {weights.shape}, not {shape}")
        feedback = Feedback(weights)
    if left:
        raise ValueError(f"tensors {sorted(left)[:5]} are unknown")
    return Priors(channel_steps, factorized, context, feedback)
