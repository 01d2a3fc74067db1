"""Write the frozen streams of a format version or a shipped model: `python -m tests.bitstream.golden.make NAME`.

It is run once for each: tests/bitstream/test_golden.py holds every later program to the files. Earlier forms of this
script made versions 1 to 3; this one makes version 4.

The folder NAME has `tiny.safetensors`: 4 channels, the closed-form linear path of examples/photos, a random context
prior; NAME.lc: a detail of a photograph; NAME.png: its pixels as decoded then; and golden.json: the SHA-256 of each
one's integers (the nearest whole steps, int32) and latents (float32), little-endian in raster order. That of a shipped
model has some of the streams and no model file.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from latent_codec.bitstream import container
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.images.geometry import Geometry, crop, pad
from latent_codec.images.sources import find_images
from latent_codec.images.write import write_image
from latent_codec.inference.calibration import calibrate
from latent_codec.model.codec import Codec
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import step_code
from tests.support.latents import geometry
from tests.support.networks import TINY_LITE, config_of, make_codec
from tests.support.prior import context_prior
from train.init.closed_form import all_patch_moments, start_from_closed_form

NAME = sys.argv[1]
HERE = Path(__file__).parent / NAME
SOURCES = find_images(Path(__file__).parents[3] / "examples" / "photos")


class Case(NamedTuple):
    prior: PriorKind
    geometry: Geometry
    step: float = 1.0
    seed: int | None = None


CASES = {
    "factorized-mode": Case("factorized", geometry(72, 48)),
    "factorized-dither": Case("factorized", geometry(40, 33), step=0.7, seed=2**64 - 1),
    "context-mode": Case("context", geometry(72, 48)),
    "context-dither": Case("context", geometry(56, 64), step=0.5, seed=0x0123456789ABCDEF),
    "grey": Case("context", geometry(64, 40, mode="L"), step=2.0),
    "one-pixel": Case("context", geometry(1, 1), seed=7),
    "odd-turned": Case("context", geometry(67, 45, orientation=6, background="#204060"), step=1.37),
    "one-column": Case("context", geometry(5, 77), step=0.9),
    "coarsest": Case("context", geometry(48, 48), step=63.0, seed=0),
    "escapes": Case("factorized", geometry(24, 24), step=1 / 64),
    "some-groups": Case("context", geometry(40, 48), step=10.0),
    "fewer-groups": Case("context", geometry(40, 48), step=25.0),
    "no-groups": Case("context", geometry(40, 48), step=63.0),
}


OF_SHIPPED = ("factorized-mode", "context-mode", "context-dither", "grey", "odd-turned")


def tiny_codec() -> Codec:
    """Return a codec that sees real pictures well enough that a wrong latent shows."""
    codec = make_codec(config_of(TINY_LITE, prefixes=(1, 2, 4)))
    start_from_closed_form(codec, all_patch_moments(SOURCES, codec, quiet=True))
    calibrate(codec, SOURCES, "the example photographs", quiet=True)
    assert codec.priors is not None
    context = context_prior((1, 1, 2), 8, seed=1, centred=True, levels=(2, 1), nested=True)
    codec.priors = codec.priors._replace(context=context)
    codec.provenance = {"note": "made by tests/bitstream/golden/make.py"}
    return codec


def make(codec: Codec, name: str, case: Case) -> dict[str, str]:
    """Write the stream and the picture of a case; return their digests."""
    detail = SOURCES[len(name) % 4].read().pixels[:, 100 : 100 + case.geometry.height, 60 : 60 + case.geometry.width]
    if case.geometry.mode == "L":
        detail = detail.float().mean(0, keepdim=True).round().to(torch.uint8).expand(3, -1, -1)
    streams = StreamCodec(codec, "cpu", case.prior)
    mean = codec.encode(pad(detail, codec.factor)[None]).mean[0]
    coded = streams.compress([(streams.scale(mean, step_code(case.step), case.seed), case.geometry)])[0]
    (HERE / f"{name}.lc").write_bytes(coded.data)
    (z,) = streams.decompress([container.unpack(coded.data)])
    assert isinstance(z, torch.Tensor)
    write_image(HERE / f"{name}.png", crop(codec.decode_uint8(z[None])[0], case.geometry), case.geometry, "png")
    return {
        "values": hashlib.sha256(coded.quantized.values.astype("<i4").tobytes()).hexdigest(),
        "latents": hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest(),
    }


@torch.inference_mode()
def main() -> None:
    if list(HERE.glob("*.lc")):
        raise SystemExit(f"the streams of {NAME} are frozen; delete them only if none was ever published")
    HERE.mkdir(exist_ok=True)
    shipped = not NAME.isdecimal()
    if not shipped:
        tiny_codec().save(HERE / "tiny.safetensors", half=True)
    codec = Codec.load(NAME if shipped else HERE / "tiny.safetensors")
    about = {name: make(codec, name, CASES[name]) for name in (OF_SHIPPED if shipped else CASES)}
    (HERE / "golden.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
