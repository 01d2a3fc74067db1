"""Quantised latents <-> payload bytes under either prior."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from latent_codec.errors import UserError
from latent_codec.prior.context import ContextPrior
from latent_codec.prior.error_feedback import Feedback, exact_errors
from latent_codec.prior.factorized import FactorizedPrior
from latent_codec.prior.quantizer import LIMIT, Quantized, Scaled, dither, nearest, to_integers
from latent_codec.prior.rans import Coder, Decoder

Prior = FactorizedPrior | ContextPrior
PassValues = tuple[np.ndarray, np.ndarray]  # what is coded and under which tables, (n,) each


class PayloadSettings(NamedTuple):
    """What a decoder must know of an image before its payload."""

    shape: tuple[int, int, int]  # (z, h, w)
    step: int
    seed: int | None


class QuantizedPasses(NamedTuple):
    """One image made integers under a prior."""

    quantized: Quantized
    passes: list[PassValues]  # in the order of decoding


def quantize(
    prior: Prior, images: Sequence[Scaled], device: str, feedback: Feedback | None = None
) -> list[QuantizedPasses]:
    """Each image's integers and what they are coded under; the images have one shape.

    With `feedback` the passes of a context prior make up for the rounding of those before, but where there is dither: a
    draw's errors are to be independent.
    """
    latents = np.stack([image.latents for image in images])  # (b, z, h, w)
    dithers = np.stack([image.dither() for image in images])
    dithered = np.array([image.seed is not None for image in images])
    coded: list[list[PassValues]] = [[] for _ in images]
    if isinstance(prior, FactorizedPrior):
        values = to_integers(latents, dithers, dithered[:, None, None, None])
        fine = values * 2**17 + dithers
        for image, passes, own in zip(images, coded, values, strict=True):
            passes.append((own.reshape(-1), prior.select(image.step, own.shape)))
    else:
        steps = np.array([image.step for image in images], np.int64)
        fine, errors = np.zeros_like(dithers), np.zeros(latents.shape)
        for number, span in enumerate(prior.layouts):
            choice = prior.select(number, fine, dithers, dithered, steps, device)
            where = span.where(fine.shape[2:])
            channels = prior.order[span.start : span.stop]
            own = target = latents[:, channels][:, :, where]  # (b, g, n)
            if feedback is not None and span.inputs and not dithered.all():
                seen = prior.order[: span.inputs]
                shift = feedback.shift(errors[:, seen], seen, channels, where)
                target = own + np.where(dithered[:, None, None], 0, shift)
            values = to_integers(target, choice.offset, dithered[:, None, None])
            for passes, rest, table in zip(coded, values - choice.centre, choice.table, strict=True):
                passes.append((rest.reshape(-1), table.reshape(-1)))
            rounded = values * 2**17 + choice.offset
            _put(fine, channels, where, rounded)
            if feedback is not None:
                _put(errors, channels, where, exact_errors(rounded, own))
    return [
        QuantizedPasses(Quantized(own, image.step, image.seed), passes)
        for image, own, passes in zip(images, fine, coded, strict=True)
    ]


def _put(array: np.ndarray, channels: np.ndarray, where: np.ndarray, values: np.ndarray) -> None:
    """array[:, channels][:, :, where] = values (b, g, n), which NumPy would do to a copy."""
    rows, columns = np.nonzero(where)
    array[:, channels[:, None], rows, columns] = values


def ideal_bits(prior: Prior, passes: Sequence[PassValues]) -> float:
    """The prior's code length of one image's passes."""
    return sum(prior.tables.bits(values, tables) for values, tables in passes)


def neighbour_bits(prior: Prior, coding: QuantizedPasses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of each of one image's integers, and of those one below and above under the same table, (z, h, w) each."""
    fine = coding.quantized.fine
    found = [np.zeros(fine.shape) for _ in range(3)]
    for number, (values, tables) in enumerate(coding.passes):
        for array, change in zip(found, (0, -1, 1), strict=True):
            bits = prior.tables.code_lengths(values + change, tables)
            if isinstance(prior, FactorizedPrior):
                array[:] = bits.reshape(fine.shape)
            else:
                span = prior.layouts[number]
                channels = prior.order[span.start : span.stop]
                _put(array[None], channels, span.where(fine.shape[1:]), bits.reshape(1, len(channels), -1))
    return found[0], found[1], found[2]


def encode(coder: Coder, passes: Sequence[PassValues]) -> bytes:
    return coder.encode(list(passes))


def decode(
    prior: Prior, coder: Coder, payloads: Sequence[bytes], settings: Sequence[PayloadSettings], device: str
) -> list[Quantized | UserError]:
    """The inverse for images of one shape: each one's latents, or what is wrong with its payload."""
    shape = settings[0].shape
    reader = _Reader(coder, payloads)
    dithers = np.stack([np.zeros(shape, np.int64) if s.seed is None else dither(s.seed, shape) for s in settings])
    if isinstance(prior, FactorizedPrior):
        tables = np.stack([prior.select(s.step, shape) for s in settings])
        fine = reader.read(tables).reshape(dithers.shape) * 2**17 + dithers
    else:
        dithered = np.array([s.seed is not None for s in settings])
        steps = np.array([s.step for s in settings], np.int64)
        fine = np.zeros_like(dithers)
        for number, span in enumerate(prior.layouts):
            if reader.idle:
                break
            choice = prior.select(number, fine, dithers, dithered, steps, device)
            where = span.where(shape[1:])
            channels = prior.order[span.start : span.stop]
            rest = reader.read(choice.table.reshape(len(payloads), -1)).reshape(choice.table.shape)
            _put(fine, channels, where, (rest + choice.centre) * 2**17 + choice.offset)  # (b, g, n)
    limits = prior.limits if isinstance(prior, FactorizedPrior) else (-LIMIT, LIMIT)
    return reader.finish(fine, settings, limits)


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
        self, fine: np.ndarray, settings: Sequence[PayloadSettings], limits: tuple[int, int]
    ) -> list[Quantized | UserError]:
        """Each one's latents from fine values (b, z, h, w), once its decoder has come to the right end.

        To the nearest step they must lie within the limits.
        """
        low, high = limits
        results: list[Quantized | UserError] = []
        for decoder, own, s in zip(self.outcomes, fine, settings, strict=True):
            try:
                if isinstance(decoder, UserError):
                    raise decoder
                decoder.finish()
                values = nearest(own)
                if values.min(initial=low) < low or values.max(initial=high) > high:
                    raise UserError(f"damaged: a latent is outside {low} to {high}")
                results.append(Quantized(own, s.step, s.seed))
            except UserError as error:
                results.append(error)
        return results
