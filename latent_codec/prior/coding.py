"""Quantised latents <-> payload bytes under either prior."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from latent_codec.errors import UserError
from latent_codec.prior.coder import Coder, Decoder
from latent_codec.prior.context import ContextPrior, at_parity
from latent_codec.prior.factorized import FactorizedPrior
from latent_codec.quantizer import LIMIT, Quantized, dither

Prior = FactorizedPrior | ContextPrior
Values = tuple[np.ndarray, np.ndarray]  # what is coded and under which tables, (n,) each


class Settings(NamedTuple):
    """What a decoder must know of an image before its payload."""

    shape: tuple[int, int, int]  # (z, h, w)
    step: int
    seed: int | None


def passes(prior: Prior, images: Sequence[Quantized], device: str) -> list[list[Values]]:
    """Each image's passes in the order of decoding; the images have one shape."""
    if isinstance(prior, FactorizedPrior):
        return [[(q.values.reshape(-1), prior.select(q.step, q.values.shape))] for q in images]
    known = np.stack([q.fine() for q in images])  # (b, z, h, w)
    values = np.stack([q.values for q in images])
    dithers = known - values.astype(np.int64) * 2**17
    steps = np.array([q.step for q in images], np.int64)
    coded: list[list[Values]] = [[] for _ in images]
    decoded = np.zeros_like(known)
    for number, span in enumerate(prior.spans):
        choice = prior.select(number, decoded, dithers, steps, device)
        where = at_parity(known.shape[2:], span.parity)
        channels = prior.order[span.start : span.stop]
        rest = values[:, channels][:, :, where] - choice.centre  # (b, g, n)
        for image, r, table in zip(coded, rest, choice.table, strict=True):
            image.append((r.reshape(-1), table.reshape(-1)))
        _put(decoded, channels, where, known[:, channels][:, :, where])
    return coded


def _put(array: np.ndarray, channels: np.ndarray, where: np.ndarray, values: np.ndarray) -> None:
    """array[:, channels][:, :, where] = values (b, g, n), which NumPy would do to a copy."""
    rows, columns = np.nonzero(where)
    array[:, channels[:, None], rows, columns] = values


def ideal_bits(prior: Prior, coded: Sequence[Values]) -> float:
    """The prior's code length of one image's passes."""
    return sum(prior.tables.bits(values, tables) for values, tables in coded)


def encode(coder: Coder, coded: Sequence[Values]) -> bytes:
    return coder.encode(list(coded))


def decode(
    prior: Prior, coder: Coder, payloads: Sequence[bytes], settings: Sequence[Settings], device: str
) -> list[Quantized | UserError]:
    """The inverse for images of one shape: each one's latents, or what is wrong with its payload."""
    shape = settings[0].shape
    reader = _Reader(coder, payloads)
    values = np.zeros((len(payloads), *shape), np.int64)
    if isinstance(prior, FactorizedPrior):
        tables = np.stack([prior.select(s.step, shape) for s in settings])
        values[:] = reader.read(tables).reshape(values.shape)
    else:
        dithers = np.stack([np.zeros(shape, np.int64) if s.seed is None else dither(s.seed, shape) for s in settings])
        steps = np.array([s.step for s in settings], np.int64)
        known = np.zeros_like(values)
        for number, span in enumerate(prior.spans):
            if reader.idle:
                break
            choice = prior.select(number, known, dithers, steps, device)
            where = at_parity(shape[1:], span.parity)
            channels = prior.order[span.start : span.stop]
            rest = reader.read(choice.table.reshape(len(payloads), -1)).reshape(choice.table.shape)
            found = rest + choice.centre  # (b, g, n)
            _put(values, channels, where, found)
            _put(known, channels, where, found * 2**17 + dithers[:, channels][:, :, where])
    limits = prior.limits if isinstance(prior, FactorizedPrior) else (-LIMIT, LIMIT)
    return reader.finish(values, settings, limits)


class _Reader:
    """Decoders of several payloads in step; one that turns out damaged drops out and the others go on."""

    def __init__(self, coder: Coder, payloads: Sequence[bytes]) -> None:
        self.outcomes: list[Decoder | UserError] = []
        for payload in payloads:
            try:
                self.outcomes.append(coder.decoder(payload))
            except UserError as error:
                self.outcomes.append(error)

    @property
    def idle(self) -> bool:
        """Whether all have dropped out."""
        return not any(isinstance(outcome, Decoder) for outcome in self.outcomes)

    def read(self, tables: np.ndarray) -> np.ndarray:
        """The next values of each, (b, n) int64, under tables (b, n); zeros for those that dropped out."""
        values = np.zeros(tables.shape, np.int64)
        for i, decoder in enumerate(self.outcomes):
            if isinstance(decoder, Decoder):
                try:
                    values[i] = decoder.read(tables[i])
                except UserError as error:
                    self.outcomes[i] = error
        return values

    def finish(
        self, values: np.ndarray, settings: Sequence[Settings], limits: tuple[int, int]
    ) -> list[Quantized | UserError]:
        """Each one's latents from values (b, z, h, w) within limits, once its decoder has come to the right end."""
        low, high = limits
        results: list[Quantized | UserError] = []
        for decoder, value, s in zip(self.outcomes, values, settings, strict=True):
            try:
                if isinstance(decoder, UserError):
                    raise decoder
                decoder.finish()
                if value.min(initial=low) < low or value.max(initial=high) > high:
                    raise UserError(f"damaged: a latent is outside {low} to {high}")
                results.append(Quantized(value.astype(np.int32), s.step, s.seed))
            except UserError as error:
                results.append(error)
        return results
