"""Test that the command measures what is missing, and that the page compares curves only where they overlap."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from latent_codec.evaluation.rate_distortion.anchors import JPEG
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions
from latent_codec.inference.options import ComputeOptions
from tests.conftest import Draw
from tests.support.data import ROOT
from tests.support.errors import refused
from tools.benchmark.other_models import Taef2
from tools.results import costs
from tools.results.__main__ import Results
from tools.results.crops import Detail
from tools.results.page import PAGE, PLOT, SHEET, Measured, plot
from tools.results.published import CURVES, STAGES

RATES = RateDistortionOptions(steps=(0.5, 1.0, 2.0, 4.0), anchors=[JPEG._replace(qualities=(5, 30, 60, 90))])


@pytest.fixture(scope="module")
def measured() -> Measured:
    names = ("photo-rd.json", "photo.json", "photo-crops.json")
    return Measured(*(json.loads((ROOT / "checkpoints" / name).read_text()) for name in names))


@pytest.mark.slow
def test_the_plot_has_every_published_curve_and_equal_input_gives_equal_bytes(measured: Measured) -> None:
    assert plot(measured) == plot(measured)
    texts = [element.text for element in ElementTree.fromstring(plot(measured)).iter() if element.tag.endswith("text")]
    assert {f"{curve.name} (published)" for curve in CURVES} <= set(texts)


@pytest.mark.slow
def test_costs_are_those_of_the_networks() -> None:
    assert costs.of_taef2().parameters == sum(p.numel() for p in Taef2().parameters())
    # A linear 8x8 patch transform to 2 x 32 parameters: one product per pixel value and output.
    assert costs.of_pca(32).encoder == 2 * 3 * costs.SIDE**2 * 64
    published = {s.name: s.channels for s in STAGES if s.sd_shape}
    assert round(costs.of_sd_shape(published["FLUX.1"]).parameters / 1e6) == 84  # as published


@pytest.fixture
def small(tmp_path: Path, draw: Draw, model_file: Path) -> dict[str, Any]:
    """Return settings of the command for a tiny model and one small image."""
    draw(tmp_path / "photos" / "a.png", 176, 168)
    files = {f"{kind}_json": tmp_path / f"{kind}.json" for kind in ("rd", "quality", "crops")}
    fixed: dict[str, Any] = {"model": str(model_file), "photos": tmp_path / "photos", "out": tmp_path / "docs"}
    return fixed | {"lpips_net": "none", "compute": ComputeOptions(device="cpu")} | files


def run(settings: dict[str, Any], left: int = 8) -> None:
    Results(**settings).run(details=(Detail("a.png", left, 8),), rates=RATES)


@pytest.mark.slow
def test_the_command_measures_what_is_missing_and_no_more(small: dict[str, Any], tmp_path: Path) -> None:
    refused("--data", run, small)
    run(small | {"data": str(tmp_path / "photos")})
    made = {path: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert {path.name for path in made} == {PAGE, PLOT, SHEET}
    assert "No published curve is of this set." in made[tmp_path / "docs" / PAGE].decode()  # which is not Kodak's
    assert b"(published)" not in made[tmp_path / "docs" / PLOT]
    stamps = {key: small[key].stat().st_mtime_ns for key in ("rd_json", "quality_json", "crops_json")}
    run(small)  # without images: all is there
    assert {path: path.read_bytes() for path in made} == made
    assert {key: small[key].stat().st_mtime_ns for key in stamps} == stamps
    small["crops_json"].unlink()
    refused("does not fit into 176x168", run, small, left=100)


def test_results_of_another_model_are_not_taken(small: dict[str, Any]) -> None:
    other = {"about": {"model_id": "of another", "stream_ids": {"context": "of another"}}}
    small["rd_json"].write_text(json.dumps(other))
    refused(r"rd\.json: holds nothing of this model", run, small)
    assert json.loads(small["rd_json"].read_text()) == other
    small["rd_json"].write_text("[]")
    refused("no results of this kind", run, small)
