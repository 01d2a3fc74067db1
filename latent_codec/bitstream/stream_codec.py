"""Compress posteriors to `.lc` streams and back: quantiser, prior, entropy coder and container of one model."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from latent_codec.bitstream.container import Stream, pack, quantizer_settings
from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry, check_size
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.model.codebooks import FiniteScalarQuantizer, VectorQuantizer
from latent_codec.model.codec import Codec, suggest_model
from latent_codec.noise import fold, text_key
from latent_codec.prior.context import ContextPrior
from latent_codec.prior.passes import Prior, QuantizedPasses, channels_in, decode, ideal_bits, quantize
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import STEP_ONE, Quantized, QuantizerSettings, Scaled, dequantize, scale
from latent_codec.prior.rans import Coder


class CompressedImage(NamedTuple):
    """Hold one image's file and its ideal size."""

    data: bytes
    ideal_bits: float
    """The prior's code length; the file adds its header and the coder's loss."""
    quantized: Quantized


class StreamCodec:
    """Compress latents under one prior of a model. Streams do not depend on batch, device or threads."""

    def __init__(self, codec: Codec, device: str, prior: PriorKind | None = None) -> None:
        """Take the prior of a kind, by default the model's best; raise `UserError` if it is missing."""
        if codec.priors is None:
            raise UserError(
                "the model has no prior to code with; `latent-codec export MODEL DST --data IMAGES` makes one"
            )
        try:
            self.prior: Prior = codec.priors.choose(prior)
        except KeyError as error:
            raise UserError(f"the model has no {prior} prior; fit one with train.prior") from error
        self.codec, self.device, self.channel_steps = codec, device, codec.priors.channel_steps
        self.feedback = codec.priors.feedback if self.prior.kind == "context" else None
        self.stream_id = codec.priors.stream_id(codec.model_id, self.prior.kind)
        self._coder = Coder(self.prior.tables)

    def scale(self, coded: torch.Tensor, step: int, seed: int | None) -> Scaled:
        """Return coded latents (channels, h, w) in steps, as `quantizer.scale`, or a codebook's indices as they are."""
        if self.codec.config.codes is None:
            return scale(coded, self.channel_steps, step, seed)
        assert step == STEP_ONE and seed is None
        if bool((coded < 0).any()):
            raise UserError("the model's latents are not finite; try --dtype float32")
        return Scaled(coded.cpu().numpy().astype(np.float64), step, seed)

    def code(self, image: Scaled) -> QuantizedPasses:
        """Return the integers of an image and the symbols that code them, as `compress` does."""
        return quantize(self.prior, [image], self.device, self.feedback)[0]

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        """Return the latents (z, h, w) float32 that a decoder reads, on the CPU."""
        bottleneck = self.codec.bottleneck
        if not isinstance(bottleneck, VectorQuantizer | FiniteScalarQuantizer):
            return dequantize(quantized, self.channel_steps)
        with torch.no_grad():
            return bottleneck.look_up(torch.from_numpy(quantized.values.astype(np.int64)))[0]

    def compress(self, images: Sequence[tuple[Scaled, Geometry]], groups: int | None = None) -> list[CompressedImage]:
        """Return a file for each image; their latents must share one shape. Under a nested prior they hold the first
        `groups`, or as many as are worth their bits."""
        codings = quantize(self.prior, [image for image, _ in images], self.device, self.feedback, groups)
        return [self.file(coding, geometry) for coding, (_, geometry) in zip(codings, images, strict=True)]

    def file(self, coding: QuantizedPasses, geometry: Geometry) -> CompressedImage:
        """Return the file of a coded image."""
        quantized, passes, groups = coding
        stream = Stream(
            version=self.prior.version,
            stream_id=self.stream_id,
            geometry=geometry,
            prior=self.prior.kind,
            step=quantized.step,
            seed=quantized.seed,
            payload=self._coder.encode(passes),
            groups=groups,
        )
        return CompressedImage(pack(stream), ideal_bits(self.prior, passes), quantized)

    def read(self, streams: Sequence[Stream]) -> list[Quantized | UserError]:
        """Return the integers of streams of one latent shape, or the error of each damaged one."""
        settings = [self.settings(stream) for stream in streams]
        return decode(self.prior, self._coder, [s.payload for s in streams], settings, self.device)

    def settings(self, stream: Stream) -> QuantizerSettings:
        """Return what decoding a stream's payload needs; raises `UserError` as `quantizer_settings` does."""
        channels = channels_in(self.prior, stream.groups)
        return quantizer_settings(stream, self.codec.config, self.codec.factor, channels)

    def decompress(self, streams: Sequence[Stream]) -> list[torch.Tensor | UserError]:
        """Return the latents (z, h, w) float32 of streams of one latent shape, or the error of each damaged one."""
        return [r if isinstance(r, UserError) else self.dequantize(r) for r in self.read(streams)]

    def trim(self, streams: Sequence[Stream], channels: int) -> list[bytes | UserError]:
        """Return files of streams of one latent shape with the groups that hold their first channels alone."""
        prior = self.prior
        if not isinstance(prior, ContextPrior) or not prior.config.nested:
            return [UserError(f"coded under a {prior.kind} prior, whose streams cannot be trimmed") for _ in streams]
        groups = next(number for number, end in enumerate(prior.ends) if end >= channels)
        files: list[bytes | UserError] = []
        for stream, found in zip(streams, self.read(streams), strict=True):
            if isinstance(found, UserError) or stream.groups is None or stream.groups <= groups:
                files.append(found if isinstance(found, UserError) else pack(stream))
            else:
                (coding,) = quantize(prior, [found.scaled()], self.device, groups=groups)
                files.append(self.file(coding, stream.geometry).data)
        return files


class StreamReader:
    """Decompress a model's streams, whichever of its priors they were coded under."""

    def __init__(self, codec: Codec, device: str) -> None:
        """Raise `UserError` if the codec has no prior."""
        coders = (StreamCodec(codec, device, kind) for kind in (None, "factorized"))
        self.codec, self.coders = codec, {coder.prior.kind: coder for coder in coders}

    def is_maker(self, stream: Stream) -> bool:
        """Return whether this model made a stream."""
        return stream.prior in self.coders and self.coders[stream.prior].stream_id == stream.stream_id

    def check(self, stream: Stream, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[PriorKind, tuple[int, int, int]]:
        """Return the prior and the shape of the coded latents, which streams decompressed together must share.

        Raises `UserError` if the stream is another model's, its image has more than `max_pixels` pixels once padded to
        whole latents, or its payload is too short for its size.
        """
        kind, found = stream.prior, stream.stream_id
        if kind not in self.coders:
            raise UserError(f"coded under a {kind} prior, which the model has not; {remedy(kind, found)}")
        if found != (wanted := self.coders[kind].stream_id):
            raise UserError(
                f"made by another model (stream id {found.hex()}, of this one {wanted.hex()}); {remedy(kind, found)}"
            )
        if (version := stream.version) != (own := self.coders[kind].prior.version):
            raise UserError(f"damaged: it says format version {version}, and this model's streams are of {own}")
        shape = self.coders[kind].settings(stream).shape
        check_size(stream.geometry.height, stream.geometry.width, max_pixels, self.codec.factor)
        return kind, shape

    def decompress(self, streams: Sequence[Stream]) -> list[torch.Tensor | UserError]:
        """Return the latents of streams for which `check` returned the same, or the error of each damaged one."""
        return self.coders[streams[0].prior].decompress(streams)

    def trim(self, streams: Sequence[Stream], channels: int) -> list[bytes | UserError]:
        """Return trimmed files of streams for which `check` returned the same, as `StreamCodec.trim` does."""
        return self.coders[streams[0].prior].trim(streams, channels)


def is_maker(codec: Codec, kind: PriorKind, stream_id: bytes) -> bool:
    """Return whether a codec writes streams with this id under its prior of this kind."""
    return codec.priors is not None and codec.priors.stream_id(codec.model_id, kind) == stream_id


@functools.cache  # a folder may hold many files of one other model
def remedy(kind: PriorKind, stream_id: bytes) -> str:
    """Return advice on where to find the model that wrote streams with this id."""
    return suggest_model(lambda codec: is_maker(codec, kind, stream_id))


def dither_seed(seed: int, name: str) -> int:
    """Return the 64-bit dither seed of one image, from the seed of a run and the image's name."""
    return int(fold(seed, text_key(name))) % 2**64
