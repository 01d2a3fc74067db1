"""Streams of version 1 decode for ever to what they decoded to when golden/make.py wrote them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import witness
from PIL import Image

from latent_codec import bitstream
from latent_codec.codec import Codec
from latent_codec.images import crop, to_pil
from latent_codec.prior.coder import Coder
from latent_codec.prior.coding import decode
from latent_codec.quantizer import Quantized
from latent_codec.streams import StreamCodec, StreamReader

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "golden.json").read_text())
NAMES = sorted(EXPECTED)


def sha256(array: np.ndarray, dtype: str) -> str:
    return hashlib.sha256(array.astype(dtype).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(GOLDEN / "tiny.safetensors")


@pytest.fixture(scope="module")
def model() -> witness.Model:
    return witness.read_model(GOLDEN / "tiny.safetensors")


def test_every_golden_file_is_checked() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.lc")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_integers_latents_and_pixels_are_what_they_were(name: str, codec: Codec) -> None:
    data = (GOLDEN / f"{name}.lc").read_bytes()
    stream = bitstream.unpack(data)
    streams = StreamCodec(codec, "cpu", stream.header.prior)
    settings = bitstream.settings(stream, codec.config, codec.factor)
    (quantized,) = decode(streams.prior, Coder(streams.prior.tables), [stream.payload], [settings], "cpu")
    assert isinstance(quantized, Quantized)
    assert sha256(quantized.values, "<i4") == EXPECTED[name]["values"]
    assert streams.compress([(quantized, stream.header.geometry)])[0].data == data  # nor does the encoder change
    reader = StreamReader(codec, "cpu")
    reader.check(stream)
    (latents,) = reader.decompress([stream])
    assert isinstance(latents, torch.Tensor)
    assert sha256(latents.numpy(), "<f4") == EXPECTED[name]["latents"]
    pixels = crop(codec.decode_uint8(latents[None])[0], stream.header.geometry)
    found, expected = to_pil(pixels, stream.header.geometry), Image.open(GOLDEN / f"{name}.png")
    assert (found.size, found.mode) == (expected.size, expected.mode)
    assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_second_decoder_finds_the_same(name: str, model: witness.Model) -> None:
    found = witness.decode((GOLDEN / f"{name}.lc").read_bytes(), model)
    assert sha256(found.values, "<i4") == EXPECTED[name]["values"]
    assert sha256(found.latents, "<f4") == EXPECTED[name]["latents"]


def test_the_headers_are_what_they_were(codec: Codec) -> None:
    turned = bitstream.unpack((GOLDEN / "odd-turned.lc").read_bytes()).header
    geometry = turned.geometry
    assert (geometry.width, geometry.height, geometry.orientation) == (67, 45, 6)
    assert (geometry.mode, geometry.background, turned.prior) == ("RGB", "#204060", "context")
    assert (turned.step, turned.seed) == (round(1.37 * 1024), None)
    assert bitstream.unpack((GOLDEN / "grey.lc").read_bytes()).header.geometry.mode == "L"
    assert bitstream.unpack((GOLDEN / "context-dither.lc").read_bytes()).header.seed == 0x0123456789ABCDEF
    assert bitstream.unpack((GOLDEN / "factorized-dither.lc").read_bytes()).header.seed == 2**64 - 1
