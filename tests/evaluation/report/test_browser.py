"""The report in a real browser: it opens from the disk, asks for nothing, and every picture is there."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latent_codec import cli
from latent_codec.model.codec import Codec
from train.config.presets import mnist_vae

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
"""Otherwise playwright's own, which `playwright install chromium` fetches."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not here")
    with playwright.sync_playwright() as driver:
        path = CHROMIUM or driver.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("no chromium here; `playwright install chromium` fetches one")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=["lite", "mlp"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Path:
    """A report on a small model of photographs, or on one of binary digits, under names that try to break out."""
    folder = tmp_path_factory.mktemp("report")
    model, size, mode = model_file, (48, 40), "RGB"
    if request.param == "mlp":
        model, size, mode = folder / "mlp.safetensors", (28, 28), "L"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            Codec(mnist_vae().codec).save(model)
    for i in range(3):
        image = Image.effect_mandelbrot(size, (-2 + i / 4, -1.5, 1, 1.5), 99).convert(mode)
        path = folder / "photos" / f"{i}<script>document.title='broken'<b>.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path, format="PNG")
    args = ["--report", "--out", str(folder / "out"), "--lpips-net", "none", "--device", "cpu", "--bound-samples", "2"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", str(model), str(folder / "photos"), *args])
    assert stopped.value.code == 0
    return folder / "out" / "report.html"


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_an_error_a_request_or_a_missing_picture(
    browser: Any, written: Path, width: int, scheme: Any
) -> None:
    said: list[str] = []
    requested: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(written.as_uri())
    page.wait_for_load_state("load")
    assert said == []
    assert [url for url in requested if not url.startswith("data:")] == [written.as_uri()]
    assert "broken" not in page.title().split()[0] and page.title().endswith("photos")
    pictures = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(pictures) > 50 and min(pictures) > 0
    assert page.evaluate("document.querySelectorAll('script').length") == 0
    headings = page.locator("h2").all_inner_texts()
    assert headings[:3] == ["The model", "Reconstructions", "Samples of the prior"] and len(headings) == 14
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables and rows scroll, the page does not
    paper, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    levels = [sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) for colour in (paper, ink)]
    assert (levels[0] > levels[1]) == (scheme == "light") and abs(levels[0] - levels[1]) > 500
    page.close()
