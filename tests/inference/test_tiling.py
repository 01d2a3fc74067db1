"""Test tiles: they give the untiled result where the receptive field is finite, elsewhere a measured difference."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.evaluation.evaluate import evaluate
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.images.read import read_image
from latent_codec.inference import tiling
from latent_codec.inference.runner import Runner
from latent_codec.inference.tiling import blended, tile_spans
from latent_codec.latents.dataset import Latents
from latent_codec.metrics import distortion
from latent_codec.model.codec import Codec
from latent_codec.model.config import BernoulliConfig, DiscretizedLogisticConfig, GaussianConfig, LinearConfig
from latent_codec.model.networks import BACKBONES
from tests.conftest import Draw
from tests.support import networks
from tests.support.errors import refused, rejected
from tests.support.folder import CPU, Kind, greatest_difference, make
from tests.support.networks import FIXED, config_of, make_codec, randomise, seeded, shape, support


def lite(stem: int, encoder_depths: tuple[int, ...], decoder_depths: tuple[int, ...]) -> Any:
    depths = {"encoder_depths": encoder_depths, "decoder_depths": decoder_depths}
    widths = {"encoder_widths": (4,) * len(encoder_depths), "decoder_widths": (4,) * len(decoder_depths)}
    patch = stem * 2 ** (len(encoder_depths) - 1)
    return dataclasses.replace(networks.TINY_LITE, patch=patch, stem=stem, **depths, **widths)


CONV = dataclasses.replace(networks.CONV, widths=(8, 8))
FINITE = {
    "linear": LinearConfig(patch=3),
    "overlapping": LinearConfig(patch=3, overlap=2),
    "lite": lite(2, (0, 0), (0, 0)),
    "lite, deeper when fine": lite(2, (1, 0), (1, 0)),
    "lite, deeper when coarse": lite(2, (0, 1), (0, 1)),
    "lite, one resolution": lite(4, (1,), (0,)),
    "lite, three resolutions": lite(2, (0, 0, 0), (1, 0, 0)),
}
DEEPER = [lite(2, d, d) for d in ((2,), (1, 2), (2, 1), (2, 2), (0, 1, 0), (1, 0, 1))] + [lite(4, (1, 2), (2, 3))]


def tiny(backbone: Any, likelihood: Any = FIXED, z: int = 2) -> Codec:
    """Return a codec in which whatever is connected has an effect, log-variances' clamp included."""
    config = config_of(backbone, z=z, likelihood=likelihood)
    clamp = dataclasses.replace(config.bottleneck, logvar_min=-1.0, logvar_max=2.0)
    codec = make_codec(dataclasses.replace(config, bottleneck=clamp))
    randomise(codec.backbone)
    return codec


def photo(codec: Codec, h: int, w: int, batch: int = 1) -> torch.Tensor:
    """Return random bytes for latents (h, w)."""
    values = np.random.default_rng(0).integers(0, 256, (batch, 3, h * codec.factor, w * codec.factor), np.uint8)
    return torch.from_numpy(values)


def noise(codec: Codec, h: int, w: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, codec.config.latent_channels, h, w, generator=seeded(1))


def assert_same_to_rounding(found: Any, expected: Any, columns: Any = slice(None), own: Any = slice(None)) -> None:
    """Compare posteriors, or columns of the first with columns of the second."""
    for name in ("mean", "logvar"):
        one, other = getattr(found, name)[..., columns], getattr(expected, name)[..., own]
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def largest(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().amax())


@pytest.fixture
def cut_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut wherever a side is longer than a tile, however small the image: many joins at little cost."""
    monkeypatch.setattr(tiling, "cuts", lambda pixels, tile: tile is not None)


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
    assert len(found) == (1 if size <= side else math.ceil((size - 2 * margin) / own))


@pytest.mark.parametrize("config", [*FINITE.values(), *DEEPER], ids=str)
def test_a_margin_is_all_that_a_tile_needs_and_no_more(config: Any) -> None:
    backbone = BACKBONES[config.kind](config, shape(z=2)).double()
    randomise(backbone)
    encoder = backbone.encode, backbone.encoder_margin, 3, backbone.factor
    for network, margin, channels, scale in (encoder, (backbone.decode, backbone.decoder_margin, 2, 1)):
        assert margin is not None
        middle = margin + 2  # beyond the margin lie an element of no influence and the border
        side = (2 * middle + 1) * scale
        x = torch.randn(1, channels, side, side, generator=seeded(2), dtype=torch.float64).requires_grad_()
        own = network(x).unflatten(3, (2 * middle + 1, -1))[:, :, :, middle].unflatten(2, (2 * middle + 1, -1))
        part = own[:, :, middle]
        (part * torch.randn(part.shape, generator=seeded(3))).sum().backward()
        assert x.grad is not None
        reach = [i // scale - middle for i in support(x.grad)]
        assert reach == [-margin, margin, -margin, margin]


@pytest.mark.parametrize("kind", FINITE)
@torch.inference_mode()
def test_tiles_give_the_untiled_result_for_every_size(kind: str, cut_always: None) -> None:
    codec = tiny(FINITE[kind]).double()  # so that a wrong border cannot hide in rounding
    f, least = codec.factor, tiling.least_tile(codec)
    assert tiling.is_exact(codec)
    longest = least // f + 4
    sizes = sorted({1, 2, 3, least // f, least // f + 1, longest, 2 * longest + 1})
    assert len(codec.decode_uint8(noise(codec, longest, longest).double()).unique()) > 50  # not all are clipped
    for h, w in zip(sizes, sizes[3:] + sizes[:3], strict=True):
        x, z = codec.likelihood.from_uint8(photo(codec, h, w)).double(), noise(codec, h, w).double()
        posterior, decoded = codec.encode(x), codec.decode_uint8(z)
        for tile in (least, least + f, longest * f):
            tiled = tiling.encode(codec, x, tile)
            for name in ("mean", "logvar"):
                torch.testing.assert_close(getattr(tiled, name), getattr(posterior, name), rtol=1e-6, atol=1e-6)
            assert torch.equal(tiled.clamped, posterior.clamped)
            assert torch.equal(tiling.decode_uint8(codec, z, tile), decoded)


LIKELIHOODS: list[Any] = [DiscretizedLogisticConfig(components=components) for components in (1, 2)]
LIKELIHOODS += [GaussianConfig(scale="per_pixel", sigma=0.1), BernoulliConfig()]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("backbone", [FINITE["lite, deeper when fine"], CONV], ids=["lite", "conv"])
@torch.inference_mode()
def test_finite_tiles_in_float32_differ_by_rounding_alone(backbone: Any, likelihood: Any, cut_always: None) -> None:
    codec = tiny(backbone, likelihood, z=4).to(memory_format=torch.channels_last)
    pixels, z, tile = photo(codec, 9, 14, 2), noise(codec, 9, 14, 2), tiling.least_tile(codec) + codec.factor
    decoded, tiled, pixel_means = codec.decode_uint8(z), tiling.decode_uint8(codec, z, tile), codec.decode(z)
    assert tiled.shape == decoded.shape and tiled.dtype == torch.uint8
    assert torch.equal(tiling.decode(codec, z, None), pixel_means)
    if tiling.is_exact(codec):
        assert largest(tiled, decoded) <= 1
        torch.testing.assert_close(tiling.decode(codec, z, tile), pixel_means, rtol=1e-5, atol=1e-5)
        for given_pixels in (pixels, codec.likelihood.from_uint8(pixels)):
            assert_same_to_rounding(tiling.encode(codec, given_pixels, tile), codec.encode(pixels))


@pytest.mark.parametrize("backbone", [FINITE["lite"], CONV], ids=["lite", "conv"])
@torch.inference_mode()
def test_networks_see_a_tile_at_most_and_small_images_whole(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = tiny(backbone)
    f, tile = codec.factor, 10 * codec.factor
    seen: list[torch.Tensor] = []
    features, params = codec.features, codec.likelihood_params
    monkeypatch.setattr(codec, "features", lambda x, labels: seen.append(x) or features(x, labels))
    monkeypatch.setattr(codec, "likelihood_params", lambda z, labels: seen.append(z) or params(z, labels))
    for h, w in ((10, 10), (5, 20), (100, 1), (11, 10), (3, 40), (21, 33)):
        for work, x, scale in ((tiling.encode, photo(codec, h, w), f), (tiling.decode_uint8, noise(codec, h, w), 1)):
            for limit in (tile, None):
                seen.clear()
                work(codec, x, limit)
                if limit is None or h * w <= 100:
                    assert len(seen) == 1 and torch.equal(seen[0], x)
                else:
                    assert len(seen) > 1 and all(max(t.shape[2:]) <= 10 * scale for t in seen)
                    assert {t.dtype for t in seen} == {x.dtype}  # bytes stay bytes until a tile is taken


def test_sides_that_cannot_be_are_refused_with_the_remedy() -> None:
    codec = tiny(lite(4, (1, 2), (2, 3)))
    assert tiling.least_tile(codec) == 8 * 21
    tiling.check_tile(codec, 168)
    reasons = {tile: f"--tile {tile} is too small for this model, .* give at least 168" for tile in (160, 0, -8)}
    for tile, reason in (reasons | {172: "--tile 172 is no multiple of the model's 8; give 168 or 176"}).items():
        for work, x in ((tiling.encode, photo(codec, 1, 1)), (tiling.decode_uint8, noise(codec, 1, 1))):
            refused(reason, work, codec, x, tile)
    rejected("multiples of 8; pad them", tiling.encode, codec, torch.zeros(1, 3, 801, 800), 168)


@pytest.mark.parametrize("backbone", [LinearConfig(patch=7), CONV, lite(4, (9, 99), (0, 0)), LinearConfig(patch=2000)])
def test_the_default_side_suits_every_model(backbone: Any) -> None:
    with torch.device("meta"):
        codec = Codec(config_of(backbone))
    tile = tiling.default_tile(codec)
    tiling.check_tile(codec, tile)
    assert tile > 1536 - codec.factor


@given(size=st.integers(1, 90), side=st.integers(8, 30), scale=st.integers(1, 3), dim=st.sampled_from([2, 3]))
def test_blending_parts_of_one_tensor_gives_it_back(size: int, side: int, scale: int, dim: int) -> None:
    x = torch.rand(1, 2, size * scale, 3, generator=seeded(size)).movedim(2, dim)
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
    codec = tiny(CONV)
    pixels, z, f = photo(codec, 10, 30), noise(codec, 10, 30), codec.factor
    left, _, right = tile_spans(30, 16, 2)  # of which neighbours share 4
    tiled, decoded = tiling.encode(codec, pixels, 16 * f), tiling.decode_uint8(codec, z, 16 * f)
    for span, kept in ((left, slice(0, left.stop - 4)), (right, slice(right.start + 4, 30))):
        own = slice(kept.start - span.start, kept.stop - span.start)
        assert_same_to_rounding(tiled, codec.encode(pixels[..., span.read(f)]), kept, own)
        expected = codec.decode_uint8(z[..., span.read(1)])[..., own.start * f : own.stop * f]
        assert largest(decoded[..., kept.start * f : kept.stop * f], expected) <= 1
    assert tiled.logvar.amin() >= -1 and tiled.logvar.amax() <= 2  # the clamp's range, also where tiles were blended


@torch.inference_mode()
def test_what_is_measured_is_the_difference_to_the_untiled_result() -> None:
    codec = tiny(CONV)
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
    assert found == (largest(decoded, cut), distortion.psnr(decoded, cut)) and found.largest > 0
    fits = 30 * codec.factor
    assert tiling.encode_difference(codec, pixels, fits)[:2] == (0, 0)
    assert tiling.decode_difference(codec, z, fits) == (0, math.inf)


_CONV = tiny(CONV)


@given(h=st.integers(1, 200), w=st.integers(1, 200), side=st.integers(8, 30))
def test_what_is_measured_on_has_a_join_and_fits_into_one_tile(h: int, w: int, side: int) -> None:
    tile = side * _CONV.factor
    if not tiling.cuts(h * w * _CONV.factor**2, tile):
        return
    rows, columns = tiling.middle_part(_CONV, h, w, tile)
    sizes = rows.stop - rows.start, columns.stop - columns.start
    assert 0 <= rows.start < rows.stop <= h and 0 <= columns.start < columns.stop <= w
    assert math.prod(sizes) <= side**2
    assert max(sizes) > side and (sizes[0] > sizes[1]) == (h > w)
    assert len(tile_spans(max(sizes), side, side // 8)) == 2


SMALL, LARGE = 88, 104
TILES = dataclasses.replace(CPU, tile=SMALL)  # the least of the tiny codec


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i in range(2):
        draw(tmp_path / "photos" / f"large{i}.png", LARGE, 101, seed=i)
        draw(tmp_path / "photos" / f"small{i}.png", SMALL, SMALL - 1, seed=i)
    return tmp_path / "photos"


def test_files_made_in_tiles_are_those_made_whole_and_large_images_go_alone(
    codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def count(method: Callable[..., Any]) -> Any:
        return lambda self, images, *labels: batches.append(len(images)) or method(self, images, *labels)

    for method in (Runner.encode, Runner.decode_uint8):
        monkeypatch.setattr(Runner, method.__name__, count(method))
    sources: dict[Kind, Path] = {"latents": photos, "streams": photos}
    sources |= {"images of latents": tmp_path / "whole/latents", "images of streams": tmp_path / "whole/streams"}
    for name, compute, expected in (("whole", CPU, [2, 2]), ("tiles", TILES, [1, 1, 2])):
        for kind, where in sources.items():
            batches.clear()
            options = {"store": "float32"} if kind == "latents" else {}
            make(kind, codec, where, tmp_path / name / kind, compute, **options)
            assert sorted(batches) == expected
    whole, tiles = (Latents(tmp_path / name / "latents") for name in ("whole", "tiles"))
    reader, steps = StreamReader(codec, "cpu"), torch.as_tensor(StreamCodec(codec, "cpu").channel_steps)
    for i, entry in enumerate(whole.entries):
        assert_same_to_rounding(tiles.posterior(i), whole.posterior(i))
        files = [unpack((tmp_path / name / "streams" / f"{entry.path}.lc").read_bytes()) for name in ("whole", "tiles")]
        reader.check(files[0])
        z, other = (torch.as_tensor(reader.decompress([f])[0]) for f in files)
        moved = (z - other) / steps[:, None, None]
        assert (moved != 0).float().mean() < 0.01 and moved.abs().amax() < 1.01  # a value at a rounding's edge may move
        for kind in list(sources)[2:]:
            paths = [tmp_path / name / kind / f"{entry.path}.png" for name in ("whole", "tiles")]
            assert greatest_difference(*paths) <= 1


@pytest.mark.slow
def test_a_quality_is_kept_to_and_models_are_measured_in_tiles_too(codec: Codec, photos: Path, tmp_path: Path) -> None:
    source = photos / "large0.png"
    assert not make("streams", codec, source, tmp_path / "lc", TILES, psnr=5.0).failures
    make("images of streams", codec, tmp_path / "lc", tmp_path / "out", TILES)
    x, y = (read_image(path).pixels[None] for path in (source, tmp_path / "out" / "large0.png.png"))
    assert distortion.psnr(x, y).item() >= 5.0
    whole, tiles = Runner(codec, CPU), Runner(codec, TILES)
    found = [evaluate(runner, photos, quiet=True) for runner in (whole, tiles)]
    assert [report.about["tile"] for report in found] == [1536, SMALL]
    for name in ("psnr", "kl_bpp"):
        assert found[1].summary[name] == pytest.approx(found[0].summary[name], rel=1e-4)
    assert codec.priors is not None
    codec.priors = codec.priors._replace(context=None)
    options = RateDistortionOptions(steps=(1.0,), anchors=())
    reports = [rate_distortion(r, source, options, quiet=True) for r in (whole, tiles)]
    one, other = ([point.distortion["psnr"] for point in report.points] for report in reports)
    assert other == pytest.approx(one, rel=1e-3)


def test_what_tiles_change_is_said_once_and_only_where_they_do(tmp_path: Path, draw: Draw, capsys: Any) -> None:
    codec, photos = tiny(CONV), tmp_path / "photos"
    for i in range(2):
        draw(photos / f"{i}.png", 60, 41, seed=i)
    compute = dataclasses.replace(CPU, tile=32, batch_size=1)
    make("latents", codec, photos, tmp_path / "latents", compute)
    told = capsys.readouterr().err
    assert all(told.count(what) == 1 for what in ("tiles of 32 pixels", "means differ by up to", "dB PSNR"))
    make("images of latents", codec, tmp_path / "latents", tmp_path / "out", compute)
    assert capsys.readouterr().err.count("decoded pixels differ by up to") == 1
    for name, other, tile in (("whole", codec, None), ("fits", codec, 64), ("exact", tiny(FINITE["lite"]), 32)):
        make("latents", other, photos, tmp_path / name, dataclasses.replace(CPU, tile=tile))
    assert capsys.readouterr().err == ""
