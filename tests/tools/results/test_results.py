"""The comparison page says what was measured, and the command measures what was not."""

import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion import anchors
from latent_codec.evaluation.rate_distortion.anchors import PEERS
from latent_codec.inference.options import ComputeOptions
from latent_codec.metrics.bjontegaard import SCALES, Curve, delta_rate
from latent_codec.model.codec import Codec
from tests.conftest import Draw
from tests.support.data import ROOT
from tools.benchmark.peers import Taef2
from tools.results import costs, crops, tables
from tools.results.__main__ import DETAILS, Results
from tools.results.crops import Detail
from tools.results.curves import against_published
from tools.results.measured import Measured
from tools.results.page import PAGE, PLOT, SHEET, page, plot
from tools.results.published import CURVES, STAGES

DOCS, CHECKPOINTS = ROOT / "docs", ROOT / "checkpoints"


@pytest.fixture(scope="module")
def measured() -> Measured:
    names = ("photo-rd.json", "photo.json", "photo-crops.json")
    return Measured(*(json.loads((CHECKPOINTS / name).read_text()) for name in names))


def test_the_page_and_its_plot_are_what_the_command_makes(measured: Measured) -> None:
    assert (DOCS / PAGE).read_text(encoding="utf-8") == page(measured, Codec.load("photo"))
    assert (DOCS / PLOT).read_text(encoding="utf-8") == plot(measured)


def test_the_picture_is_the_one_that_was_recorded(measured: Measured) -> None:
    data = (DOCS / SHEET).read_bytes()
    about = measured.crops["about"]
    assert about["model_id"] == Codec.load("photo").model_id
    assert about["sheet_sha256"] == hashlib.sha256(data).hexdigest()
    assert len(data) <= 400_000
    assert {row["image"] for row in measured.crops["rows"]} == {d.image for d in DETAILS}


def test_other_codecs_have_no_more_bytes_than_ours_unless_it_is_their_least(measured: Measured) -> None:
    for row in measured.crops["rows"]:
        *others, ours = row["files"]
        assert ours["codec"] == "photo"
        for file in others:
            assert file["bytes"] <= ours["bytes"] or file["setting"] == f"quality {crops.QUALITIES[0]}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (DOCS / PAGE).read_text()):
        assert (DOCS / target).exists(), target


def test_the_plot_is_well_formed_and_marks_what_was_published(measured: Measured) -> None:
    root = ElementTree.fromstring(plot(measured))
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert sum("stroke-dasharray" in e.attrib for e in lines) == len(CURVES)
    labels = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert {label for label in labels if "(published)" in label} == {f"{c.name} (published)" for c in CURVES}


def test_published_curves_ascend() -> None:
    for curve in CURVES:
        for values in zip(*curve.points, strict=True):
            assert list(values) == sorted(set(values))


def test_rates_are_compared_only_where_both_curves_are(measured: Measured) -> None:
    ours = [p["psnr"] for p in measured.rd["summary"]["points"] if p["codec"] == "context" and not p["dithered"]]
    for curve, delta in against_published(measured.rd, "context"):
        theirs = [psnr for _, psnr in curve.points]
        assert delta.low == max(min(ours), min(theirs)) and delta.high == min(max(ours), max(theirs))


def test_a_curve_of_half_the_bytes_has_half_the_rate_however_little_they_overlap() -> None:
    rates, values = np.array([0.1, 0.2, 0.4, 0.8]), [20.0, 24.0, 28.0, 32.0]
    tested = Curve.of(list(rates / 2), list(values), SCALES["psnr"])
    anchor = Curve.of([*rates[1:], 1.6, 3.2], [*values[1:], 36.0, 40.0], SCALES["psnr"])
    assert delta_rate(anchor, tested, 0.9).percent is None
    assert delta_rate(anchor, tested, 0.25).percent == pytest.approx(-50, abs=0.1)


def test_costs_are_those_of_the_networks() -> None:
    assert costs.of_taef2().parameters == sum(p.numel() for p in Taef2().parameters())
    # A linear 8x8 patch transform to 2 x 32 parameters: one product per pixel value and output.
    assert costs.of_pca(32).encoder == 2 * 3 * costs.SIDE**2 * 64
    published = {s.name: s.channels for s in STAGES if s.sd_shape}
    assert round(costs.of_sd_shape(published["FLUX.1"]).parameters / 1e6) == 84  # as published


@pytest.fixture
def small(tmp_path: Path, draw: Draw, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of the command for a tiny model and two small images."""
    monkeypatch.setattr(anchors, "PEERS", tuple(p._replace(qualities=p.qualities[::2]) for p in PEERS))
    for seed, name in enumerate(("a.png", "b.png")):
        draw(tmp_path / "photos" / name, 176, 168, seed=seed)
    files = {f"{kind}_json": tmp_path / f"{kind}.json" for kind in ("rd", "quality", "crops")}
    fixed: dict[str, Any] = {"model": str(model_file), "photos": tmp_path / "photos", "out": tmp_path / "docs"}
    return fixed | {"lpips_net": "none", "compute": ComputeOptions(device="cpu")} | files


def run(settings: dict[str, Any]) -> None:
    Results(**settings).run(details=(Detail("a.png", 8, 8),), steps=(0.5, 1.0, 2.0, 4.0))


def test_the_command_measures_what_is_missing_and_no_more(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data"):
        run(small)
    run(small | {"data": str(tmp_path / "photos")})
    made = {path: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert {path.name for path in made} == {PAGE, PLOT, SHEET}
    text = (tmp_path / "docs" / PAGE).read_text(encoding="utf-8")
    assert "No published curve is of this set." in text  # which is not Kodak's
    assert "(published)" not in (tmp_path / "docs" / PLOT).read_text(encoding="utf-8")
    stamps = {key: small[key].stat().st_mtime_ns for key in ("rd_json", "quality_json", "crops_json")}
    run(small)  # without images: all is there
    assert {path: path.read_bytes() for path in made} == made
    assert {key: small[key].stat().st_mtime_ns for key in stamps} == stamps


def test_results_of_another_model_are_not_taken(small: dict[str, Any], tmp_path: Path) -> None:
    other = {"about": {"model_id": "of another", "stream_ids": {"context": "of another"}}}
    small["rd_json"].write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"rd\.json: holds nothing of this model"):
        run(small)
    assert json.loads(small["rd_json"].read_text()) == other
    small["rd_json"].write_text("[]")
    with pytest.raises(UserError, match="no results of this kind"):
        run(small)


def test_the_nearest_size_is_the_largest_that_fits(tmp_path: Path, draw: Draw) -> None:
    with Image.open(draw(tmp_path / "a.png", 64, 48)) as opened:
        image = opened.convert("RGB")
    jpeg = PEERS[0]
    sizes = {q: len(anchors.encode(jpeg, image, q)) for q in crops.QUALITIES}
    limit = sizes[50]
    quality, data = crops.nearest(jpeg, image, limit)
    assert len(data) == sizes[quality] == max(size for size in sizes.values() if size <= limit)
    assert crops.nearest(jpeg, image, 1)[0] == crops.QUALITIES[0]


def test_a_detail_outside_its_image_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit into 176x168"):
        Results(**small, data=str(tmp_path / "photos"), anew=True).run(
            details=(Detail("a.png", 100, 8),), steps=(0.5, 1.0, 2.0, 4.0)
        )


def test_what_has_no_value_has_a_dash() -> None:
    assert tables.value("lpips", None) == "-"
    assert tables.markdown(["a", "b"], [["1", "2"]]).splitlines()[1] == "| --- | --- |"
