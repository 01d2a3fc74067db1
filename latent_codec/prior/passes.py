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
from latent_codec.prior.quantizer import BITS_OF_ERROR, FINE, Quantized, QuantizerSettings, Scaled, stack, to_integers
from latent_codec.prior.rans import Coder, Decoder, PassSymbols

Prior = FactorizedPrior | ContextPrior
T = TypeVar("T")


class QuantizedPasses(NamedTuple):
    """Hold one image quantised under a prior, and the symbols that code it."""

    quantized: Quantized
    passes: list[PassSymbols]  # in the order of decoding
    groups: int | None = None
    """Number of the first groups that are coded under a nested prior; None: all under any other."""


def channels_in(prior: Prior, groups: int | None) -> int:
    """Return the number of channels that a stream with the first few groups holds, all of them if None.
    Raises `UserError` if the prior has fewer groups."""
    if groups is None:
        return prior.channels
    assert isinstance(prior, ContextPrior)
    if groups >= len(prior.ends):
        raise UserError(f"damaged: it claims {groups} groups of channels, and its prior has {len(prior.ends) - 1}")
    return prior.ends[groups]


def quantize(
    prior: Prior, images: Sequence[Scaled], device: str, feedback: Feedback | None = None, groups: int | None = None
) -> list[QuantizedPasses]:
    """Quantise images of one shape independently of each other. With `feedback`, rounding compensates for the errors of
    earlier passes; dithered images are not affected, because the errors of a draw are independent.

    Under a nested prior an image keeps the first `groups`, or as many as are worth their bits; a draw keeps all.
    """
    nested, stop = isinstance(prior, ContextPrior) and prior.config.nested, prior.channels
    if nested:
        stop = channels_in(prior, groups) if groups is not None else max(map(_heard, images))
    latents, batch = np.stack([image.latents for image in images]), stack([image.settings for image in images])
    dithered = batch.dithered[:, None, None]
    fine, errors = np.zeros(latents.shape, np.int64), np.zeros(latents.shape)
    coded: list[list[PassSymbols]] = [[] for _ in images]
    for number, layout in enumerate(prior.layouts):
        if layout.start >= stop:
            break
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
    codings = [
        QuantizedPasses(Quantized(own, image.step, image.seed), passes)
        for image, own, passes in zip(images, fine, coded, strict=True)
    ]
    if isinstance(prior, ContextPrior) and nested:
        return [_shortened(prior, *pair, groups) for pair in zip(images, codings, strict=True)]
    return codings


def _heard(image: Scaled) -> int:
    """Return how many first channels hold something: all channels of a draw, or of a mean up to the last channel in
    which a value would not round to 0."""
    if image.seed is not None:
        return len(image.latents)
    (channels,) = np.nonzero(np.abs(image.latents).max((1, 2), initial=0) >= 0.5)
    return int(channels.max(initial=-1)) + 1


def _shortened(prior: ContextPrior, image: Scaled, coding: QuantizedPasses, groups: int | None) -> QuantizedPasses:
    """Return an image's first groups alone: as many as given, all of a draw, or those worth their bits.

    A squared error of one step is worth `BITS_OF_ERROR`; what is left out is an error as large as itself.
    """
    ends = prior.ends
    if groups is None and image.seed is not None:
        groups = len(ends) - 1
    if groups is None:
        lost = np.square(image.latents).sum((1, 2))  # (z,)
        error = np.square(coding.quantized.fine / FINE - image.latents).sum((1, 2))
        bits = dict.fromkeys(ends, 0.0)
        for layout, (values, tables) in zip(prior.layouts, coding.passes, strict=False):  # those after are not coded
            bits[layout.stop] += float(prior.tables.bits(values, tables).sum())
        costs, spent = list[float](), 0.0
        heard = _heard(image)  # the batch may have been coded further than this image needs
        for end in ends[: 1 + next(number for number, end in enumerate(ends) if end >= heard)]:
            spent += bits[end]
            costs.append(spent + BITS_OF_ERROR * float(error[:end].sum() + lost[end:].sum()))
        groups = int(np.argmin(costs))
    fine = coding.quantized.fine.copy()
    fine[ends[groups] :] = 0
    passes = [own for layout, own in zip(prior.layouts, coding.passes, strict=False) if layout.stop <= ends[groups]]
    return QuantizedPasses(coding.quantized._replace(fine=fine), passes, groups)


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
    for layout, (values, tables) in zip(prior.layouts, coding.passes, strict=coding.groups is None):
        bits = np.stack([prior.tables.bits(values + change, tables) for change in (0, -1, 1)])
        layout.put(found, prior.order, bits.reshape(3, layout.stop - layout.start, -1))
    return found[0], found[1], found[2]


def decode(
    prior: Prior, coder: Coder, payloads: Sequence[bytes], settings: Sequence[QuantizerSettings], device: str
) -> list[Quantized | UserError]:
    """Decode the payloads of images of one shape; for a damaged one, return the error instead of its latents.
    The settings' shapes have the channels that the streams hold, and results have all, with 0 for the others."""
    batch, decoders = stack(settings), [_attempt(Decoder, coder, payload) for payload in payloads]
    fine = np.zeros(batch.dithers.shape, np.int64)
    held = settings[0].shape[0]
    for number, layout in enumerate(prior.layouts):
        if layout.start >= held or all(isinstance(decoder, UserError) for decoder in decoders):
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
        fine = np.pad(fine, ((0, prior.channels - held), (0, 0), (0, 0)))
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
