"""Test the report: its numbers a second way, its pictures, and a page that is safe whatever names say."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_codec.evaluation.bounds import bounds
from latent_codec.evaluation.evaluate import evaluate
from latent_codec.evaluation.rate_distortion import anchors
from latent_codec.evaluation.report import EvaluatedModel, ReportOptions, pca, pictures, rate, write_report
from latent_codec.evaluation.report.baselines import BaselineComparison, why_no_pca
from latent_codec.evaluation.report.likelihood import likelihood_bounds
from latent_codec.evaluation.report.page import Section, left_out, render
from latent_codec.evaluation.report.survey import EDGES, image_key, survey
from latent_codec.images.geometry import in_channels, pad
from latent_codec.images.read import read_image
from latent_codec.images.sources import find_images
from latent_codec.inference.calibration import calibrate
from latent_codec.inference.runner import Runner
from latent_codec.metrics import distortion
from latent_codec.model.codec import Codec
from latent_codec.model.config import DiscretizedLogisticConfig, IdentityConfig, VectorQuantizerConfig
from latent_codec.noise import normal
from tests.conftest import Draw, files_of
from tests.evaluation.conftest import SIZES, compressed, decoded, encoded
from tests.support.errors import refused, rejected
from tests.support.networks import make_codec
from tests.test_cli import Run
from tests.test_cli import run as run  # the fixture
from train.config.presets import mnist_cvae

HOSTILE = "x<script>alert(1)<!--\"'&amp;\u202egnp.png"
HIDDEN = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
OPTIONS = ReportOptions(report_images=3, bound_images=2, bound_samples=3, seed=5)


def evaluated(codec: Codec, where: Path) -> EvaluatedModel:
    runner = Runner(codec)
    return EvaluatedModel(runner, "tiny", str(where), evaluate(runner, where, quiet=True), None, "it")


def write(codec: Codec, where: Path, out: Path) -> tuple[str, Any]:
    """Write a report, and return its page and its results."""
    write_report(evaluated(codec, where), out, OPTIONS, quiet=True)
    return (out / "report.html").read_text(encoding="utf-8"), json.loads((out / "report.json").read_text())


def changed(codec: Codec, **changes: Any) -> Codec:
    """Return an untrained codec of a changed configuration."""
    return make_codec(dataclasses.replace(codec.config, **changes))


class Parsed(HTMLParser):
    """Collect tags with their attributes, the text between them, and images by section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.images: dict[str, list[bytes]] = {}
        self._section = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.tags.append((tag, given))
        if tag == "section" and given.get("id"):
            self._section = given["id"] or ""
        if tag == "img":
            kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.*)", given["src"] or "").groups()  # pyright: ignore
            self.images.setdefault(self._section, []).append(base64.b64decode(data, validate=True))
            assert kind == "png" or ElementTree.fromstring(self.images[self._section][-1]).tag.endswith("svg")

    def handle_data(self, data: str) -> None:
        self.text += data

    def pixels(self, section: str) -> list[torch.Tensor]:
        """Return every PNG of a section, (3, h, w) uint8."""
        opened = [Image.open(io.BytesIO(data)) for data in self.images[section]]
        return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened]


def parsed(section: Section) -> Parsed:
    return Parsed(render("", "", [section]))


@settings(max_examples=50)
@given(st.text())
@example("a\u202eb\udcffc\x1b<b>")
def test_text_comes_out_of_the_page_as_text_with_nothing_hidden(text: str) -> None:
    page, plain = (Parsed(render(words, "", [left_out("x", "y", words)])) for words in (text, "plain"))
    assert page.tags == plain.tags
    spelled = re.sub(HIDDEN, lambda found: found[0].encode("unicode_escape").decode(), text)
    assert page.text == plain.text.replace("plain", spelled) and not re.search(HIDDEN, page.text)


@pytest.mark.slow
def test_the_page_loads_and_runs_nothing_whatever_names_say(codec: Codec, photos: Path, tmp_path: Path) -> None:
    (photos / "a.png").rename(photos / HOSTILE)
    for name in ("d.png", "e.png"):
        (photos / name).unlink()
    (photos / "bad<img src=x>.png").write_text("no picture")
    codec.provenance = {"</pre><script>alert(1)</script>": "<img src='https://example.org/x.png'>"}
    text, results = write(codec, photos, tmp_path / "out")
    page = Parsed(text)
    assert {name for name, _ in page.tags} & {"script", "iframe", "object", "embed", "form", "base"} == set()
    for name, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes) and (name != "img" or attributes["alt"])
        assert (attributes.get("src") or attributes.get("href") or "#").startswith(("data:", "#"))
    policy = next(a for n, a in page.tags if n == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "") and "url(" not in text and "@import" not in text
    assert page.text.count("<script>alert(1)") >= 2 and "bad<img src=x>.png" in page.text  # seen, as text
    assert HOSTILE in [r["image"] for r in results["reconstructions"]["images"]]
    assert list(results["making"]["failures"]) == ["bad<img src=x>.png"]


@pytest.mark.slow
def test_the_page_has_every_number_and_pictures_are_what_they_say(codec: Codec, photos: Path, tmp_path: Path) -> None:
    text, results = write(codec, photos, tmp_path / "out")
    write(codec, photos, tmp_path / "again")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    page = Parsed(text)
    numbers = [n for section in results.values() for n in section.values() if isinstance(n, dict) and "protocol" in n]
    assert len(numbers) > 15
    for number in numbers:
        assert number["protocol"] in page.text
        if number["value"] is not None:
            assert f"{number['value']:#.4g}" in page.text or f"{number['value']:,.0f}" in page.text
    assert [a["id"] for n, a in page.tags if n == "section" and a.get("id")] == list(results)

    shown = [read_image(photos / name).pixels for name in list(SIZES)[:3]]
    modes = [decoded(codec, encoded(codec, x).mode(), x) for x in shown]
    found = page.pixels("reconstructions")
    assert len(found) == 4 * 3
    for i, (x, y) in enumerate(zip(shown, modes, strict=True)):
        assert torch.equal(found[4 * i], x) and torch.equal(found[4 * i + 1], y)
        assert torch.equal(found[4 * i + 3].int(), (128 + 4 * (y.int() - x.int())).clamp(0, 255))
        record = results["reconstructions"]["images"][i]
        assert record["psnr_mode"] == pytest.approx(distortion.psnr(x[None], y[None]).item())
        assert record["psnr_sample"] == pytest.approx(distortion.psnr(x[None], found[4 * i + 2][None]).item())
    moved = page.pixels("traversals")
    assert len(moved) == 4 * 7  # every channel
    for channel in range(4):
        row = moved[7 * channel : 7 * channel + 7]
        assert torch.equal(row[3], modes[0]) and not torch.equal(row[0], modes[0])
    mixed = page.pixels("interpolations")
    assert len(mixed) == 2 * 7
    for first in (0, 7):  # latents, then pixels
        for end, image in ((first, shown[0]), (first + 6, shown[1])):
            part = pictures.middle(image, 16, 17)
            assert torch.equal(mixed[end], decoded(codec, encoded(codec, part).mode(), part))
    assert not torch.equal(mixed[3], mixed[10])


def test_moments_are_those_of_all_posteriors_together(codec: Codec, photos: Path) -> None:
    found = survey(Runner(codec), find_images(photos), 5, quiet=True)
    parts = []
    for source in find_images(photos):
        posterior = encoded(codec, source.read().pixels)
        noise = normal(image_key(5, source.name)[None], tuple(posterior.mean.shape[1:]))
        three = (posterior.mean, posterior.logvar.double().exp(), posterior.sample(noise))
        parts.append(torch.stack([t[0].flatten(1).double() for t in three]))
    mean, variance, z = torch.cat(parts, 2).numpy()
    assert (found.images, found.elements) == (len(SIZES), mean.shape[1])
    kl = 0.5 * (mean**2 + variance - 1 - np.log(variance)).mean(1)
    expected = [mean.var(1), variance.mean(1), np.sqrt(mean.var(1) + variance.mean(1)), kl]
    measured = [found.variance, found.posterior_variance, found.std, found.kl]
    np.testing.assert_allclose(np.stack(measured), expected, rtol=1e-5, atol=1e-7)
    assert found.by_activity == sorted(range(4), key=lambda i: -mean.var(1)[i])
    z = z.ravel()
    standard = (z - z.mean()) / z.std()
    assert found.draws.mean == pytest.approx(z.mean()) and found.draws.variance == pytest.approx(z.var())
    assert found.draws.skewness == pytest.approx((standard**3).mean(), abs=1e-6)
    assert found.draws.excess_kurtosis == pytest.approx((standard**4).mean() - 3, abs=1e-6)
    counts, _ = np.histogram(z, EDGES.numpy())
    assert found.draws.counts[1:-1].tolist() == counts.tolist() and int(found.draws.counts.sum()) == z.size


def test_samples_have_the_scale_that_is_written_above_them(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    like = pictures.Shown("like", torch.zeros(3, 140, 121, dtype=torch.uint8), None)
    drawn: list[torch.Tensor] = []

    def decode(latents: list[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.stack(latents))
        return torch.zeros(len(latents), 3, 8, 8, dtype=torch.uint8)

    runner = Runner(codec)
    monkeypatch.setattr(runner, "decode_uint8", decode)
    pictures.prior_samples(runner, like, 0)
    prior, aggregate = (z.transpose(0, 1).flatten(1) for z in drawn)  # (z, n)
    assert drawn[0].shape == (8, 4, 16, 16)
    statistics = codec.statistics
    assert statistics is not None
    for z, means, stds in ((prior, (0.0,) * 4, (1.0,) * 4), (aggregate, statistics.mean, statistics.std)):
        for channel, mean, std in zip(z, means, stds, strict=True):
            assert channel.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(len(channel)))
            assert channel.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * len(channel)))
    codec.statistics = None
    assert "no latent statistics" in parsed(pictures.prior_samples(runner, like, 1)).text
    assert len(drawn) == 3 and not torch.equal(drawn[2], drawn[0])  # of another seed


@pytest.mark.slow
def test_a_conditional_model_is_told_each_images_class(tmp_path: Path, draw: Draw) -> None:
    conditional = make_codec(mnist_cvae().codec)
    classes = conditional.config.classes
    for i in (3, 7):
        draw(tmp_path / "photos" / classes[i] / "a.png", 28, 28, mode="L", seed=i)
    text, results = write(conditional, tmp_path / "photos", tmp_path / "out")
    page = Parsed(text)
    found = page.pixels("reconstructions")[1::4]
    for i, shown in zip((3, 7), found, strict=True):
        pixels = in_channels(read_image(tmp_path / "photos" / classes[i] / "a.png").pixels, 1)[None]
        with torch.inference_mode():
            for label in (i, 0):
                labels = torch.tensor([label])
                decoded = conditional.decode_uint8(conditional.encode(pixels, labels).mode(), labels)[0]
                assert torch.equal(shown, decoded.expand(3, -1, -1)) == (label == i)
    assert all(f"class {classes[i]}" in page.text for i in range(8)) and "class" in results["jpeg"]["left_out"]


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", [IdentityConfig(), VectorQuantizerConfig(codes=8)], ids=["identity", "vq"])
def test_models_without_a_gaussian_have_the_parts_that_make_sense(
    codec: Codec, photos: Path, tmp_path: Path, bottleneck: IdentityConfig | VectorQuantizerConfig
) -> None:
    other = changed(codec, bottleneck=bottleneck)
    calibrate(other, find_images(photos), "photos", quiet=True)
    _, results = write(other, photos, tmp_path / "out")
    out = {name for name, section in results.items() if "left_out" in section} - {"rate_distortion", "rfid"}
    never = {"prior_samples", "kl", "aggregate_posterior", "bounds"}
    assert out == (never if bottleneck.kind == "identity" else never | {"interpolations", "traversals"})
    if bottleneck.kind == "vq":
        taken = torch.zeros(8, dtype=torch.int64)
        for source in find_images(photos):
            taken += torch.bincount(encoded(other, source.read().pixels).coded.flatten(), minlength=8)
        share = taken[taken > 0] / taken.sum()
        section = results["active_units"]
        assert section["codes"] == taken.tolist() and section["codes_used"]["value"] == len(share)
        assert section["perplexity"]["value"] == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-5)
        assert "codes" in results["baselines"]["pca_left_out"]


def test_bounds_are_those_of_images_from_all_over_the_set(codec: Codec, photos: Path) -> None:
    images = pictures.select_images(codec, find_images(photos), 2)
    assert [image.name for image in images] == ["a.png", "d.png"]
    section = likelihood_bounds(Runner(codec), images, 5, 3, quiet=True)
    for image, record in zip(images, section.records["images"], strict=True):
        found = bounds(codec, pad(image.pixels, 8)[None], image_key(5, image.name)[None], 3, at_once=64)
        assert record["elbo"] == pytest.approx(found.elbo.item(), rel=1e-6)
        assert record["iwae"] == pytest.approx(found.iwae.item(), rel=1e-6)
    values = {n.name: n.value for n in section.numbers}
    assert values["elbo"] == pytest.approx(np.mean([r["elbo"] for r in section.records["images"]]))
    assert "elbo_bits_per_dim" not in values and "no bits per dimension" in parsed(section).text
    discrete = changed(codec, likelihood=DiscretizedLogisticConfig(components=1))
    section = likelihood_bounds(Runner(discrete), images, 5, 3, quiet=True)
    values = {n.name: n.value for n in section.numbers}
    sizes = (3 * 16 * 24, 3 * 8 * 16)  # padded to multiples of 8
    rates = [-r["iwae"] / size / math.log(2) for r, size in zip(section.records["images"], sizes, strict=True)]
    assert values["iwae_bits_per_dim"] == pytest.approx(np.mean(rates))


def test_pca_is_the_singular_value_decomposition() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 12), np.uint8)
    model = pca.fit([torch.from_numpy(pixels)], 4, 3)
    rows = np.array([pixels[:, i : i + 4, j : j + 4].ravel() for i in (0, 4) for j in (0, 4, 8)], np.float64)
    centre = rows.mean(0)
    _, _, basis = np.linalg.svd(rows - centre)
    expected = (rows - centre) @ basis[:3].T @ basis[:3] + centre
    back = model.reconstruct(torch.from_numpy(pixels)).numpy()
    found = np.array([back[:, i : i + 4, j : j + 4].ravel() for i in (0, 4) for j in (0, 4, 8)])
    assert np.array_equal(found, np.clip(np.rint(expected), 0, 255))
    odd = torch.from_numpy(pixels[:, :7, :9].copy())
    assert model.reconstruct(odd).shape == odd.shape
    rejected("no more than those", pca.fit, [torch.from_numpy(pixels)], 4, 49)


def test_pca_is_never_fitted_to_what_it_measures(codec: Codec, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[list[torch.Tensor]] = []
    measured: list[torch.Tensor] = []
    fit = pca.fit

    def recorded(images: Any, patch: int, components: int) -> Any:
        kept = list(images)
        model = fit(kept, patch, components)
        fitted.append(kept)

        class Watched:
            def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
                assert not any(torch.equal(pixels, other) for other in kept)
                measured.append(pixels)
                return model.reconstruct(pixels)

        return Watched()

    monkeypatch.setattr(pca, "fit", recorded)
    sources, runner = find_images(photos), Runner(codec)
    comparison = BaselineComparison(runner, sources, evaluate(runner, photos, quiet=True), quiet=True)
    smaller = Runner(changed(codec, latent_channels=2))
    section = comparison.section([("again", runner), ("small<b>", smaller)], None)
    assert len(measured) == len(SIZES) == sum(map(len, fitted))
    own, principal, again, _ = section.records["methods"]
    assert own["psnr"] == pytest.approx(again["psnr"], abs=0.01)  # as stored in float16
    assert own["numbers_per_pixel"] == principal["numbers_per_pixel"] == 4 / 64
    assert "Not of the same latent size, so not to be compared by distortion alone: small<b>." in parsed(section).text
    assert why_no_pca(codec, sources, None) is None and why_no_pca(codec, sources[:1], "data") is None
    assert "--baseline-data" in (why_no_pca(codec, sources[:1], None) or "")


def test_the_jpeg_is_the_largest_that_is_no_larger() -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(values).resize((64, 64), Image.Resampling.BICUBIC)
    sizes = [len(anchors.encode(anchors.JPEG, image, quality)) for quality in rate.QUALITIES]
    for limit in (min(sizes), min(sizes) + 1, sizes[40], sizes[60] - 1):
        quality, data = anchors.largest_within(anchors.JPEG, image, limit, rate.QUALITIES) or (0, b"")
        assert len(data) == sizes[quality - 1] == max(size for size in sizes if size <= limit)
    assert anchors.largest_within(anchors.JPEG, image, min(sizes) - 1, rate.QUALITIES) is None


def test_files_are_those_of_encode_and_jpegs_have_no_more_bytes(codec: Codec, tmp_path: Path) -> None:
    smooth = np.random.default_rng(1).integers(0, 256, (5, 5, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for name, mode in (("a.png", "RGB"), ("grey.png", "L")):
        large = Image.fromarray(smooth).resize((200, 104), Image.Resampling.BICUBIC)
        large.convert(mode).save(tmp_path / "photos" / name)
    Image.new("RGB", (3, 3)).save(tmp_path / "photos" / "tiny.png")  # whose smallest JPEG is larger than a .lc file
    sources = find_images(tmp_path / "photos")
    section = rate.jpeg_at_equal_bytes(Runner(codec), sources, None, ["grey.png", "tiny.png"], quiet=True)
    for source, record in zip(sources, section.records["images"], strict=True):
        assert record["ours"]["bytes"] == len(compressed(codec, source.read(), 1.0).data)
        assert record["jpeg"] is None or record["jpeg"]["bytes"] <= record["ours"]["bytes"]
    assert [r["jpeg"] is None for r in section.records["images"]] == [False, False, True]
    pairs, page = [(r["ours"], r["jpeg"]) for r in section.records["images"][:2]], parsed(section)
    for i, mean in enumerate(section.records["means"]):
        assert mean["psnr"] == pytest.approx(np.mean([pair[i]["psnr"] for pair in pairs]))
        assert mean["bpp"] == pytest.approx(np.mean([8 * pair[i]["bytes"] / (200 * 104) for pair in pairs]))
        assert f"{mean['bpp']:#.4g}" in page.text
    assert "1 images are in no mean" in page.text and len(page.images["jpeg"]) == 3


@pytest.mark.slow
def test_the_command_reports_rate_distortion_curves(run: Run, model_file: Path, photos: Path, tmp_path: Path) -> None:
    args = ["--report", "--rd", "--steps", "1", "1.5", "--out", tmp_path, "--lpips-net", "none", "--device", "cpu"]
    for name in ("d.png", "e.png"):
        (photos / name).unlink()
    result = run("evaluate", model_file, photos, *args)
    assert result.code == 0 and "kl_bpp" in result.out
    made = sorted(path.name for path in tmp_path.glob("r*"))
    assert made == ["rd.json", "rd.png", "report.html", "report.json", "results.json"]
    measured, page = json.loads((tmp_path / "rd.json").read_text()), Parsed((tmp_path / "report.html").read_text())
    section = json.loads((tmp_path / "report.json").read_text())["rate_distortion"]
    assert section["points"] == measured["summary"]["points"] and "evaluate" in measured["about"]["command"]
    assert page.images["rate_distortion"] == [(tmp_path / "rd.png").read_bytes()]
    for anchor, comparison in measured["against"].items():
        assert f"against {anchor}" in page.text
        for delta in comparison["delta_rates"].values():
            assert (delta["reason"] or f"{delta['percent']:+.1f} %") in page.text


@pytest.mark.slow
def test_parts_that_are_missing_give_the_reason(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "photos" / "one.png", 16, 16)
    codec.priors = None
    _, results = write(codec, tmp_path / "photos", tmp_path / "out")
    assert "two images" in results["interpolations"]["left_out"] and "no prior" in results["jpeg"]["left_out"]
    assert "--rd" in results["rate_distortion"]["left_out"] and "one image" in results["baselines"]["pca_left_out"]
    model = evaluated(codec, tmp_path / "photos")
    (tmp_path / "photos" / "one.png").rename(tmp_path / "photos" / "other.png")
    refused(r"one\.png.*gone", write_report, model, tmp_path, OPTIONS, quiet=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--report", "give --out"),
        ("--report --out OUT --report-images 0", "--report-images 0"),
        ("--report --out OUT --bound-samples 0", "--bound-samples 0"),
        ("--report --out OUT --baseline-data nowhere", "nowhere: no such image"),
        ("--report --out OUT --baseline nowhere", "nowhere: neither a file nor a shipped model"),
    ],
)
def test_wrong_options_are_refused_first(run: Run, model_file: Path, tmp_path: Path, flags: str, message: str) -> None:
    given = [str(tmp_path / "out") if flag == "OUT" else flag for flag in flags.split()]
    result = run("evaluate", model_file, "photos", "--lpips-net", "none", "--device", "cpu", *given)
    assert result.code == 2 and message in result.err and not (tmp_path / "out").exists()
