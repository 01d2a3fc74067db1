"""Test that every number of an evaluation is what its protocol says, computed here a second way."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.evaluation.evaluate import EvaluationReport, evaluate
from latent_codec.images.read import read_image
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.metrics import distortion
from latent_codec.metrics.lpips import LPIPSOptions
from latent_codec.model.codec import Codec
from tests.conftest import files_of
from tests.evaluation.conftest import SIZES, decoded
from tests.support.data import WEIGHTS
from tests.support.errors import refused
from tests.support.folder import black_and_grey
from tests.support.networks import overflow_float16

ALEXNET = WEIGHTS / "alexnet_features.safetensors"


def run(codec: Codec, where: Path, out: Path | None = None, **options: Any) -> EvaluationReport:
    return evaluate(Runner(codec), where, out=out, quiet=True, **options)


@pytest.fixture
def grey_codec(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> Codec:
    """Return a codec that decodes everything to grey level 100."""
    monkeypatch.setattr(codec.likelihood, "to_uint8", lambda mean: torch.full_like(mean, 100, dtype=torch.uint8))
    return codec


def test_distortion_equals_a_direct_computation_or_is_none(grey_codec: Codec, photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (100, 100, 100)).save(photos / "exact.png")  # comes back without any error
    report = run(grey_codec, photos, tmp_path / "out")
    assert [record["path"] for record in report.images] == [*SIZES, "exact.png"]
    for record in report.images:
        x = read_image(photos / record["path"]).pixels[None]
        mse = (x.double() - 100).square().mean().item()
        assert record["psnr"] == (None if mse == 0 else pytest.approx(10 * math.log10(255**2 / mse)))
        assert record["pixels"] == x[0, 0].numel()
        ssim = distortion.ssim(x, torch.full_like(x, 100)).item()
        assert record["ssim"] == (None if record["path"] == "d.png" else pytest.approx(ssim))  # smaller than a window
        assert record["ms_ssim"] is None
    for name in ("psnr", "ssim"):
        assert report.summary[name] == pytest.approx(np.mean([r[name] for r in report.images if r[name] is not None]))
    assert report.summary["ms_ssim"] is None and "lpips" not in report.summary | report.protocol

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found == json.loads(json.dumps(report._asdict(), allow_nan=False))
    about = found["about"]
    assert (about["model_id"], about["set"], about["images"]) == (grey_codec.model_id, "photos", len(SIZES) + 1)
    for line, (name, value) in zip(report.table().splitlines()[1:], report.summary.items(), strict=True):
        assert name in line and report.protocol[name] in line and ("-" if value is None else f"{value:.4f}") in line


def test_rates_and_reconstructions_are_those_of_what_was_stored(codec: Codec, photos: Path, tmp_path: Path) -> None:
    report = run(codec, photos, tmp_path / "out")
    latents = Latents(tmp_path / "out" / "latents")
    for i, record in enumerate(report.images):
        posterior = latents.posterior(i)
        kept = read_image(tmp_path / "out" / "decoded" / f"{record['path']}.png").pixels
        assert torch.equal(kept, decoded(codec, posterior.mode(), kept))
        assert kept.shape[1:] == SIZES[record["path"]][::-1]
        variance = posterior.logvar.double().exp()
        nats = 0.5 * (posterior.mean.double().square() + variance - 1 - posterior.logvar.double()).sum().item()
        assert record["kl_bpp"] == pytest.approx(nats / math.log(2) / record["pixels"], rel=1e-5)
    assert report.summary["kl_bpp"] == pytest.approx(np.mean([record["kl_bpp"] for record in report.images]))
    size = sum(map(len, files_of(tmp_path / "out" / "latents").values()))
    assert report.summary["disk_bpp"] == pytest.approx(8 * size / sum(math.prod(s) for s in SIZES.values()))


@pytest.mark.slow
@pytest.mark.skipif(not ALEXNET.exists(), reason=f"no {ALEXNET} here")
def test_lpips_is_that_of_the_decoded_image_or_none_where_it_is_too_small(grey_codec: Codec, photos: Path) -> None:
    options = LPIPSOptions(net="alex", backbone=ALEXNET)
    report = run(grey_codec, photos, lpips=options)
    x = read_image(photos / "e.png").pixels[None]
    with torch.inference_mode():
        expected = options.load()(x / 127.5 - 1, torch.full(x.shape, 100 / 127.5 - 1)).item()
    found = {record["path"]: record["lpips"] for record in report.images}
    assert found == {**dict.fromkeys(SIZES), "e.png": pytest.approx(expected, rel=1e-4)}
    assert report.summary["lpips"] == found["e.png"] and "alex" in report.protocol["lpips"]


def test_unreadable_images_are_reported_and_left_out(grey_codec: Codec, photos: Path) -> None:
    expected = run(grey_codec, photos).summary["psnr"]
    (photos / "bad.png").write_text("no picture")
    report = run(grey_codec, photos)
    assert report.failures.keys() == {"bad.png"} and report.summary["psnr"] == expected
    assert report.about["images"] == len(report.images) == len(SIZES)
    for name in SIZES:
        (photos / name).unlink()
    refused("none of the 1 images could be read", run, grey_codec, photos)


def test_images_beyond_float16_are_reported_and_left_out_of_means(codec: Codec, tmp_path: Path) -> None:
    overflow_float16(codec)
    runner = Runner(codec, ComputeOptions(device="cpu", dtype="float16"))
    report = evaluate(runner, black_and_grey(tmp_path / "src"), out=tmp_path / "out", quiet=True)
    assert [record["path"] for record in report.images] == ["grey.png"] and report.failures.keys() == {"black.png"}
    assert files_of(tmp_path / "out" / "decoded").keys() == {"grey.png.png"}
    size = sum(map(len, files_of(tmp_path / "out" / "latents").values()))
    assert report.summary["disk_bpp"] == 8 * size / (2 * 8 * 8)
    (tmp_path / "src" / "grey.png").unlink()
    refused("none of the 1 images could be decoded", evaluate, runner, tmp_path / "src", quiet=True)


def test_only_own_folders_are_used(codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(codec, photos, out)
    run(codec, photos, out)  # replaces its own
    (out / "results.json").unlink()
    before = files_of(out / "latents")
    refused("give another --out", run, codec, photos, out)
    assert files_of(out / "latents") == before
    (tmp_path / "file").write_text("mine")
    refused("cannot be written into", run, codec, photos, tmp_path / "file")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    run(codec, photos)  # without a folder it leaves nothing behind
    assert list((tmp_path / "tmp").iterdir()) == []
