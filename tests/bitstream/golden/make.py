"""Make the frozen streams of a version once: `python tests/bitstream/golden/make.py VERSION` in the repository's root.

Never again for that version: tests/bitstream/test_golden.py holds every later version of the program to what lies here.

In the folder VERSION, `tiny.safetensors`: 4 channels, the closed-form linear path of examples/photos, a random context
prior. NAME.lc: a detail of a photograph; NAME.png: its pixels as decoded then; golden.json: SHA-256 of each one's
integers (the nearest whole steps, int32) and latents (float32), little-endian in raster order.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange

from latent_codec.bitstream import container
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.images.geometry import Geometry, crop, pad
from latent_codec.images.read import read_image
from latent_codec.images.write import write_image
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, DiagonalGaussianConfig, GaussianConfig, LiteConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.model.networks import LiteBackbone
from latent_codec.model.networks.linear import PatchMoments
from latent_codec.prior import factorized
from latent_codec.prior.priors import PriorKind, Priors
from latent_codec.prior.quantizer import channel_steps_from_std, step_code

VERSION = int(sys.argv[1])
HERE = Path(__file__).parent / str(VERSION)
ROOT = Path(__file__).parents[3]
PHOTOS = ROOT / "examples" / "photos"
sys.path.insert(0, str(ROOT))

from tests.support.prior import context_prior  # noqa: E402 (its folder has just been named)


class Case(NamedTuple):
    prior: PriorKind
    width: int
    height: int
    step: float = 1.0
    seed: int | None = None
    orientation: int = 1
    grey: bool = False
    background: str | None = None


CASES = {
    "factorized-mode": Case("factorized", 72, 48),
    "factorized-dither": Case("factorized", 40, 33, step=0.7, seed=2**64 - 1),
    "context-mode": Case("context", 72, 48),
    "context-dither": Case("context", 56, 64, step=0.5, seed=0x0123456789ABCDEF),
    "grey": Case("context", 64, 40, step=2.0, grey=True),
    "one-pixel": Case("context", 1, 1, seed=7),
    "odd-turned": Case("context", 67, 45, step=1.37, orientation=6, background="#204060"),
    "one-column": Case("context", 5, 77, step=0.9),
    "coarsest": Case("context", 48, 48, step=63.0, seed=0),
    "escapes": Case("factorized", 24, 24, step=1 / 64),
}


def photograph(index: int) -> torch.Tensor:
    """(3, h, w) uint8."""
    return read_image(sorted(PHOTOS.rglob("*.jpg"))[index]).pixels


def tiny_codec() -> Codec:
    """Sees real pictures well enough that a wrong latent shows."""
    config = CodecConfig(
        image_channels=3,
        latent_channels=4,
        backbone=LiteConfig(
            patch=8,
            stem=4,
            encoder_widths=(8, 8),
            encoder_depths=(1, 1),
            decoder_widths=(8, 8),
            decoder_depths=(1, 1),
        ),
        bottleneck=DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
        likelihood=GaussianConfig(scale="fixed", sigma=0.1),
    )
    torch.manual_seed(0)
    codec = Codec(config).eval()
    details = [photograph(i)[:, 40:296, 20:276] for i in range(4)]
    x = codec.likelihood.from_uint8(torch.stack(details)).double()
    patches = rearrange(x, "b c (h p) (w q) -> (b h w) (c p q)", p=8, q=8)
    mean = x.mean((0, 2, 3))
    centred = patches - mean.repeat_interleave(64)
    assert isinstance(codec.backbone, LiteBackbone)
    codec.backbone.start_from_closed_form(PatchMoments(mean, centred.T @ centred / len(patches)), 0.1)
    posterior = codec.encode(torch.stack(details))
    means = posterior.mean.detach().transpose(0, 1).flatten(1)  # (z, n)
    deviation = posterior.logvar.detach().exp().mean((0, 2, 3)).sqrt()
    std = (means.var(1) + deviation.square()).sqrt()
    codec.statistics = LatentStatistics(
        source="details of four example photographs",
        images=4,
        mean=tuple(means.mean(1).tolist()),
        std=tuple(std.tolist()),
        posterior_std=tuple(deviation.tolist()),
    )
    channel_steps = channel_steps_from_std(std.numpy(), deviation.numpy())
    levels = (2, 1) if VERSION == 3 else ()
    context = context_prior((1, 3), 8, seed=1, centred=VERSION >= 2, levels=levels)
    codec.priors = Priors(channel_steps, factorized.fit(means, channel_steps), context)
    codec.provenance = {"note": "made by tests/golden/make.py"}
    return codec


def make(codec: Codec, name: str, case: Case) -> dict[str, str]:
    """Write the case's stream and its picture; returns what to hold against them."""
    detail = photograph(len(name) % 4)[:, 100 : 100 + case.height, 60 : 60 + case.width]
    if case.grey:
        detail = detail.float().mean(0, keepdim=True).round().to(torch.uint8).expand(3, -1, -1)
    geometry = Geometry(
        width=case.width,
        height=case.height,
        orientation=case.orientation,
        mode="L" if case.grey else "RGB",
        background=case.background,
    )
    streams = StreamCodec(codec, "cpu", case.prior)
    mean = codec.encode(pad(detail, codec.factor)[None]).mean[0]
    coded = streams.compress([(streams.scale(mean, step_code(case.step), case.seed), geometry)])[0]
    (HERE / f"{name}.lc").write_bytes(coded.data)
    (z,) = streams.decompress([container.unpack(coded.data)])
    assert isinstance(z, torch.Tensor)
    write_image(HERE / f"{name}.png", crop(codec.decode_uint8(z[None])[0], geometry), geometry, "png")
    return {
        "values": hashlib.sha256(coded.quantized.values.astype("<i4").tobytes()).hexdigest(),
        "latents": hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest(),
    }


@torch.inference_mode()
def main() -> None:
    if list(HERE.glob("*.lc")):
        raise SystemExit(f"the streams of version {VERSION} are frozen; delete them only if none was ever published")
    HERE.mkdir(exist_ok=True)
    tiny_codec().save(HERE / "tiny.safetensors", half=True)
    codec = Codec.load(HERE / "tiny.safetensors")
    about = {name: make(codec, name, case) for name, case in CASES.items()}
    (HERE / "golden.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
