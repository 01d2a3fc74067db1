"""The benchmark of coding: its sizes are those of real files, and its times are of every part."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.images.geometry import Image, pad
from latent_codec.images.read import read_image
from latent_codec.model.codec import Codec
from latent_codec.prior.quantizer import step_code
from tests.conftest import Draw
from tools.benchmark import __main__
from tools.benchmark.coding import LARGEST_OVERHEAD, measure_sizes, time_coding

SIZES = {"a.png": (24, 16), "b.png": (65, 130)}


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for name, size in SIZES.items():
        draw(tmp_path / "photos" / name, *size)
    return tmp_path / "photos"


@pytest.fixture
def images(photos: Path) -> list[Image]:
    return [read_image(photos / name) for name in SIZES]


def test_sizes_are_those_of_files_and_close_to_the_ideal(codec: Codec, images: list[Image]) -> None:
    found = measure_sizes(codec, images, (1.0, 2.0), "cpu")
    assert {(s.prior, s.step) for s in found} == {(p, s) for p in ("context", "factorized") for s in (1.0, 2.0)}
    for sizes in found:
        coder = StreamCodec(codec, "cpu", sizes.prior)  # pyright: ignore[reportArgumentType]
        bpp, excess = [], []
        for image, size in zip(images, SIZES.values(), strict=True):
            with torch.inference_mode():
                mean = codec.encode(pad(image.pixels, codec.factor)[None]).mean[0]
            (coded,) = coder.compress([(coder.scale(mean, step_code(sizes.step), None), image.geometry)])
            bpp.append(8 * len(coded.data) / math.prod(size))
            excess.append(len(coded.data) - 1.01 * coded.ideal_bits / 8)
        assert sizes.bpp == pytest.approx(np.mean(bpp)) and sizes.worst_excess == pytest.approx(max(excess))
        assert sizes.ideal_bpp < sizes.bpp and sizes.worst_excess <= LARGEST_OVERHEAD


@pytest.mark.parametrize("context", [True, False])
def test_every_part_is_timed_for_every_prior(codec: Codec, images: list[Image], context: bool) -> None:
    assert codec.priors is not None
    codec.priors = codec.priors if context else codec.priors._replace(context=None)
    seconds = time_coding(codec, images, 1.0, rounds=2, device="cpu")
    assert seconds.priors.keys() == ({"factorized", "context"} if context else {"factorized"})
    parts = [seconds.encoder, seconds.scale, seconds.dequantize, seconds.decoder, seconds.refine]
    assert min(parts + [value for prior in seconds.priors.values() for value in prior]) > 0
    assert seconds.symbols == np.mean([4 * 3 * 2, 4 * 9 * 17])


def test_a_model_without_priors_is_refused(codec: Codec, images: list[Image]) -> None:
    codec.priors = None
    with pytest.raises(UserError, match="no prior"):
        time_coding(codec, images, 1.0, rounds=1, device="cpu")


def test_the_command_reports_ratios_and_savings(
    codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec.save(tmp_path / "model.safetensors")
    out = tmp_path / "coding.json"
    args = ["coding", str(photos), "--model", str(tmp_path / "model.safetensors"), "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *args])
    __main__.main()
    found = json.loads(out.read_text())
    results = found["results"]
    sizes = {(s["prior"], s["step"]): s["bpp"] for s in results["files"]["sizes"]}
    for step in (1.0, 1.4, 2.0):
        saved = 1 - sizes["context", step] / sizes["factorized", step]
        assert results["files"]["context_saves"][f"step {step:g}"] == pytest.approx(saved)
    assert results["files"]["worst_excess_bytes"] <= results["files"]["allowed"] == 64
    for prior in ("context", "factorized"):
        assert 0 < results[prior]["share_of_encode"] < 1 and 0 < results[prior]["share_of_decode"] < 1
    assert results["refine"]["rounds"] == 3 and results["refine"]["times_as_long_to_encode"] > 2
    assert found["about"]["threads"] == torch.get_num_threads() and found["about"]["images"] == 2
