"""Streams of all versions and shipped models still decode to what they decoded to when golden/make.py wrote them."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_codec.bitstream import container
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.images.geometry import crop
from latent_codec.images.write import to_pil
from latent_codec.model.codec import Codec
from latent_codec.model.shipped import resolve, shipped_names
from latent_codec.prior.quantizer import Quantized
from tests.support import reference_decoder
from tests.support.subject import decompress

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = {
    f"{folder.name}/{name}": expected
    for folder in (path.parent for path in GOLDEN.glob("*/golden.json"))
    for name, expected in json.loads((folder / "golden.json").read_text()).items()
}
NAMES = sorted(EXPECTED)


def sha256(array: np.ndarray, dtype: str) -> str:
    return hashlib.sha256(array.astype(dtype).tobytes()).hexdigest()


@functools.cache
def models_of(folder: Path) -> tuple[Codec, reference_decoder.Model]:
    path = resolve(folder.name) if not folder.name.isdecimal() else folder / "tiny.safetensors"
    return Codec.load(path), reference_decoder.read_model(path)


def test_every_golden_file_is_checked_and_every_shipped_model_has_some() -> None:
    assert {name for name in shipped_names() if "photo" in name} <= {name.partition("/")[0] for name in NAMES}
    assert sorted(str(path.relative_to(GOLDEN).with_suffix("")) for path in GOLDEN.glob("*/*.lc")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_integers_latents_and_pixels_are_what_they_were(name: str) -> None:
    codec, model = models_of((GOLDEN / name).parent)
    data = (GOLDEN / f"{name}.lc").read_bytes()
    stream = container.unpack(data)
    streams = StreamCodec(codec, "cpu", stream.prior)
    (quantized,) = streams.read([stream])
    assert isinstance(quantized, Quantized) and sha256(quantized.values, "<i4") == EXPECTED[name]["values"]
    again = streams.compress([(quantized.scaled(), stream.geometry)])[0]
    assert again.data == data  # nor does the encoder change
    latents = decompress(StreamReader(codec, "cpu"), data)
    assert sha256(latents.numpy(), "<f4") == EXPECTED[name]["latents"]
    pixels = crop(codec.decode_uint8(latents[None])[0], stream.geometry)
    found, expected = to_pil(pixels, stream.geometry), Image.open(GOLDEN / f"{name}.png")
    assert (found.size, found.mode) == (expected.size, expected.mode)
    assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    reference = reference_decoder.decode(data, model)
    assert sha256(reference.values, "<i4") == EXPECTED[name]["values"]
    assert sha256(reference.latents, "<f4") == EXPECTED[name]["latents"]
