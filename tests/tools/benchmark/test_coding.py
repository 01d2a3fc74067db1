"""Test that the benchmark of coding measures real files and times every part."""

import json
from pathlib import Path

import pytest
import torch

from latent_codec.images.read import read_image
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from tests.conftest import Draw
from tests.evaluation.conftest import compressed
from tools.benchmark.coding import LARGEST_OVERHEAD, Coding, measure_sizes

SIZES = {"a.png": (24, 16), "b.png": (65, 130)}


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for name, size in SIZES.items():
        draw(tmp_path / "photos" / name, *size)
    return tmp_path / "photos"


def test_sizes_are_close_to_the_ideal(codec: Codec, photos: Path) -> None:
    found = measure_sizes(Runner(codec), str(photos), (1.0, 2.0))
    bpp = {(sizes["prior"], sizes["step"]): sizes["bpp"] for sizes in found["sizes"]}
    assert bpp.keys() == {(prior, step) for prior in ("context", "factorized") for step in (1.0, 2.0)}
    for sizes in found["sizes"]:
        files = [compressed(codec, read_image(photos / name), sizes["step"], sizes["prior"]) for name in SIZES]
        excess = [len(file.data) - 1.01 * file.ideal_bits / 8 for file in files]
        assert sizes["worst_excess"] == pytest.approx(max(excess)) and max(excess) <= LARGEST_OVERHEAD
        assert sizes["ideal_bpp"] < sizes["bpp"]
    for step in (1.0, 2.0):
        saved = 1 - bpp["context", step] / bpp["factorized", step]
        assert found["context_saves"][f"step {step:g}"] == pytest.approx(saved)


def test_the_command_reports_ratios(model_file: Path, photos: Path, tmp_path: Path) -> None:
    Coding(dir=str(photos), model=str(model_file), steps=(1.0,), rounds=1, out=tmp_path / "out.json").run()
    found = json.loads((tmp_path / "out.json").read_text())
    for prior in ("context", "factorized"):
        assert 0 < found["results"][prior]["share_of_encode"] < 1 and 0 < found["results"][prior]["share_of_decode"] < 1
    assert found["about"]["threads"] == torch.get_num_threads() and found["about"]["images"] == 2
