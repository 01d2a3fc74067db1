"""Rate and distortion: every row is a real file's, decoded from its bytes, and all of it is written down."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec import cli
from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion import anchors, measure
from latent_codec.evaluation.rate_distortion.anchors import PEERS
from latent_codec.evaluation.rate_distortion.measure import rate_distortion
from latent_codec.evaluation.rate_distortion.report import Report, Row
from latent_codec.images.geometry import pad
from latent_codec.images.read import read_image
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.metrics import bjontegaard, distortion
from latent_codec.model.codec import Codec
from latent_codec.prior.quantizer import step_code
from tests.conftest import Draw

CPU = ComputeOptions(batch_size=4, workers=2)
SIZES = {"a.png": (24, 16), "b/c.png": (17, 33), "grey.png": (9, 7), "large.png": (165, 170)}
STEPS = (0.7, 1.0, 2.0)


def factorized_only(codec: Codec) -> Codec:
    assert codec.priors is not None
    codec.priors = codec.priors._replace(context=None)
    return codec


@pytest.fixture(autouse=True)
def few_qualities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "PEERS", [p._replace(qualities=p.qualities[::3]) for p in PEERS])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other codecs, which would take most of the time."""
    monkeypatch.setattr(measure.peer_codecs, "available", list)


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i, (name, size) in enumerate(SIZES.items()):
        draw(tmp_path / "photos" / name, *size, mode="L" if name == "grey.png" else "RGB", seed=i)
    return tmp_path / "photos"


def run(codec: Codec, where: Path, out: Path | None = None, **options: Any) -> Report:
    options = {"steps": STEPS, "sample": 0, "lpips_net": None, "lpips_backbone": None, "command": "it"} | options
    return rate_distortion(Runner(codec, CPU), where, out=out, quiet=True, **options)


def rows(report: Report, codec: str, *, dithered: bool = False) -> dict[tuple[str, float], Row]:
    return {
        (record.path, row.setting.value): row
        for record in report.records
        for row in record.rows
        if row.setting.codec == codec and row.setting.dithered == dithered
    }


@pytest.mark.parametrize("kind", ["context", "factorized"])
@pytest.mark.usefixtures("alone")
def test_our_rows_are_those_of_real_files_decoded_from_their_bytes(codec: Codec, photos: Path, kind: Any) -> None:
    report = run(codec, photos)
    coder, reader = StreamCodec(codec, "cpu", kind), StreamReader(codec, "cpu")
    found = rows(report, kind)
    assert found.keys() == {(name, step) for name in SIZES for step in STEPS}
    for (name, step), row in found.items():
        pixels, geometry = read_image(photos / name)
        with torch.inference_mode():
            mean = codec.encode(pad(pixels, 8)[None]).mean[0]
            (coded,) = coder.compress([(coder.scale(mean, step_code(step), None), geometry)])
            (latents,) = reader.decompress([unpack(coded.data)])
            assert isinstance(latents, torch.Tensor)
            decoded = codec.decode_uint8(latents[None])[..., : geometry.height, : geometry.width]
        if name == "grey.png":
            decoded = ((decoded.int().sum(1, keepdim=True) + 1) // 3).to(torch.uint8).expand(-1, 3, -1, -1)
        area = math.prod(SIZES[name])
        assert (row.bytes, row.bpp) == (len(coded.data), 8 * len(coded.data) / area)
        assert row.ideal_bpp == pytest.approx(coded.ideal_bits / area)
        assert row.distortion["psnr"] == distortion.psnr(pixels[None], decoded).item()


@pytest.mark.usefixtures("alone")
def test_the_priors_share_the_distortion_of_a_draw_alone(codec: Codec, photos: Path) -> None:
    """What is rounded lies around what the context prior expects, so that two priors' files differ."""
    report = run(codec, photos)
    for dithered in (False, True):
        one, other = (rows(report, kind, dithered=dithered) for kind in ("context", "factorized"))
        assert one.keys() == other.keys()
        assert all((one[key].distortion == other[key].distortion) == dithered for key in one)


@pytest.mark.usefixtures("alone")
def test_what_is_compared_was_read_from_the_file(codec: Codec, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factorized_only(codec)
    expected = [row.distortion["psnr"] for row in rows(run(codec, photos), "factorized").values()]
    decompress = StreamReader.decompress
    monkeypatch.setattr(StreamReader, "decompress", lambda self, s: [z + 1 for z in decompress(self, s)])
    changed = [row.distortion["psnr"] for row in rows(run(codec, photos), "factorized").values()]
    assert all(a != b for a, b in zip(expected, changed, strict=True))
    monkeypatch.setattr(StreamReader, "decompress", lambda self, s: [UserError("damaged")])
    with pytest.raises(RuntimeError, match="just written cannot be read"):
        run(codec, photos)


@pytest.mark.usefixtures("alone")
def test_kl_is_the_posteriors_and_means_are_over_images(codec: Codec, photos: Path) -> None:
    report = run(factorized_only(codec), photos)
    for record in report.records:
        with torch.inference_mode():
            kl = codec.encode(pad(read_image(photos / record.path).pixels, 8)[None]).kl().item()
        assert record.kl_bpp == pytest.approx(kl / math.log(2) / math.prod(SIZES[record.path]))
    assert report.kl_bpp == pytest.approx(np.mean([r.kl_bpp for r in report.records]))
    for i, point in enumerate(report.points):
        column = [record.rows[i] for record in report.records]
        assert {row.setting for row in column} == {point.setting}
        assert point.bpp == pytest.approx(np.mean([row.bpp for row in column]))
        assert point.distortion["psnr"] == pytest.approx(np.mean([row.distortion["psnr"] for row in column]))
        assert point.distortion["ms_ssim"] == column[-1].distortion["ms_ssim"]  # the others are too small for it


@pytest.mark.usefixtures("alone")
def test_dither_depends_on_the_seed_and_rounding_does_not(codec: Codec, photos: Path) -> None:
    factorized_only(codec)
    one, same, other = (run(codec, photos, sample=seed) for seed in (1, 1, 2))
    assert one.points == same.points
    assert rows(one, "factorized") == rows(other, "factorized")
    first, second = (rows(r, "factorized", dithered=True) for r in (one, other))
    assert {step for _, step in first} == {1.0}
    assert all(first[key].distortion["psnr"] != second[key].distortion["psnr"] for key in first)


@pytest.mark.parametrize("peer", anchors.available(), ids=lambda peer: peer.name)
def test_peers_rows_are_their_whole_files(
    codec: Codec, photos: Path, monkeypatch: pytest.MonkeyPatch, peer: Any
) -> None:
    peer = peer._replace(qualities=peer.qualities[-2:])
    monkeypatch.setattr(measure.peer_codecs, "available", lambda: [peer])
    found = rows(run(factorized_only(codec), photos), peer.name)
    assert found.keys() == {(name, quality) for name in SIZES for quality in peer.qualities}
    for name, quality in [("a.png", peer.qualities[0]), ("grey.png", peer.qualities[-1])]:
        with Image.open(photos / name) as image:
            file, options = io.BytesIO(), peer.grey_options if image.mode == "L" else peer.options
            image.save(file, peer.format, quality=quality, **options)
        back = np.asarray(Image.open(file).convert(image.mode).convert("RGB"))
        x, y = read_image(photos / name).pixels[None], torch.from_numpy(back.copy()).permute(2, 0, 1)[None]
        assert found[name, quality].bytes == len(file.getvalue())
        assert found[name, quality].distortion["psnr"] == distortion.psnr(x, y).item()
        assert found[name, quality].ideal_bpp is None


def test_grey_is_saved_as_grey() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for peer in anchors.available():
        data = anchors.encode(peer, grey, 75)
        assert anchors.decode(peer, data, "L").mode == "L"
        if peer.name == "JPEG":  # WebP has no grey, AVIF's is its subsampling
            assert Image.open(io.BytesIO(data)).mode == "L"
        if peer.name == "AVIF":
            assert len(data) <= len(anchors.encode(peer, grey.convert("RGB"), 75))


def test_everything_is_written_as_strict_json(codec: Codec, photos: Path, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = run(codec, photos, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "rd.json").read_text(), parse_constant=refuse)
    assert found == json.loads(json.dumps(report.json()))
    assert found["about"]["model_id"] == codec.model_id
    assert found["about"]["stream_ids"].keys() == {"context", "factorized"}
    assert (found["about"]["command"], found["about"]["set"], found["about"]["images"]) == ("it", "photos", 4)
    assert [image["path"] for image in found["images"]] == sorted(SIZES)
    assert all(len(image["rows"]) == len(found["summary"]["points"]) for image in found["images"])
    assert found["against"].keys() == {peer.name for peer in anchors.available()}
    for comparison in found["against"].values():
        for delta in comparison["delta_rates"].values():
            assert (delta["percent"] is None) != (delta["reason"] is None)
        assert [gain["bpp"] for gain in comparison["psnr_gains"]] == [i / 100 for i in range(25, 85, 5)]
    with Image.open(tmp_path / "out" / "rd.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rd.json", "rd.png"]


def test_the_table_names_every_codec_and_setting(codec: Codec, photos: Path) -> None:
    report = run(codec, photos)
    table = report.table()
    assert table.startswith("photos: 4 images") and "KL of the posterior" in table
    lines = table.splitlines()
    for point in report.points:
        assert any(line.startswith(point.setting.codec) and str(point.setting) in line for line in lines)
    for peer in anchors.available():
        assert peer.settings() in table and f"against {peer.name}:" in table
    assert report.codecs[0] == "context" and "context, step 1: a file with dither takes" in table


def test_a_codec_that_pillow_lacks_is_left_out_and_said_so(
    codec: Codec, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors.features, "check", lambda name: name != "avif")
    report = run(factorized_only(codec), photos)
    assert "AVIF" not in report.codecs and report.codecs[1:] == ["JPEG", "WebP"]
    assert report.notes == ["AVIF left out: this Pillow was built without it"] and report.notes[0] in report.table()


@pytest.mark.usefixtures("alone")
def test_images_that_cannot_be_read_are_in_no_curve(codec: Codec, photos: Path) -> None:
    factorized_only(codec)
    expected = run(codec, photos).points
    (photos / "bad.png").write_text("no picture")
    report = run(codec, photos)
    assert report.failures.keys() == {"bad.png"} and report.points == expected
    for name in SIZES:
        (photos / name).unlink()
    with pytest.raises(UserError, match="none of the 1 images"):
        run(codec, photos)


def test_impossible_requests_are_refused_before_any_work(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "nowhere"
    priors, codec.priors = codec.priors, None
    with pytest.raises(UserError, match="no prior"):
        run(codec, nowhere)
    codec.priors = priors
    for steps in ((), (1.0, 1.0), (1.0, 1000.0)):
        with pytest.raises(UserError, match="step"):
            run(codec, nowhere, steps=steps)
    monkeypatch.setattr(bjontegaard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bjontegaard and matplotlib, which are not installed.*\[rd\]"):
        run(codec, nowhere)


def test_the_command_line_prints_the_table(
    codec: Codec, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    factorized_only(codec).save(tmp_path / "model.safetensors")
    monkeypatch.setattr(measure.peer_codecs, "available", lambda: [PEERS[0]])
    args = ["evaluate", str(tmp_path / "model.safetensors"), str(photos), "--rd", "--lpips-net", "none"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*args, "--steps", "1", "1.5", "--out", str(tmp_path / "out")])
    assert caught.value.code == 0
    assert "step 1.5" in capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "rd.json").read_text())["about"]
    assert about["command"].startswith("latent-codec evaluate ") and "--steps 1 1.5" in about["command"]
    monkeypatch.setattr(bjontegaard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2 and "latent-codec[rd]" in capsys.readouterr().err
