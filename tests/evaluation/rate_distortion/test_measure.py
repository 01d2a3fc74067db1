"""Test that every row of the rate-distortion report is a real file's, decoded from its bytes."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion import anchors
from latent_codec.evaluation.rate_distortion.anchors import ANCHORS, Anchor
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.evaluation.rate_distortion.report import RateDistortionReport, RatePoint
from latent_codec.images.read import read_image
from latent_codec.inference.runner import Runner
from latent_codec.metrics import bjontegaard, distortion
from latent_codec.model.codec import Codec
from tests.evaluation.conftest import compressed, decoded, encoded
from tests.support.errors import refused
from tests.support.subject import decompress

SIZES = {"a.png": (24, 16), "b/c.png": (17, 33), "grey.png": (9, 7), "large.png": (165, 170)}
ALONE = RateDistortionOptions(steps=(0.7, 2.0), anchors=(), command="it")
BESIDE = dataclasses.replace(ALONE, anchors=tuple(a._replace(qualities=a.qualities[::3]) for a in ANCHORS))


@pytest.fixture
def plain(codec: Codec) -> Codec:
    """Return a codec without a context prior."""
    assert codec.priors is not None
    codec.priors = codec.priors._replace(context=None)
    return codec


def measure(codec: Codec, where: Path, options: RateDistortionOptions = ALONE, out: Any = None) -> RateDistortionReport:
    return rate_distortion(Runner(codec), where, options, out=out, quiet=True)


def rows(report: RateDistortionReport, codec: str, *, dithered: bool = False) -> dict[tuple[str, float], RatePoint]:
    return {
        (image.path, row.setting.value): row
        for image in report.images
        for row in image.rows
        if row.setting.codec == codec and row.setting.dithered == dithered
    }


def differ(one: dict[tuple[str, float], RatePoint], other: dict[tuple[str, float], RatePoint]) -> bool:
    """Return whether all files decode to other pixels."""
    assert one.keys() == other.keys()
    return all(one[key].distortion["psnr"] != other[key].distortion["psnr"] for key in one)


@pytest.mark.slow
def test_rows_are_real_files_decoded_from_their_bytes_and_points_are_means(codec: Codec, photos: Path) -> None:
    report = measure(codec, photos)
    reader = StreamReader(codec, "cpu")
    for kind in ("context", "factorized"):
        found = rows(report, kind)
        assert found.keys() == {(name, step) for name in SIZES for step in ALONE.steps}
        for (name, step), row in found.items():
            image, area = read_image(photos / name), math.prod(SIZES[name])
            file = compressed(codec, image, step, kind)
            back = decoded(codec, decompress(reader, file.data)[None], image.pixels)
            if name == "grey.png":
                back = ((back.int().sum(0, keepdim=True) + 1) // 3).to(torch.uint8).expand(3, -1, -1)
            assert (row.bytes, row.bpp) == (len(file.data), 8 * len(file.data) / area)
            assert row.ideal_bpp == pytest.approx(file.ideal_bits / area)
            assert row.distortion["psnr"] == distortion.psnr(image.pixels[None], back[None]).item()
    for image in report.images:
        kl = encoded(codec, read_image(photos / image.path).pixels).kl().item()
        assert image.kl_bpp == pytest.approx(kl / math.log(2) / math.prod(SIZES[image.path]))
    assert report.kl_bpp == pytest.approx(np.mean([image.kl_bpp for image in report.images]))
    for i, point in enumerate(report.points):
        column = [image.rows[i] for image in report.images]
        assert {each.setting for each in column} == {point.setting}
        assert point.bpp == pytest.approx(np.mean([each.bpp for each in column]))
        assert point.distortion["psnr"] == pytest.approx(np.mean([each.distortion["psnr"] for each in column]))
        assert point.distortion["ms_ssim"] == column[-1].distortion["ms_ssim"]  # the others are too small for it
    for dithered in (False, True):  # rounding depends on the prior's expectation, dither does not
        one, other = (rows(report, kind, dithered=dithered) for kind in ("context", "factorized"))
        assert one.keys() == other.keys()
        assert all((one[key].distortion == other[key].distortion) == dithered for key in one)


def test_distortion_is_of_what_the_file_holds(plain: Codec, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(measure(plain, photos), "factorized")
    read = StreamReader.decompress
    monkeypatch.setattr(StreamReader, "decompress", lambda self, s: [z + 1 for z in read(self, s)])
    assert differ(expected, rows(measure(plain, photos), "factorized"))
    monkeypatch.setattr(StreamReader, "decompress", lambda self, s: [UserError("damaged")])
    with pytest.raises(RuntimeError, match="just written cannot be read"):
        measure(plain, photos)


def test_dither_depends_on_the_seed_and_rounding_does_not(plain: Codec, photos: Path) -> None:
    one, same, other = (measure(plain, photos, dataclasses.replace(ALONE, sample=seed)) for seed in (1, 1, 2))
    assert one.points == same.points and rows(one, "factorized") == rows(other, "factorized")
    first, second = (rows(r, "factorized", dithered=True) for r in (one, other))
    assert {step for _, step in first} == {1.0} and differ(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("anchor", anchors.available(), ids=lambda anchor: anchor.name)
def test_rows_of_anchors_are_their_whole_files_with_grey_as_grey(plain: Codec, photos: Path, anchor: Anchor) -> None:
    anchor = anchor._replace(qualities=anchor.qualities[-2:])
    found = rows(measure(plain, photos, dataclasses.replace(ALONE, anchors=[anchor])), anchor.name)
    assert found.keys() == {(name, quality) for name in SIZES for quality in anchor.qualities}
    for name, quality in [("a.png", anchor.qualities[0]), ("grey.png", anchor.qualities[-1])]:
        with Image.open(photos / name) as image:
            file, options = io.BytesIO(), anchor.grey_options if image.mode == "L" else anchor.options
            image.save(file, anchor.format, quality=quality, **options)
        if name == "grey.png" and anchor.name != "WebP":  # which has no grey; AVIF's is its subsampling
            with Image.open(file) as saved:
                assert saved.mode == "L" or options["subsampling"] == "4:0:0"
        back = np.asarray(anchors.decode(anchor, file.getvalue(), image.mode).convert("RGB"))
        x, y = read_image(photos / name).pixels[None], torch.from_numpy(back.copy()).permute(2, 0, 1)[None]
        row = found[name, quality]
        assert (row.bytes, row.ideal_bpp) == (len(file.getvalue()), None)
        assert row.distortion["psnr"] == distortion.psnr(x, y).item()


@pytest.mark.slow
def test_the_report_is_strict_json_a_plot_and_a_table(codec: Codec, photos: Path, tmp_path: Path) -> None:
    report = measure(codec, photos, BESIDE, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rd.json", "rd.png"]
    found = json.loads((tmp_path / "out" / "rd.json").read_text())
    assert found == json.loads(json.dumps(report.json(), allow_nan=False))
    assert [RatePoint.from_json(point) for point in found["summary"]["points"]] == report.points
    about = found["about"]
    assert about["model_id"] == codec.model_id and about["stream_ids"].keys() == {"context", "factorized"}
    assert (about["command"], about["set"], about["images"]) == ("it", "photos", 4)
    assert [image["path"] for image in found["images"]] == sorted(SIZES)
    assert all(len(image["rows"]) == len(found["summary"]["points"]) for image in found["images"])
    assert found["against"].keys() == {anchor.name for anchor in anchors.available()}
    for comparison in found["against"].values():
        for delta in comparison["delta_rates"].values():
            assert (delta["percent"] is None) != (delta["reason"] is None)
        assert [gain["bpp"] for gain in comparison["psnr_gains"]] == [i / 100 for i in range(25, 85, 5)]
    with Image.open(tmp_path / "out" / "rd.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    table = report.table()
    assert report.codecs[0] == "context" and "KL of the posterior" in table
    for point in report.points:
        assert any(line.startswith(point.setting.codec) and str(point.setting) in line for line in table.splitlines())
    assert all(anchor.settings() in table for anchor in anchors.available())


def test_an_anchor_that_pillow_lacks_gives_a_note(plain: Codec, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors.features, "check", lambda name: name != "webp")
    report = measure(plain, photos, dataclasses.replace(BESIDE, anchors=BESIDE.anchors[:2]))
    assert report.codecs == ["factorized", "JPEG"]
    assert report.notes == ["WebP left out: this Pillow was built without it"] and report.notes[0] in report.table()


def test_unreadable_images_are_in_no_curve(plain: Codec, photos: Path) -> None:
    expected = measure(plain, photos).points
    (photos / "bad.png").write_text("no picture")
    report = measure(plain, photos)
    assert report.failures.keys() == {"bad.png"} and report.points == expected
    for name in SIZES:
        (photos / name).unlink()
    refused("none of the 1 images", measure, plain, photos)


def test_impossible_requests_are_refused_first(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in ((), (1.0, 1.0), (1.0, 1000.0)):
        refused("step", RateDistortionOptions, steps=steps)
    priors, codec.priors = codec.priors, None
    refused("no prior", measure, codec, tmp_path / "nowhere")
    codec.priors = priors
    monkeypatch.setattr(bjontegaard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bjontegaard and jinja2 and matplotlib, which are not installed.*\[rd\]"):
        measure(codec, tmp_path / "nowhere")
