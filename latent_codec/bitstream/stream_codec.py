"""Posteriors -> streams and back, with one model: quantiser, prior, entropy coder and container together."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from latent_codec.bitstream.container import Stream, StreamHeader, pack, settings
from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry
from latent_codec.model.codec import Codec, suggest_model
from latent_codec.noise import fold, text_key
from latent_codec.prior.passes import Prior, QuantizedPasses, decode, encode, ideal_bits, quantize
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import STEP_ONE, Quantized, Scaled, dequantize, scale
from latent_codec.prior.rans import Coder


class CompressedImage(NamedTuple):
    """One image's stream and what it was to cost."""

    data: bytes
    """The file."""
    ideal_bits: float
    """The prior's code length; the file adds a header and what the coder loses."""
    quantized: Quantized


class StreamCodec:
    """Compresses latents of `codec` under one of its priors. Streams do not depend on batch, device or threads."""

    def __init__(self, codec: Codec, device: str, prior: PriorKind | None = None) -> None:
        """`prior`: of which kind, by default the best that the model has. Raises `UserError` if it has none."""
        if codec.priors is None:
            raise UserError(
                "the model has no prior to code with; `latent-codec export MODEL DST --data IMAGES` makes one"
            )
        try:
            self.prior: Prior = codec.priors.choose(prior)
        except KeyError as error:
            raise UserError(f"the model has no {prior} prior; fit one with train.prior") from error
        self.codec, self.device, self.channel_steps = codec, device, codec.priors.channel_steps
        self.feedback = codec.priors.feedback if self.prior.kind == "context" else None  # what it rounds by
        self.stream_id = codec.priors.stream_id(codec.model_id, self.prior.kind)
        self._coder = Coder(self.prior.tables)

    def scale(self, coded: torch.Tensor, step: int, seed: int | None) -> Scaled:
        """What one posterior has to be coded (channels, h, w) in steps; raises `UserError` as `quantizer.scale` does.

        A codebook's indices are integers as they are: `step` must be `STEP_ONE`, and nothing is dithered.
        """
        if self.codec.config.codes is None:
            return scale(coded, self.channel_steps, step, seed)
        assert step == STEP_ONE and seed is None
        if bool((coded < 0).any()):
            raise UserError("the model's latents are not finite; try --dtype float32")
        return Scaled(coded.cpu().numpy().astype(np.float64), step, seed)

    def quantize(self, image: Scaled) -> Quantized:
        """The integers that `compress` codes."""
        return self.code(image).quantized

    def code(self, image: Scaled) -> QuantizedPasses:
        """The integers, and what they are coded under."""
        return quantize(self.prior, [image], self.device, self.feedback)[0]

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        """Latents (z, h, w) float32, as a decoder reads them, on the CPU."""
        if self.codec.config.codes is None:
            return dequantize(quantized, self.channel_steps)
        indices = torch.from_numpy(quantized.values.astype(np.int64))  # (1, h, w)
        with torch.no_grad():
            return self.codec.bottleneck.look_up(indices)[0]

    def compress(self, images: Sequence[tuple[Scaled, Geometry]]) -> list[CompressedImage]:
        """A file for each image; all of one shape."""
        codings = quantize(self.prior, [image for image, _ in images], self.device, self.feedback)
        return [self._file(coding, geometry) for coding, (_, geometry) in zip(codings, images, strict=True)]

    def _file(self, coding: QuantizedPasses, geometry: Geometry) -> CompressedImage:
        quantized, passes = coding
        header = StreamHeader(
            version=self.prior.version,
            stream_id=self.stream_id,
            geometry=geometry,
            prior=self.prior.kind,
            step=quantized.step,
            seed=quantized.seed,
        )
        data = pack(Stream(header, encode(self._coder, passes)))
        return CompressedImage(data, ideal_bits(self.prior, passes), quantized)

    def decompress(self, streams: Sequence[Stream]) -> list[torch.Tensor | UserError]:
        """Latents (z, h, w) float32 of streams whose latents have one shape, or what is wrong with a stream."""
        shapes = [settings(s, self.codec.config, self.codec.factor) for s in streams]
        results = decode(self.prior, self._coder, [s.payload for s in streams], shapes, self.device)
        return [r if isinstance(r, UserError) else self.dequantize(r) for r in results]


def is_maker(codec: Codec, kind: PriorKind, stream_id: bytes) -> bool:
    """Whether a stream of that id, coded under that prior, is the codec's."""
    return codec.priors is not None and codec.priors.stream_id(codec.model_id, kind) == stream_id


@functools.cache  # a folder may hold many files of one other model
def _remedy(kind: PriorKind, stream_id: bytes) -> str:
    return suggest_model(lambda codec: is_maker(codec, kind, stream_id))


class StreamReader:
    """Decompresses streams of one codec whichever of its priors they were coded under."""

    def __init__(self, codec: Codec, device: str) -> None:
        """Raises `UserError` if the codec has no prior."""
        best = StreamCodec(codec, device)
        self.codec = codec
        self._coders: dict[PriorKind, StreamCodec] = {best.prior.kind: best}
        if best.prior.kind != "factorized":
            self._coders["factorized"] = StreamCodec(codec, device, "factorized")

    def check(self, stream: Stream) -> tuple[PriorKind, tuple[int, int, int]]:
        """Under which prior, and the latents' shape: what streams that are decompressed together must share.

        Raises `UserError` if the stream is another model's or its payload is too short for its size.
        """
        kind, found = stream.header.prior, stream.header.stream_id
        if kind not in self._coders:
            raise UserError(f"coded under a {kind} prior, which the model has not; {_remedy(kind, found)}")
        if found != (wanted := self._coders[kind].stream_id):
            raise UserError(
                f"made by another model (stream id {found.hex()}, of this one {wanted.hex()}); {_remedy(kind, found)}"
            )
        if (version := stream.header.version) != (own := self._coders[kind].prior.version):
            raise UserError(f"damaged: it says format version {version}, and this model's streams are of {own}")
        return kind, settings(stream, self.codec.config, self.codec.factor).shape

    def decompress(self, streams: Sequence[Stream]) -> list[torch.Tensor | UserError]:
        """Latents of streams for which `check` gave the same."""
        return self._coders[streams[0].header.prior].decompress(streams)


def dither_seed(seed: int, name: str) -> int:
    """64 bits, of the dither of one image, from those a user gave for all and the image's name."""
    return int(fold(seed, text_key(name))) % 2**64
