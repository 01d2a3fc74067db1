"""A stream comes back exactly or not at all: flipped bits, cuts, extra bytes and false sizes are refused."""

import functools
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_codec.bitstream.container import OVERHEAD, Stream, pack, unpack
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry
from latent_codec.model.codec import Codec
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import DEAD_ZONE, LIMIT, Scaled
from tests.support import reference_decoder
from tests.support.errors import refused
from tests.support.latents import geometry
from tests.support.subject import decompress
from tools.stress.mutants import mutate, sealed

GOLDEN = Path(__file__).parent / "golden" / "2"
MODEL = GOLDEN / "tiny.safetensors"
PRIORS: list[PriorKind] = ["factorized", "context"]


@functools.cache
def reader() -> StreamReader:
    return StreamReader(Codec.load(MODEL), "cpu")


def streams(prior: PriorKind) -> StreamCodec:
    return reader().coders[prior]


@functools.cache
def independent() -> reference_decoder.Model:
    return reference_decoder.read_model(MODEL)


def image(width: int, height: int, step: int = 1024, seed: int | None = None, data: int = 0) -> Scaled:
    """Return latents of the tiny model, 4 channels at 1/8, for an image of a size."""
    shape = (4, -(-height // 8), -(-width // 8))
    values = np.random.default_rng(data).laplace(size=shape) * np.array([9, 4, 3, 2])[:, None, None]
    return Scaled(values.clip(-LIMIT, LIMIT), step, seed)


@functools.cache
def example(prior: PriorKind = "factorized") -> bytes:
    """Return a stream of about 2 KB."""
    size = (240, 232) if prior == "factorized" else (168, 160)
    return streams(prior).compress([(image(*size, seed=5), geometry(*size))])[0].data


def read(data: bytes, max_pixels: int = 2**27) -> torch.Tensor:
    return decompress(reader(), data, max_pixels)


def assert_refused(data: bytes, message: str | None = None) -> None:
    refused(message, unpack, data)


sides, steps, seeds = st.integers(1, 2**13), st.integers(16, 65535), st.none() | st.integers(0, 2**64 - 1)
background = st.none() | st.binary(min_size=3, max_size=3).map(lambda b: "#" + b.hex())
shown = {"orientation": st.integers(1, 8), "mode": st.sampled_from(["L", "RGB"]), "background": background}
named = {"version": st.sampled_from([1, 2, 3]), "stream_id": st.binary(min_size=8, max_size=8)}
coded = {"prior": st.sampled_from(PRIORS), "step": steps, "seed": seeds, "payload": st.binary(max_size=50)}
containers = st.builds(Stream, geometry=st.builds(Geometry, width=sides, height=sides, **shown), **named, **coded)


@pytest.mark.slow
@given(containers)
def test_a_container_gives_back_what_it_holds(stream: Stream) -> None:
    data, g = pack(stream), stream.geometry
    assert len(data) == OVERHEAD + len(stream.payload) == 51 + len(stream.payload) and unpack(data) == stream
    found, payload = reference_decoder.read_stream(data)
    for name in ("version", "stream_id", "step", "seed"):
        assert getattr(found, name) == getattr(stream, name)
    assert (found.width, found.height, found.orientation, payload) == (g.width, g.height, g.orientation, stream.payload)
    assert (bool(found.flags & 1), bool(found.flags & 8)) == (g.mode == "L", stream.prior == "context")
    assert g.background == ("#" + found.background.hex() if found.flags & 2 else None)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from(PRIORS), st.tuples(*[st.integers(1, 40)] * 2), steps, seeds, st.integers(0, 99))
def test_latents_come_back_to_the_bit(
    prior: PriorKind, size: tuple[int, int], step: int, seed: int | None, data: int
) -> None:
    latents = image(*size, step, seed, data)
    (coded,) = streams(prior).compress([(latents, geometry(*size))])
    quantized = coded.quantized
    assert np.abs(quantized.fine / 2**17 - latents.latents).max() <= 0.5 + DEAD_ZONE * (seed is None)
    assert streams(prior).compress([(quantized.scaled(), geometry(*size))])[0].data == coded.data
    assert coded.ideal_bits <= 8 * (len(coded.data) - OVERHEAD) <= 1.001 * coded.ideal_bits + 65
    assert torch.equal(read(coded.data), streams(prior).dequantize(quantized))
    again = reference_decoder.decode(coded.data, independent())
    np.testing.assert_array_equal(again.values, quantized.values)
    np.testing.assert_array_equal(again.latents, streams(prior).dequantize(quantized).numpy())


def test_flipped_bits_cuts_added_bytes_and_text_mode_are_refused() -> None:
    sound, data = example(), bytearray(example())
    assert len(data) > 1500
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert_refused(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
    for length in range(len(sound)):
        assert_refused(sound[:length], r"not a \.lc stream|damaged")
    for length in range(1, 65):
        for extra in (bytes(64), b"\xff" * 64, bytes(range(64)), b"\x89LC\r\n\x1a\n" * 8):
            assert_refused(sound + extra[:length], "promises")
        assert_refused(bytes(length) + sound)
    for old, new in ((b"\r\n", b"\n"), (b"\n", b"\r\n"), (b"\r\n", b"\r")):
        assert_refused(sound.replace(old, new))
    assert_refused(sound.decode("latin-1").encode("utf-8"), r"not a \.lc stream")


LAYOUT = struct.Struct("<7sB8sIIBB3sHQI")
NAMES = ("magic", "version", "stream_id", "width", "height", "orientation", "flags", "background", "step", "seed")


def crafted(data: bytes, **fields: Any) -> bytes:
    """Return a stream with some fields of its header replaced and its checksums right."""
    values = dict(zip(NAMES, LAYOUT.unpack(data[:43])[:-1], strict=True)) | fields
    return sealed(LAYOUT.pack(*values.values(), 0), data[47:-4])


def test_checks_come_in_the_documented_order() -> None:
    """Repair a file in which everything is wrong, bit by bit: each time the next check speaks."""
    sound = streams("context").compress([(image(64, 64), geometry(64, 64))])[0].data
    assert sound == crafted(sound)
    short = sound[:47] + b"abc\0" + sound[-4:]  # a payload of 4 bytes that are no sound end of one
    fields: dict[str, Any] = {"version": 5, "width": 2**20, "flags": 8 + 16, "orientation": 9, "stream_id": bytes(8)}
    broken, extra = 1, b"x"  # a bit of the payload's checksum, and a byte too many

    def file(**repaired: Any) -> bytes:
        fields.update(repaired)
        data = crafted(short, **fields)
        return data[:-1] + bytes([data[-1] ^ broken]) + extra

    def assert_says(message: str, reason: str, data: bytes) -> None:
        refused(message, read, data, max_pixels=2**23)
        with pytest.raises(reference_decoder.RefusalError, match=f"^{reason}$"):
            reference_decoder.decode(data, independent(), max_pixels=2**23)

    assert_says("does not start like one", "magic", b"?" + file()[1:40])
    assert_says("cut off within its header", "cut header", file()[:40])
    assert_says("does not match its checksum", "header checksum", file()[:43] + bytes(4) + file()[47:])
    assert_says("format version 5", "version", file())
    assert_says("exceed the limit", "pixels", file(version=1))
    assert_says("promises", "length", file(width=2**17))
    extra = b""
    assert_says("do not match their checksum", "payload checksum", file())
    broken = 0
    assert_says("values that no encoder writes", "values", file())
    assert_says("orientation 9", "geometry", file(flags=8))
    assert_says("made by another model", "stream id", file(orientation=1))
    assert_says("says format version 1", "another version", file(stream_id=streams("context").stream_id))
    assert_says("cannot hold", "too short", file(version=2))
    assert_says("do not end as they should", "words", file(width=1))


UNWRITTEN = {"step": (0, 15), "orientation": (0, 9, 255), "version": (0, 5, 255)}


@pytest.mark.parametrize(
    "fields",
    [
        *({"flags": n} for n in (0, 20, 36, 68, 132)),  # a seed without its flag, and flags without a meaning
        *({"background": b"\0\0\1"}, {"width": 0}, {"height": 0}, {"width": 0, "height": 0}),
        *({name: n} for name, numbers in UNWRITTEN.items() for n in numbers),
    ],
)
def test_headers_that_no_encoder_writes_are_refused(fields: dict[str, Any]) -> None:
    data = crafted(example(), **fields)
    assert_refused(data)
    with pytest.raises(reference_decoder.RefusalError):
        reference_decoder.read_stream(data)


def test_false_sizes_are_refused_before_anything_is_allocated() -> None:
    """2^27 pixels, the most that a reader takes, need a payload of 1.5 KB with this model."""
    (small,) = streams("context").compress([(image(64, 64), geometry(64, 64))])
    header = example()[:39] + (2**32 - 1).to_bytes(4, "little")
    promise = header + zlib.crc32(header).to_bytes(4, "little") + example()[47:]
    sizes = dict.fromkeys(((2**32 - 1, 2**32 - 1), (2**27 + 1, 1), (1, 2**27 + 1)), "exceed the limit")
    sizes |= dict.fromkeys(((11585, 11585), (2**27, 1), (1, 2**27)), "cannot hold")
    cases = [(message, crafted(small.data, width=w, height=h)) for (w, h), message in sizes.items()]
    cases.append(("promises 4294967295 bytes", promise))
    reader()
    tracemalloc.start()
    try:
        for message, data in cases:
            refused(message, read, data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match="134217728x1, padded to 134217728x8 = 1073741824 pixels"):
        read(crafted(small.data[:47] + bytes(2**20) + small.data[-4:], width=2**27, height=1))
    refused("raise --max-pixels", unpack, example(), max_pixels=240 * 232 - 1)
    assert unpack(example(), max_pixels=240 * 232)


@pytest.mark.slow
def test_both_decoders_agree_on_mutants() -> None:
    originals = [path.read_bytes() for path in sorted(GOLDEN.glob("*.lc"))]
    decoded = 0
    for number in range(300):
        data = mutate(originals, 1, number).data
        try:
            expected = reference_decoder.decode(data, independent()).latents
        except reference_decoder.RefusalError:
            with pytest.raises(UserError):
                read(data)
        else:
            np.testing.assert_array_equal(read(data).numpy(), expected)
            decoded += 1
    assert decoded > 10
