"""A tiny codec with random weights, its model file, and pictures to feed it."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.file import LatentStatistics
from latent_codec.prior import factorized
from latent_codec.prior.context import ContextConfig
from latent_codec.prior.priors import Priors
from tests.support.data import WEIGHTS
from tests.support.networks import TINY_LITE, config_of, make_codec
from train.context_prior.network import ContextNet, logistic_tables

# Tests run side by side, one process a core (pytest-xdist), so each computes on one thread, and so do its children.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# CI draws the same examples every time; elsewhere new ones are tried. Nothing is timed.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

SQUEEZE = WEIGHTS / "squeezenet1_1_features.safetensors"
Draw = Callable[..., Path]


def files_of(folder: Path) -> dict[str, bytes]:
    """Read the files that a command made in a folder, by name, without its records in `.latent_codec`."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and ".latent_codec" not in f.parts]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def _statistics(images: int, **moments: tuple[float, ...]) -> LatentStatistics:
    return LatentStatistics(source="made up", images=images, **moments)


def _tiny_codec() -> Codec:
    codec = make_codec(config_of(TINY_LITE))
    mean, std = (0.5, -1.0, 0.0, 2.0), (1.0, 2.0, 0.5, 4.0)
    codec.statistics = _statistics(3, mean=mean, std=std, posterior_std=(0.5, 0.5, 0.25, 1.0))
    codec.provenance = {"note": "random weights"}
    codec.priors = _tiny_priors()
    return codec


@functools.cache
def _tiny_priors() -> Priors:
    """Make priors of latents with standard deviations of 1 to 10 steps, and a context network of random weights."""
    channel_steps = np.array([0.25, 0.125, 0.1, 0.2], np.float32)
    spread = torch.tensor([2.0, 0.5, 0.1, 0.5])[:, None]
    statistics = _statistics(1, mean=(0.0,) * 4, std=(2.0, 0.5, 0.1, 0.5), posterior_std=(1.0,) * 4)
    means = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)) * spread
    config = ContextConfig(groups=(1, 3), width=8, centred=True, levels=(2,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        context = ContextNet(config, channel_steps, statistics).freeze(logistic_tables())
    return Priors(channel_steps, factorized.fit(means, channel_steps), context)


@pytest.fixture
def codec() -> Codec:
    """A new one for each test, always with the same random weights; factor 8, 4 channels, posterior std about 1."""
    return _tiny_codec()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same codec as a float32 model file; not to be changed."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    _tiny_codec().save(path)
    return path


@pytest.fixture
def draw() -> Draw:
    """draw(path, width, height, mode="RGB", seed=0, **save_options): writes random pixels as an image."""

    def write(path: Path, width: int, height: int, mode: str = "RGB", seed: int = 0, **options: Any) -> Path:
        bands = len(mode.replace("P", "L"))
        values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
        image = Image.fromarray(values if bands > 1 else values[..., 0], mode.replace("P", "L"))
        if mode == "P":
            image.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
        return path

    return write


@pytest.fixture
def umask_027() -> Iterator[None]:
    """Files for the owner and, to read, the group: mode 0640."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def lpips() -> LPIPS:
    if not SQUEEZE.is_file():
        pytest.skip(f"no {SQUEEZE} here")
    return LPIPS("squeeze", SQUEEZE)
