"""Draw the images that tests of evaluations share."""

from pathlib import Path

import pytest

from tests.conftest import Draw

SIZES = {"a.png": (24, 16), "b/c.png": (17, 33), "d.png": (9, 7), "e.png": (40, 40)}


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i, (name, size) in enumerate(SIZES.items()):
        draw(tmp_path / "photos" / name, *size, seed=i)
    return tmp_path / "photos"
