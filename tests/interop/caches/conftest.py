"""Share latents among the tests of caches; they are not to be changed."""

from pathlib import Path

import pytest

from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.support.caches import store


@pytest.fixture(scope="session")
def shared_codec(model_file: Path) -> Codec:
    return Codec.load(model_file)


@pytest.fixture(scope="session")
def latents(shared_codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """Make latents of square images in two classes, with flips."""
    return store(tmp_path_factory.mktemp("latents") / "square", shared_codec)


@pytest.fixture(scope="session")
def mixed(shared_codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """Make latents of images of two sizes in two classes, with flips."""
    found = store(tmp_path_factory.mktemp("latents") / "mixed", shared_codec, side=None)
    assert len(set(found.shapes)) == 2
    return found
