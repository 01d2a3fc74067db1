"""Test the report in a real browser: it opens from the disk, requests nothing, and shows every picture."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latent_codec import cli

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
"""Otherwise playwright's own, which `playwright install chromium` fetches."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        path = CHROMIUM or driver.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("no chromium here; `playwright install chromium` fetches one")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_errors_requests_or_gaps(browser: Any, model_file: Path, tmp_path: Path, scheme: Any) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        image = Image.effect_mandelbrot((48, 40), (-2 + i / 4, -1.5, 1, 1.5), 99).convert("RGB")
        image.save(tmp_path / "photos" / f"{i}<script>document.title='broken'<b>.png", format="PNG")
    args = ["--report", "--out", str(tmp_path), "--lpips-net", "none", "--device", "cpu", "--bound-samples", "2"]
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["evaluate", str(model_file), str(tmp_path / "photos"), *args])
    written, said, requested = tmp_path / "report.html", [], []
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(written.as_uri())
        page.wait_for_load_state("load")
        pictures = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        assert len(pictures) > 50 and min(pictures) > 0
        assert page.evaluate("document.querySelectorAll('script').length") == 0
        assert page.title().endswith("photos") and len(page.locator("h2").all_inner_texts()) == 14
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables and rows scroll, not the page
        paper, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        levels = [sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) for colour in (paper, ink)]
        assert (levels[0] > levels[1]) == (scheme == "light") and abs(levels[0] - levels[1]) > 500
        page.close()
    assert said == [] and {url for url in requested if not url.startswith("data:")} == {written.as_uri()}
