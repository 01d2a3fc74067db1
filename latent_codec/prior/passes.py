"""Quantise latents and decode payloads pass by pass, under either prior.

Encoder and decoder run the same loop: before each pass the prior predicts, from the values of all earlier passes, the
frequency table of each value and the offset and centre that relate the value to the coded integer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from latent_codec.errors import UserError
from latent_codec.prior.context import ContextPrior
from latent_codec.prior.error_feedback import Feedback
from latent_codec.prior.factorized import FactorizedPrior
from latent_codec.prior.quantizer import FINE, Quantized, QuantizerSettings, Scaled, stack, to_integers
from latent_codec.prior.rans import Coder, Decoder, PassSymbols

Prior = FactorizedPrior | ContextPrior
T = TypeVar("T")


class QuantizedPasses(NamedTuple):
    """Hold one image quantised under a prior, and the symbols that code it."""

    quantized: Quantized
    passes: list[PassSymbols]  # in the order of decoding


def quantize(
    prior: Prior, images: Sequence[Scaled], device: str, feedback: Feedback | None = None
) -> list[QuantizedPasses]:
    """Quantise images of one shape independently of each other. With `feedback`, rounding compensates for the errors of
    earlier passes; dithered images are not affected, because the errors of a draw are independent."""
    latents, batch = np.stack([image.latents for image in images]), stack([image.settings for image in images])
    dithered = batch.dithered[:, None, None]
    fine, errors = np.zeros(latents.shape, np.int64), np.zeros(latents.shape)
    coded: list[list[PassSymbols]] = [[] for _ in images]
    for number, layout in enumerate(prior.layouts):
        prediction = prior.predict(number, fine, batch, device)
        mean = target = layout.take(latents, prior.order)  # (b, g, n)
        if feedback is not None and layout.inputs and not dithered.all():
            seen, channels = prior.order[: layout.inputs], prior.order[layout.start : layout.stop]
            shift = feedback.shift(errors[:, seen], seen, channels, layout.mask(latents.shape[2:]))
            target = mean + np.where(dithered, 0, shift)
        values = _within_limits(to_integers(target, prediction.offset, dithered), prediction.offset, prior.limits)
        decoded = values * FINE
        decoded += prediction.offset
        layout.put(fine, prior.order, decoded)
        values -= prediction.centre
        for passes, rest, table in zip(coded, values, prediction.table, strict=True):
            passes.append((rest.reshape(-1), table.reshape(-1)))
        if feedback is not None:
            layout.put(errors, prior.order, decoded - np.rint(mean * FINE))
    return [
        QuantizedPasses(Quantized(own, image.step, image.seed), passes)
        for image, own, passes in zip(images, fine, coded, strict=True)
    ]


def _within_limits(values: np.ndarray, offset: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    """Return integers (b, g, n) for which the decoded values, rounded to whole steps, are within a decoder's limits.

    Error feedback, dither and the prior's predictions move values at the ends of the range beyond it.
    """
    low, high = (limit * FINE for limit in limits)
    least, most = -((FINE // 2 - low + offset) // FINE), (high + FINE // 2 - 1 - offset) // FINE
    return np.clip(values, least, most, out=values)


def ideal_bits(prior: Prior, passes: Sequence[PassSymbols]) -> float:
    """Return the prior's code length of one image in bits."""
    return sum(float(prior.tables.bits(values, tables).sum()) for values, tables in passes)


def neighbour_bits(prior: Prior, coding: QuantizedPasses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the bits of each integer of an image, and of the integers one below and one above, (z, h, w) each.
    The neighbours are priced under the same tables."""
    found = np.zeros((3, *coding.quantized.fine.shape))
    for layout, (values, tables) in zip(prior.layouts, coding.passes, strict=True):
        bits = np.stack([prior.tables.bits(values + change, tables) for change in (0, -1, 1)])
        layout.put(found, prior.order, bits.reshape(3, layout.stop - layout.start, -1))
    return found[0], found[1], found[2]


def decode(
    prior: Prior, coder: Coder, payloads: Sequence[bytes], settings: Sequence[QuantizerSettings], device: str
) -> list[Quantized | UserError]:
    """Decode the payloads of images of one shape; for a damaged one, return the error instead of its latents."""
    batch, decoders = stack(settings), [_attempt(Decoder, coder, payload) for payload in payloads]
    fine = np.zeros(batch.dithers.shape, np.int64)
    for number, layout in enumerate(prior.layouts):
        if all(isinstance(decoder, UserError) for decoder in decoders):
            break
        offset, centre, table = prior.predict(number, fine, batch, device)
        rest = np.zeros(table.shape, np.int64)
        for i, decoder in enumerate(decoders):  # a damaged payload drops out, the others go on
            if isinstance(decoder, Decoder):
                found = _attempt(decoder.read, table[i].reshape(-1))
                if isinstance(found, UserError):
                    decoders[i] = found
                else:
                    rest[i] = found.reshape(rest[i].shape)
        rest += centre
        rest *= FINE
        layout.put(fine, prior.order, rest + offset)

    def finish(decoder: Decoder, fine: np.ndarray, settings: QuantizerSettings) -> Quantized:
        decoder.finish()
        quantized, (low, high) = Quantized(fine, settings.step, settings.seed), prior.limits
        values = quantized.values
        if values.min(initial=low) < low or values.max(initial=high) > high:
            raise UserError(f"damaged: a latent is outside {low} to {high}")
        return quantized

    return [
        decoder if isinstance(decoder, UserError) else _attempt(finish, decoder, own, about)
        for decoder, own, about in zip(decoders, fine, settings, strict=True)
    ]


def _attempt(call: Callable[..., T], *arguments: Any) -> T | UserError:
    """Return the result of a call, or the `UserError` that it raised."""
    try:
        return call(*arguments)
    except UserError as error:
        return error
