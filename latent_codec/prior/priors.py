"""Store a model's quantiser and priors, whose integer tables are frozen when the model is exported.
No floating-point result of a network reaches the entropy coder, so streams decode alike on every machine."""

import dataclasses
import hashlib
from typing import Literal, NamedTuple

import numpy as np
import torch

from latent_codec.prior.context import ContextConfig, ContextPrior, Layer, pass_layouts
from latent_codec.prior.error_feedback import REACH, Feedback
from latent_codec.prior.factorized import FactorizedPrior
from latent_codec.prior.tables import Tables
from latent_codec.storage.json_config import dumps

PriorKind = Literal["context", "factorized"]
PREFIX = "prior."
"""Prefix of the names of the priors' tensors in a model file, which keep their integer types."""

_TABLES, _CONTEXT = ("counts", "sizes", "first"), ("order", "gain", "width_offset")
_LAYER = {"weight": torch.int8, "bias": torch.int32, "shift": torch.int32}


class Priors(NamedTuple):
    """Hold a model's quantiser and priors."""

    channel_steps: np.ndarray
    """(z,) float32: each channel's quantiser step at step 1; for a codebook's indices (1,), 1."""
    factorized: FactorizedPrior
    context: ContextPrior | None
    feedback: Feedback | None = None
    """Shifts by which encoders round under the context prior; decoders do not need them."""

    def choose(self, kind: PriorKind | None) -> FactorizedPrior | ContextPrior:
        """Return the prior of a kind, by default the best available; raise `KeyError` if the kind is missing."""
        if kind == "context" and self.context is None:
            raise KeyError(kind)
        return self.factorized if kind == "factorized" or self.context is None else self.context

    def stream_id(self, model_id: str, kind: str) -> bytes:
        """Return 8 bytes that identify all that a stream's meaning depends on: the model, the quantiser and one prior.

        These are the first bytes of the SHA-256 of the model id in ASCII, then of the quantiser's and that prior's
        tensors by name, each as JSON [name, shape] in ASCII and its little-endian bytes.
        """
        digest = hashlib.sha256(model_id.encode())
        for name, tensor in sorted(to_tensors(self).items()):
            if name == f"{PREFIX}base" or name.startswith(f"{PREFIX}{kind}."):
                digest.update(dumps([name, list(tensor.shape)]).encode())
                array = tensor.numpy()
                digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.digest()[:8]


def to_tensors(priors: Priors) -> dict[str, torch.Tensor]:
    """Return all numbers by tensor name; `from_tensors` is the inverse."""
    arrays = {"base": priors.channel_steps}
    arrays |= {f"factorized.{name}": getattr(priors.factorized.tables, name) for name in _TABLES}
    if priors.feedback is not None:
        arrays["feedback"] = priors.feedback.weights
    tensors: dict[str, torch.Tensor] = {}
    if (context := priors.context) is not None:
        arrays |= {f"context.{name}": getattr(context.tables, name) for name in _TABLES}
        arrays |= {f"context.{name}": getattr(context, name).astype(np.int32) for name in _CONTEXT}
        for p, network in enumerate(context.networks):
            for i, layer in enumerate(network):
                tensors |= {f"context.passes.{p}.layers.{i}.{k}": t for k, t in layer._asdict().items()}
    tensors |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorsHeader:
    """Hold what a model file's JSON says of the priors beside their tensors."""

    context: ContextConfig | None


def to_header(priors: Priors) -> PriorsHeader:
    """Return what the tensors do not say; `from_tensors` needs it."""
    return PriorsHeader(context=None if priors.context is None else priors.context.config)


def from_tensors(header: PriorsHeader, tensors: dict[str, torch.Tensor], channels: int, codes: int | None) -> Priors:
    """Return the priors of a model whose streams hold `channels` integers per position, or an index of `codes`.
    Raises `ValueError` for any tensor that is missing, unknown or unsound."""
    left = _Tensors(tensors)
    channel_steps = left.take("base", torch.float32)
    if channel_steps.shape != (channels,) or not (np.isfinite(channel_steps).all() and (channel_steps > 0).all()):
        raise ValueError(f"the quantiser's steps {channel_steps.shape} are not {channels} positive numbers")
    factorized = FactorizedPrior(channels, codes, left.take_tables("factorized"))
    if codes is not None and (channel_steps[0] != 1 or header.context is not None):
        raise ValueError("a codebook's indices have a step of 1 and no context prior")
    context = None if header.context is None else left.take_context(header.context)
    if context is not None and context.channels != channels:
        raise ValueError(f"a context prior of {context.channels} channels does not fit latents of {channels}")
    feedback = left.take_feedback(channels) if "feedback" in left.tensors else None
    if left.tensors:
        raise ValueError(f"tensors {sorted(left.tensors)[:5]} are unknown")
    return Priors(channel_steps, factorized, context, feedback)


class _Tensors:
    """Take tensors by name, type and shape until none is left."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}

    def take(self, name: str, dtype: torch.dtype) -> np.ndarray:
        if name not in self.tensors:
            raise ValueError(f"tensor {PREFIX}{name} is missing")
        tensor = self.tensors.pop(name)
        if tensor.dtype != dtype:
            raise ValueError(f"tensor {PREFIX}{name} is {tensor.dtype}, not {dtype}")
        return tensor.numpy()

    def take_tables(self, kind: str) -> Tables:
        return Tables(*(self.take(f"{kind}.{name}", torch.int32) for name in _TABLES))

    def take_context(self, config: ContextConfig) -> ContextPrior:
        order, gain, width_offset = (self.take(f"context.{name}", torch.int32) for name in _CONTEXT)
        networks = [
            tuple(self.take_layer(f"context.passes.{p}.layers.{i}") for i in range(4))
            for p in range(len(pass_layouts(config)))
        ]
        return ContextPrior(config, order, gain, width_offset, networks, self.take_tables("context"))

    def take_layer(self, name: str) -> Layer:
        return Layer(*(torch.from_numpy(self.take(f"{name}.{k}", dtype)) for k, dtype in _LAYER.items()))

    def take_feedback(self, channels: int) -> Feedback:
        weights = self.take("feedback", torch.int16)
        if weights.shape != (shape := (channels, channels, *[2 * REACH + 1] * 2)):
            raise ValueError(f"error feedback has weights of shape {weights.shape}, not {shape}")
        return Feedback(weights)
