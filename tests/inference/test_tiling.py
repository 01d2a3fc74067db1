"""Test that tiles give the untiled result, or a measured difference to it, and that networks see no more at once."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from latent_codec import cli
from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.rate_control import Rate
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import evaluate
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.folders.decode_latents import decode_latents
from latent_codec.folders.decode_lc import decode_lc
from latent_codec.folders.encode_latents import LatentsOptions, encode_latents
from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
from latent_codec.images.read import read_image
from latent_codec.inference import tiling
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.inference.tiling import blended, tile_spans
from latent_codec.latents.dataset import Latents
from latent_codec.metrics import distortion
from latent_codec.model.codec import Codec
from latent_codec.model.config import (
    BernoulliConfig,
    CodecConfig,
    ConvConfig,
    DiagonalGaussianConfig,
    DiscretizedLogisticConfig,
    GaussianConfig,
    LinearConfig,
    LiteConfig,
)
from latent_codec.model.networks import BACKBONES, BackboneShape
from tests.conftest import Draw


def lite(stem: int, encoder_depths: tuple[int, ...], decoder_depths: tuple[int, ...]) -> LiteConfig:
    width = 4
    return LiteConfig(
        patch=stem * 2 ** (len(encoder_depths) - 1),
        stem=stem,
        encoder_widths=(width,) * len(encoder_depths),
        encoder_depths=encoder_depths,
        decoder_widths=(width,) * len(decoder_depths),
        decoder_depths=decoder_depths,
    )


CONV = ConvConfig(
    widths=(8, 8), layers_per_block=1, groups=4, mid_attention=True, quant_conv=True, post_quant_conv=True
)
FINITE = {
    "linear": LinearConfig(patch=3),
    "overlapping": LinearConfig(patch=3, overlap=2),
    "lite": lite(2, (0, 0), (0, 0)),
    "lite, deeper when fine": lite(2, (1, 0), (1, 0)),
    "lite, deeper when coarse": lite(2, (0, 1), (0, 1)),
    "lite, one resolution": lite(4, (1,), (0,)),
    "lite, three resolutions": lite(2, (0, 0, 0), (1, 0, 0)),
}
GAUSSIAN = GaussianConfig(scale="fixed", sigma=0.1)


def randomise(network: nn.Module) -> None:
    """Draw weights that are not near zero, so that whatever is connected has an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.parameters():
            if tensor.ndim > 1:
                scale = 1 / math.sqrt(tensor[0].numel())
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))


def make(backbone: Any, likelihood: Any = GAUSSIAN, z: int = 2) -> Codec:
    codec = Codec(
        CodecConfig(
            image_channels=3,
            latent_channels=z,
            backbone=backbone,
            bottleneck=DiagonalGaussianConfig(logvar_min=-1.0, logvar_max=2.0),
            likelihood=likelihood,
        )
    ).eval()
    randomise(codec.backbone)
    return codec


def photo(codec: Codec, h: int, w: int, batch: int = 1) -> torch.Tensor:
    """Return random bytes for latents (h, w)."""
    values = np.random.default_rng(0).integers(0, 256, (batch, 3, h * codec.factor, w * codec.factor), np.uint8)
    return torch.from_numpy(values)


def noise(codec: Codec, h: int, w: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, codec.config.latent_channels, h, w, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cut_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut images wherever a side is longer than a tile, however few pixels they have: many joins at little cost."""
    monkeypatch.setattr(tiling, "cuts", lambda pixels, tile: tile is not None)


# What is read and what is kept


@given(size=st.integers(1, 300), margin=st.integers(0, 9), own=st.integers(1, 30))
def test_tiles_cover_an_axis_once_with_their_margins_and_are_about_as_large(size: int, margin: int, own: int) -> None:
    side = 2 * margin + own
    found = tile_spans(size, side, margin)
    assert [i for s in found for i in range(s.first, s.last)] == list(range(size))
    for s in found:
        assert s.start == max(s.first - margin, 0) or len(found) == 1
        assert s.stop == min(s.last + margin, size) or len(found) == 1
        assert 0 < s.stop - s.start <= side
    lengths = {s.stop - s.start for s in found}
    assert max(lengths) - min(lengths) <= 1
    needed = 1 if size <= side else math.ceil((size - 2 * margin) / own)
    assert len(found) == needed


DEPTHS = [(1,), (2,), (0, 2), (1, 1), (2, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]


SHAPE = BackboneShape(image_channels=3, latent_channels=2, features_per_latent=2, params_per_channel=1)


@pytest.mark.parametrize("config", [*FINITE.values(), *(lite(2, d, d) for d in DEPTHS)], ids=str)
@torch.inference_mode()
def test_a_margin_is_all_that_a_tile_needs_and_no_more(config: Any) -> None:
    backbone = BACKBONES[config.kind](config, SHAPE)
    randomise(backbone)
    assert backbone.encoder_margin is not None and backbone.decoder_margin is not None
    for network, margin, shape in (
        (backbone.encode, backbone.encoder_margin, (3, backbone.factor)),
        (backbone.decode, backbone.decoder_margin, (2, 1)),
    ):
        reach = list(range(-margin, margin + 1))
        assert felt(network, margin, *shape, lambda x: x) == reach
        assert felt(network, margin, *shape, lambda x: x.mT.contiguous()) == reach


def felt(network: Any, margin: int, channels: int, scale: int, turned: Any) -> list[int]:
    """Return the distances along a row, in latent elements, from which a change reaches the row's middle element."""
    size = 2 * (margin + 2) + 1  # beyond the margin lie an element of no influence and the border
    x = torch.randn(1, channels, 3 * scale, size * scale, generator=torch.Generator().manual_seed(2))
    before, distances = turned(network(turned(x))), []
    own = before.shape[3] // size
    middle = slice((margin + 2) * own, (margin + 3) * own)
    for i in range(size):
        changed = x.clone()
        changed[..., i * scale : (i + 1) * scale] += 1
        if not torch.equal(turned(network(turned(changed)))[..., middle], before[..., middle]):
            distances.append(i - margin - 2)
    return distances


def test_the_default_models_margins_are_those_of_its_depths() -> None:
    config = lite(4, (1, 2), (2, 3))
    backbone = BACKBONES["lite"](config, SHAPE)
    assert (backbone.encoder_margin, backbone.decoder_margin) == (7, 10)
    # 4 + 1 convolutions of 3x3 on the 8-pixel grid and 2 + 1 on the 4-pixel one: 5 + 3 / 2 latents, rounded up.
    conv = BACKBONES["conv"](CONV, SHAPE)
    assert (conv.encoder_margin, conv.decoder_margin) == (None, None)


# Finite receptive fields: the same result


@pytest.mark.parametrize("kind", FINITE)
@torch.inference_mode()
def test_tiles_give_the_untiled_result_for_every_size(kind: str, cut_always: None) -> None:
    codec = make(FINITE[kind]).double()  # so that a wrong border cannot hide in rounding
    f, least = codec.factor, tiling.least_tile(codec)
    assert tiling.is_exact(codec)
    longest = least // f + 4
    sizes = sorted({1, least // f, least // f + 1, 2 * longest + 1})
    assert len(codec.decode_uint8(noise(codec, longest, longest).double()).unique()) > 50  # not all are clipped
    for h, w in itertools.product(sizes, sizes):
        x = codec.likelihood.from_uint8(photo(codec, h, w)).double()
        z = noise(codec, h, w).double()
        posterior, decoded = codec.encode(x), codec.decode_uint8(z)
        for tile in (least, longest * f):
            tiled = tiling.encode(codec, x, tile)
            torch.testing.assert_close(tiled.mean, posterior.mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(tiled.logvar, posterior.logvar, rtol=1e-6, atol=1e-6)
            assert torch.equal(tiled.clamped, posterior.clamped)
            assert torch.equal(tiling.decode_uint8(codec, z, tile), decoded)


@pytest.mark.parametrize("kind", FINITE)
@torch.inference_mode()
def test_a_smaller_margin_would_be_seen(kind: str, cut_always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make(FINITE[kind]).double()
    margin = codec.backbone.encoder_margin
    assert margin is not None
    if margin == 0:
        return
    x = codec.likelihood.from_uint8(photo(codec, 5, 4 * margin + 9)).double()
    whole, tile = codec.encode(x), tiling.least_tile(codec)
    monkeypatch.setattr(codec.backbone, "encoder_margin", margin - 1)
    assert (tiling.encode(codec, x, tile).mean - whole.mean).abs().amax() > 1e-4


@pytest.mark.parametrize(("batch", "layout"), [(1, torch.channels_last), (2, torch.contiguous_format)])
@torch.inference_mode()
def test_in_float32_tiles_differ_by_rounding_alone(batch: int, layout: torch.memory_format, cut_always: None) -> None:
    codec = make(lite(4, (1, 1), (1, 1)), z=4).to(memory_format=layout)
    pixels, z = photo(codec, 14, 25, batch), noise(codec, 14, 25, batch)
    posterior, decoded = codec.encode(pixels), codec.decode_uint8(z)
    for extra in (0, 32):
        tile = tiling.least_tile(codec) + extra
        for given_pixels in (pixels, codec.likelihood.from_uint8(pixels)):
            tiled = tiling.encode(codec, given_pixels, tile)
            torch.testing.assert_close(tiled.mean, posterior.mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(tiled.logvar, posterior.logvar, rtol=1e-5, atol=1e-5)
        assert (tiling.decode_uint8(codec, z, tile).int() - decoded.int()).abs().amax() <= 1


@pytest.mark.parametrize(
    "likelihood",
    [
        GaussianConfig(scale="per_pixel", sigma=0.1),
        DiscretizedLogisticConfig(components=1),
        DiscretizedLogisticConfig(components=2),
        BernoulliConfig(),
    ],
    ids=lambda c: f"{c.kind} {dataclasses.asdict(c)}",
)
@torch.inference_mode()
def test_every_likelihood_decodes_in_tiles(likelihood: Any, cut_always: None) -> None:
    for backbone in (FINITE["lite"], CONV):
        codec = make(backbone, likelihood)
        z = noise(codec, 9, 14, 2)
        whole, tiled = codec.decode_uint8(z), tiling.decode_uint8(codec, z, tiling.least_tile(codec))
        assert tiled.shape == whole.shape and tiled.dtype == torch.uint8
        if tiling.is_exact(codec):
            assert (tiled.int() - whole.int()).abs().amax() <= 1
            expected, pixels = codec.decode(z), tiling.decode(codec, z, tiling.least_tile(codec))
            assert pixels.dtype == torch.float32
            torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(tiling.decode(codec, z, None), expected)


# What goes through a network at once


@pytest.mark.parametrize("backbone", [FINITE["lite"], CONV], ids=["lite", "conv"])
@torch.inference_mode()
def test_networks_never_see_more_than_a_tile_and_small_images_go_whole(
    backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make(backbone)
    f, tile = codec.factor, 10 * codec.factor
    seen: list[torch.Tensor] = []
    features, params = codec.features, codec.likelihood_params
    monkeypatch.setattr(codec, "features", lambda x, labels: seen.append(x) or features(x, labels))
    monkeypatch.setattr(codec, "likelihood_params", lambda z, labels: seen.append(z) or params(z, labels))
    for h, w in ((10, 10), (100, 1), (11, 10), (3, 40), (21, 33)):
        for work, x, scale in (
            (tiling.encode, photo(codec, h, w), f),
            (tiling.decode_uint8, noise(codec, h, w), 1),
        ):
            seen.clear()
            work(codec, x, tile)
            assert all(max(t.shape[2:]) <= 10 * scale for t in seen) or len(seen) == 1
            assert {t.dtype for t in seen} == {x.dtype}  # bytes stay bytes until a tile is taken
            assert (len(seen) > 1) == (h * w > 100)
            seen.clear()
            work(codec, x, None)
            assert [t.shape for t in seen] == [x.shape]


@torch.inference_mode()
def test_an_image_no_larger_than_a_tile_is_what_it_is_without() -> None:
    for backbone in (*FINITE.values(), CONV):
        codec = make(backbone)
        tile = 2 * tiling.least_tile(codec)
        side = tile // codec.factor
        for h, w in ((side, side), (1, side * side), (2 * side, side // 2)):
            pixels, z = photo(codec, h, w, 2), noise(codec, h, w, 2)
            assert torch.equal(tiling.encode(codec, pixels, tile).mean, codec.encode(pixels).mean)
            assert torch.equal(tiling.decode_uint8(codec, z, tile), codec.decode_uint8(z))


def test_sides_that_cannot_be_are_refused_with_the_remedy() -> None:
    codec = make(lite(4, (1, 2), (2, 3)))
    assert tiling.least_tile(codec) == 8 * 21
    tiling.check_tile(codec, 168)
    for tile, reason in (
        (160, "--tile 160 is too small for this model, .* give at least 168"),
        (0, "--tile 0 is too small"),
        (-8, "--tile -8 is too small"),
        (172, "--tile 172 is no multiple of the model's 8; give 168 or 176"),
    ):
        for work, x in ((tiling.encode, photo(codec, 1, 1)), (tiling.decode_uint8, noise(codec, 1, 1))):
            with pytest.raises(UserError, match=reason):
                work(codec, x, tile)
    with pytest.raises(ValueError, match="multiples of 8; pad them"):
        tiling.encode(codec, torch.zeros(1, 3, 801, 800), 168)


@pytest.mark.parametrize("backbone", [LinearConfig(patch=7), CONV, lite(4, (9, 99), (0, 0)), LinearConfig(patch=2000)])
def test_the_default_side_suits_every_model(backbone: Any) -> None:
    with torch.device("meta"):
        codec = Codec(dataclasses.replace(make(FINITE["linear"]).config, backbone=backbone))
    tile = tiling.default_tile(codec)
    tiling.check_tile(codec, tile)
    assert tile > 1536 - codec.factor


# Infinite receptive fields: blended, and measured


@given(size=st.integers(1, 90), side=st.integers(8, 30), scale=st.integers(1, 3), dim=st.sampled_from([2, 3]))
def test_blending_parts_of_one_tensor_gives_it_back(size: int, side: int, scale: int, dim: int) -> None:
    x = torch.rand(1, 2, size * scale, 3, generator=torch.Generator().manual_seed(size)).movedim(2, dim)
    margin = side // 8
    parts = (x.narrow(dim, s.start * scale, (s.stop - s.start) * scale) for s in tile_spans(size, side, margin))
    torch.testing.assert_close(torch.cat(list(blended(parts, 2 * margin * scale, dim)), dim), x)


def test_parts_that_disagree_go_over_into_each_other_along_a_line() -> None:
    parts = (torch.full((1, 1, 1, 12), value) for value in (0.0, 1.0, -1.0))
    line = torch.cat(list(blended(parts, 4, 3)), 3).flatten().tolist()
    up, down = [0.125, 0.375, 0.625, 0.875], [0.75, 0.25, -0.25, -0.75]
    assert line == [0.0] * 8 + up + [1.0] * 4 + down + [-1.0] * 8


@torch.inference_mode()
def test_blended_latents_and_pixels_are_each_tiles_own_away_from_joins() -> None:
    codec = make(CONV)
    pixels, z = photo(codec, 10, 30), noise(codec, 10, 30)
    tile = 16 * codec.factor
    left, _, right = tile_spans(30, 16, 2)  # of which neighbours share 4
    tiled, decoded = tiling.encode(codec, pixels, tile), tiling.decode_uint8(codec, z, tile)
    f = codec.factor
    for span, kept in ((left, slice(0, left.stop - 4)), (right, slice(right.start + 4, 30))):
        own = slice(kept.start - span.start, kept.stop - span.start)
        alone = codec.encode(pixels[..., span.read(f)])
        torch.testing.assert_close(tiled.mean[..., kept], alone.mean[..., own], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tiled.logvar[..., kept], alone.logvar[..., own], rtol=1e-5, atol=1e-5)
        expected = codec.decode_uint8(z[..., span.read(1)])[..., own.start * f : own.stop * f]
        assert (decoded[..., kept.start * f : kept.stop * f].int() - expected.int()).abs().amax() <= 1
    assert tiled.logvar.amin() >= -1 and tiled.logvar.amax() <= 2  # the clamp's range, also where tiles were blended


@torch.inference_mode()
def test_what_is_measured_is_the_difference_to_the_untiled_result() -> None:
    codec = make(CONV)
    pixels, z, tile = photo(codec, 11, 30), noise(codec, 11, 30), 16 * codec.factor
    whole, tiled = codec.encode(pixels), tiling.encode(codec, pixels, tile)
    error = tiling.encode_difference(codec, pixels, tile)
    apart = ((tiled.mean - whole.mean) / whole.std).double()
    assert error.largest == pytest.approx(apart.abs().amax().item()) and error.largest > 0.01
    assert error.rms == pytest.approx(apart.square().mean().sqrt().item(), rel=1e-4) and error.rms < error.largest
    assert error.psnr_whole == distortion.psnr(codec.decode_uint8(whole.mean), pixels).item()
    assert error.psnr_tiled == distortion.psnr(tiling.decode_uint8(codec, tiled.mean, tile), pixels).item()
    decoded, cut = codec.decode_uint8(z), tiling.decode_uint8(codec, z, tile)
    found = tiling.decode_difference(codec, z, tile)
    assert found == ((decoded.int() - cut.int()).abs().amax(), distortion.psnr(decoded, cut))
    assert found.largest > 0
    fits = 30 * codec.factor
    assert tiling.encode_difference(codec, pixels, fits)[:2] == (0, 0)
    assert tiling.decode_difference(codec, z, fits) == (0, math.inf)


@given(h=st.integers(1, 200), w=st.integers(1, 200), side=st.integers(8, 30))
def test_what_is_measured_on_has_a_join_and_fits_into_one_tile(h: int, w: int, side: int) -> None:
    codec = _CONV
    tile = side * codec.factor
    if not tiling.cuts(h * w * codec.factor**2, tile):
        return
    rows, columns = tiling.middle_part(codec, h, w, tile)
    sizes = rows.stop - rows.start, columns.stop - columns.start
    assert 0 <= rows.start < rows.stop <= h and 0 <= columns.start < columns.stop <= w
    assert math.prod(sizes) <= side**2
    assert max(sizes) > side and (sizes[0] > sizes[1]) == (h > w)
    assert len(tile_spans(max(sizes), side, side // 8)) == 2


_CONV = make(CONV)


# Files


SMALL, LARGE = 88, 200
CPU = ComputeOptions(batch_size=4, workers=2)
TILES = dataclasses.replace(CPU, tile=SMALL)  # the least of the tiny codec


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i in range(2):
        draw(tmp_path / "photos" / f"large{i}.png", LARGE, 101, seed=i)
        draw(tmp_path / "photos" / f"small{i}.png", SMALL, SMALL - 1, seed=i)
    return tmp_path / "photos"


def test_large_images_go_alone_and_others_in_batches(
    codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    work = {name: getattr(tiling, name) for name in ("encode", "decode_uint8")}
    for name, function in work.items():
        monkeypatch.setattr(tiling, name, lambda c, x, *rest, f=function: batches.append(len(x)) or f(c, x, *rest))
    encode_latents(Runner(codec, TILES), photos, tmp_path / "latents", quiet=True)
    assert sorted(batches) == [1, 1, 2]
    batches.clear()
    decode_latents(Runner(codec, TILES), tmp_path / "latents", tmp_path / "decoded", quiet=True)
    assert sorted(batches) == [1, 1, 2]
    batches.clear()
    encode_latents(Runner(codec, CPU), photos, tmp_path / "whole", quiet=True)
    assert sorted(batches) == [2, 2]


def test_files_made_in_tiles_are_those_made_whole(codec: Codec, photos: Path, tmp_path: Path, capsys: Any) -> None:
    for name, compute in (("whole", CPU), ("tiles", TILES)):
        out, runner = tmp_path / name, Runner(codec, compute)
        encode_latents(runner, photos, out / "latents", LatentsOptions(store="float32"), quiet=True)
        encode_lc(runner, photos, out / "lc", quiet=True)
        decode_latents(runner, tmp_path / "whole" / "latents", out / "a", quiet=True)
        decode_lc(runner, tmp_path / "whole" / "lc", out / "b", quiet=True)
    whole, tiles = (Latents(tmp_path / name / "latents") for name in ("whole", "tiles"))
    reader, steps = StreamReader(codec, "cpu"), torch.as_tensor(StreamCodec(codec, "cpu").channel_steps)
    for i, entry in enumerate(whole.entries):
        torch.testing.assert_close(tiles.posterior(i).mean, whole.posterior(i).mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tiles.posterior(i).logvar, whole.posterior(i).logvar, rtol=1e-5, atol=1e-5)
        files = [unpack((tmp_path / name / "lc" / f"{entry.path}.lc").read_bytes()) for name in ("whole", "tiles")]
        reader.check(files[0])
        z, other = (torch.as_tensor(reader.decompress([f])[0]) for f in files)
        moved = (z - other) / steps[:, None, None]
        assert (moved != 0).float().mean() < 0.01 and moved.abs().amax() < 1.01  # a value at a rounding's edge may move
        for folder in ("a", "b"):
            x, y = (read(tmp_path / name / folder / f"{entry.path}.png") for name in ("whole", "tiles"))
            assert (x - y).abs().amax() <= 1
    assert "differ" not in capsys.readouterr().err


def read(path: Path) -> torch.Tensor:
    return read_image(path).pixels.int()


def test_a_quality_is_kept_to_in_tiles(codec: Codec, photos: Path, tmp_path: Path) -> None:
    source, runner = photos / "large0.png", Runner(codec, TILES)
    assert not encode_lc(runner, source, tmp_path / "lc", EncodeOptions(rate=Rate(psnr=5.0)), quiet=True).failures
    decode_lc(runner, tmp_path / "lc", tmp_path / "out", quiet=True)
    x, y = read(source), read(tmp_path / "out" / "large0.png.png")
    assert distortion.psnr(x[None].byte(), y[None].byte()).item() >= 5.0


def test_measuring_a_model_goes_in_tiles_too(codec: Codec, photos: Path) -> None:
    assert codec.priors is not None
    codec.priors = codec.priors._replace(context=None)
    runners = Runner(codec, CPU), Runner(codec, TILES)
    whole, tiles = (evaluate(runner, photos, out=None, lpips=None, quiet=True) for runner in runners)
    assert tiles.about["tile"] == SMALL and whole.about["tile"] == 1536
    for name in ("psnr", "kl_bpp"):
        assert tiles.summary[name] == pytest.approx(whole.summary[name], rel=1e-4)
    options = RateDistortionOptions(steps=[1.0], anchors=())
    reports = [rate_distortion(runner, photos / "large0.png", options, quiet=True) for runner in runners]
    whole, tiles = ([point.distortion["psnr"] for point in report.points] for report in reports)
    assert tiles == pytest.approx(whole, rel=1e-3)


def test_what_tiles_change_is_said_once_and_only_where_they_do(tmp_path: Path, draw: Draw, capsys: Any) -> None:
    codec = make(CONV)
    for i in range(2):
        draw(tmp_path / "photos" / f"{i}.png", 60, 41, seed=i)
    compute = dataclasses.replace(CPU, tile=32, batch_size=1)
    encode_latents(Runner(codec, compute), tmp_path / "photos", tmp_path / "latents", quiet=True)
    told = capsys.readouterr().err
    assert told.count("tiles of 32 pixels change this model's results;") == 1
    assert told.count("means differ by up to") == 1
    assert told.count("dB PSNR") == 1
    decode_latents(Runner(codec, compute), tmp_path / "latents", tmp_path / "out", quiet=True)
    assert capsys.readouterr().err.count("decoded pixels differ by up to") == 1
    for tile in (None, 64):
        runner = Runner(codec, dataclasses.replace(CPU, tile=tile))
        encode_latents(runner, tmp_path / "photos", tmp_path / f"{tile}", quiet=True)
    assert capsys.readouterr().err == ""


def test_the_command_line_takes_a_side_or_the_models_own(
    photos: Path, model_file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int | None] = []
    forward = tiling.encode
    monkeypatch.setattr(tiling, "encode", lambda c, x, tile, labels: sides.append(tile) or forward(c, x, tile, labels))
    source = str(photos / "small0.png")
    for i, options in enumerate(([], ["--tile", "96"])):
        with pytest.raises(SystemExit) as caught:
            cli.main(["encode", source, str(tmp_path / f"{i}"), "--model", str(model_file), *options])
        assert caught.value.code == 0
    assert sides == [1536, 96]
    with pytest.raises(SystemExit) as caught:
        cli.main(["encode", source, str(tmp_path / "out"), "--model", str(model_file), "--tile", "90"])
    assert caught.value.code == 2 and "give 88 or 96" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
