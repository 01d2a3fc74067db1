"""What README and card say of the shipped model is what was measured of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from latent_codec.model.codec import Codec
from tests.support.data import ROOT

CHECKPOINTS = ROOT / "checkpoints"
CARD = CHECKPOINTS / "photo.md"
PAGES = [ROOT / "README.md", CARD]


def results(name: str) -> dict[str, Any]:
    return json.loads((CHECKPOINTS / name).read_text())


@pytest.fixture(scope="module")
def photo() -> Codec:
    return Codec.load("photo")


def rows(page: Path, heading: str) -> list[list[str]]:
    """Cells of the table under the header row that begins with `heading`."""
    table = page.read_text().split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_results_and_card_are_the_models_own(photo: Codec) -> None:
    assert photo.priors is not None
    ids = {kind: photo.priors.stream_id(photo.model_id, kind).hex() for kind in ("context", "factorized")}
    rd = results("photo-rd.json")["about"]
    assert rd["model_id"] == photo.model_id and rd["stream_ids"] == ids
    assert results("photo-coding.json")["about"]["model_id"] == photo.model_id
    assert results("photo.json")["results"]["photo"]["model_id"] == photo.model_id
    card = CARD.read_text()
    assert all(text in card for text in (photo.model_id, *ids.values()))


def test_the_table_of_files_is_what_was_measured() -> None:
    points = results("photo-rd.json")["summary"]["points"]
    measured = {(p["codec"], p["value"], p["dithered"]): p for p in points}
    names = ("bpp", "psnr", "ms_ssim", "lpips")
    columns = [*(("context", n) for n in names), ("factorized", "bpp"), ("factorized", "psnr")]
    columns += [("refined", n) for n in names]
    table = rows(CARD, "step | bpp")
    assert len(table) == len([key for key in measured if key[0] == "context"])
    for step, *cells in table:
        value, dithered = float(step.split(",")[0]), "dither" in step
        for shown, (kind, name) in zip(cells, columns, strict=True):
            if shown == "-":
                assert dithered and kind == "refined"
            else:
                exact = measured[kind, value, dithered][name]
                assert float(shown) == pytest.approx(exact, abs=0.5001 * 10.0 ** -len(shown.split(".")[1]))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_table_of_delta_rates_is_what_was_measured(page: Path) -> None:
    found = results("photo-rd.json")
    columns = [(kind, m) for kind in ("against", "refined_against") for m in ("psnr", "ms_ssim", "lpips")]
    for name, *shown in rows(page, "against"):
        for percent, (kind, metric) in zip(shown, columns, strict=True):
            exact = found[kind][name.split()[0]]["delta_rates"][metric]["percent"]
            assert float(percent.rstrip("%")) == pytest.approx(exact, abs=0.0501)


def test_the_table_of_latents_is_what_was_measured() -> None:
    measured = list(results("photo.json")["results"].values())
    table = rows(CARD, "model | latent")
    assert len(table) == len(measured)
    for (_, _, *shown), exact in zip(table, measured, strict=True):
        for text, name in zip(shown, ("psnr", "ssim", "ms_ssim", "lpips", "kl_bpp", "disk_bpp"), strict=True):
            if text != "-":
                assert float(text) == pytest.approx(exact[name], abs=0.5001 * 10.0 ** -len(text.split(".")[1]))


def test_files_stay_within_what_the_prior_says() -> None:
    """At most 1.01 times the ideal code length and 64 bytes, and ahead of JPEG between 0.25 and 0.8 bits per pixel."""
    found = results("photo-rd.json")
    for image in found["images"]:
        for row in image["rows"]:
            if row["ideal_bpp"] is not None:
                assert row["bytes"] <= 1.01 * row["ideal_bpp"] * image["pixels"] / 8 + 64
    assert all(gain["db"] > 0 for gain in found["against"]["JPEG"]["psnr_gains"])
    assert min(results("photo-coding.json")["results"]["files"]["context_saves"].values()) >= 0.18


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["photo-encode", "photo-decode"])
def test_the_readme_says_what_whole_commands_took(name: str) -> None:
    found = results(f"{name}.json")["results"]
    readme = (ROOT / "README.md").read_text()
    lines = {
        "encode --format safetensors": "| `encode --format safetensors`, 1,000 photographs |",
        "encode (.lc files)": "| `encode` to `.lc` files, 1,000 photographs |",
        "decode of latents to JPEG": "| `decode` of latents to JPEG, 500 |",
        "decode of latents to PNG": "| `decode` of latents to PNG, 500 |",
        "decode of .lc files to PNG": "| `decode` of `.lc` files to PNG, 500 |",
    }
    for command, row in found.items():
        if command not in lines:
            continue
        (line,) = (line for line in readme.splitlines() if line.startswith(lines[command]))
        share = next(value for key, value in row.items() if key.startswith("share") and not key.endswith("start"))
        after = next(value for key, value in row.items() if key.endswith("after_start"))
        for text in (f" {row['images_per_second']:.1f} |", f" {share:.0%}", f" {after:.0%} |"):
            assert text in line
