"""Share images and whole runs among the tests of training."""

from pathlib import Path

import pytest

from tests.support.run import run, write_images


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight images, which no test changes."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def straight(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run one process with a module's `argv` from the first step to the last."""
    out = tmp_path_factory.mktemp("straight") / "run"
    (out.parent / "text").write_text(run(argv, out))
    return out
