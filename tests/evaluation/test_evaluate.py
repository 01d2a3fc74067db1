"""Test that every number of an evaluation is what its protocol says, computed here a second way."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import EvaluationReport, evaluate
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.metrics import distortion
from latent_codec.metrics.lpips import LPIPSOptions
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.support.data import WEIGHTS

ALEXNET = WEIGHTS / "alexnet_features.safetensors"
SIZES = {"a.png": (24, 16), "b/c.png": (17, 33), "d.png": (9, 7)}


def run(codec: Codec, where: Path, out: Path | None = None, **options: Any) -> EvaluationReport:
    return evaluate(Runner(codec), where, out=out, quiet=True, **options)


@pytest.fixture
def grey_codec(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> Codec:
    """Return a codec that decodes everything to grey level 100."""

    def decode(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        b, _, h, w = z.shape
        return torch.full((b, 3, 8 * h, 8 * w), 100, dtype=torch.uint8)

    monkeypatch.setattr(codec, "decode_uint8", decode)
    return codec


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i, (name, size) in enumerate(SIZES.items()):
        draw(tmp_path / "photos" / name, *size, seed=i)
    return tmp_path / "photos"


def test_distortion_equals_a_direct_computation_or_is_none(grey_codec: Codec, photos: Path) -> None:
    report = run(grey_codec, photos)
    assert [record["path"] for record in report.images] == list(SIZES)
    expected = []
    for record in report.images:
        pixels = np.asarray(Image.open(photos / record["path"]), np.float64)  # (h, w, 3)
        expected.append(10 * math.log10(255**2 / np.square(pixels - 100).mean()))
        assert record["psnr"] == pytest.approx(expected[-1])
        assert record["pixels"] == math.prod(SIZES[record["path"]])
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(torch.uint8)
        ssim = distortion.ssim(x, torch.full_like(x, 100)).item()
        assert record["ssim"] == (None if record["path"] == "d.png" else pytest.approx(ssim))  # smaller than a window
        assert record["ms_ssim"] is None
    assert report.summary["psnr"] == pytest.approx(np.mean(expected))
    assert report.summary["ssim"] == pytest.approx(np.mean([record["ssim"] for record in report.images[:2]]))
    assert report.summary["ms_ssim"] is None and "lpips" not in report.summary | report.protocol


def test_rates_and_reconstructions_are_those_of_what_was_stored(codec: Codec, photos: Path, tmp_path: Path) -> None:
    report = run(codec, photos, tmp_path / "out")
    latents = Latents(tmp_path / "out" / "latents")
    for i, record in enumerate(report.images):
        posterior = latents.posterior(i)
        with torch.inference_mode():
            decoded = codec.decode_uint8(posterior.mode())[0]
        width, height = SIZES[record["path"]]
        kept = np.asarray(Image.open(tmp_path / "out" / "decoded" / f"{record['path']}.png"))
        assert np.array_equal(kept, decoded[:, :height, :width].permute(1, 2, 0).numpy())
        variance = posterior.logvar.double().exp()
        nats = 0.5 * (posterior.mean.double().square() + variance - 1 - posterior.logvar.double()).sum().item()
        assert record["kl_bpp"] == pytest.approx(nats / math.log(2) / record["pixels"], rel=1e-5)
    assert report.summary["kl_bpp"] == pytest.approx(np.mean([record["kl_bpp"] for record in report.images]))
    size = sum(map(len, files_of(tmp_path / "out" / "latents").values()))
    assert report.summary["disk_bpp"] == pytest.approx(8 * size / sum(math.prod(s) for s in SIZES.values()))


def test_results_are_strict_json_and_a_table_with_their_protocol(
    grey_codec: Codec, photos: Path, tmp_path: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    Image.new("RGB", (20, 20), (100, 100, 100)).save(photos / "exact.png")  # comes back without any error
    report = run(grey_codec, photos, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    assert found == json.loads(json.dumps(report.json()))
    assert found["about"]["model_id"] == grey_codec.model_id
    assert (found["about"]["set"], found["about"]["images"]) == ("photos", 4)
    (exact,) = (record for record in found["images"] if record["path"] == "exact.png")
    assert exact["psnr"] is None and exact["ssim"] == pytest.approx(1)
    for line, (name, value) in zip(report.table().splitlines()[1:], report.summary.items(), strict=True):
        assert name in line and report.protocol[name] in line
        assert ("-" if value is None else f"{value:.4f}") in line


@pytest.mark.skipif(not ALEXNET.exists(), reason=f"no {ALEXNET} here")
def test_lpips_is_that_of_the_decoded_image_or_none_where_it_is_too_small(
    grey_codec: Codec, photos: Path, draw: Draw
) -> None:
    draw(photos / "large.png", 40, 33)
    options = LPIPSOptions(net="alex", backbone=ALEXNET)
    report = run(grey_codec, photos, lpips=options)
    found = {record["path"]: record["lpips"] for record in report.images}
    x = torch.from_numpy(np.asarray(Image.open(photos / "large.png")).copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = options.load()(x / 127.5 - 1, torch.full(x.shape, 100 / 127.5 - 1)).item()
    assert found == {"a.png": None, "b/c.png": None, "d.png": None, "large.png": pytest.approx(expected, rel=1e-4)}
    assert report.summary["lpips"] == found["large.png"]
    assert "alex" in report.protocol["lpips"]


def test_unreadable_images_are_reported_and_left_out(grey_codec: Codec, photos: Path) -> None:
    expected = run(grey_codec, photos).summary["psnr"]
    (photos / "bad.png").write_text("no picture")
    report = run(grey_codec, photos)
    assert report.failures.keys() == {"bad.png"}
    assert report.about["images"] == len(report.images) == 3
    assert report.summary["psnr"] == expected
    for name in SIZES:
        (photos / name).unlink()
    with pytest.raises(UserError, match="none of the 1 images could be read"):
        run(grey_codec, photos)


def test_only_folders_of_evaluations_are_written_into(codec: Codec, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(codec, photos, out)
    run(codec, photos, out)  # replaces its own
    (out / "results.json").unlink()
    before = files_of(out / "latents")
    with pytest.raises(UserError, match="give another --out"):
        run(codec, photos, out)
    assert files_of(out / "latents") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written into"):
        run(codec, photos, tmp_path / "file")


def test_evaluating_without_out_leaves_nothing_behind(
    codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    run(codec, photos)
    assert list((tmp_path / "tmp").iterdir()) == []
