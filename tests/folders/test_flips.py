"""Test latents of mirrored images: encoding the mirrored file gives them, and they are half of the draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latent_codec.errors import UserError
from latent_codec.inference.options import ComputeOptions
from latent_codec.latents.batches import BatchIndices, ShapeBatches
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import stored_shards
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.folders.test_latents import decode, encode

SIZES = {"a.png": (17, 9), "b/c.png": (16, 16), "b/d.png": (1, 1), "e.png": (23, 8), "f.png": (16, 16)}


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for seed, (name, size) in enumerate(SIZES.items()):
        draw(tmp_path / "photos" / name, *size, seed=seed)
    return tmp_path / "photos"


def mirror(src: Path, dst: Path) -> Path:
    """Write a folder's images mirrored."""
    for path in src.rglob("*.png"):
        target = dst / path.relative_to(src)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(np.asarray(Image.open(path))[:, ::-1])).save(target)
    return dst


def test_mirrored_posteriors_are_those_of_the_mirrored_files_and_the_images_own_stay(
    codec: Codec, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: list[int] = []
    real = codec.encode
    monkeypatch.setattr(codec, "encode", lambda x, labels: largest.append(len(x)) or real(x, labels))
    compute = ComputeOptions(batch_size=2, workers=1)
    encode(codec, photos, tmp_path / "both", compute, flips=True)
    assert max(largest) == 2 and sum(largest) == 2 * len(SIZES)  # memory for one batch is enough
    encode(codec, photos, tmp_path / "plain", compute)
    encode(codec, mirror(photos, tmp_path / "mirrored"), tmp_path / "expected", compute)
    found, expected = Latents(tmp_path / "both"), Latents(tmp_path / "expected")
    assert [e.path for e in found.entries] == sorted(SIZES) == [e.path for e in expected.entries]
    for i, entry in enumerate(found.entries):
        one, other, plain = found.posterior(i, flip=True), expected.posterior(i), found.posterior(i)
        assert torch.equal(one.mean, other.mean) and torch.equal(one.logvar, other.logvar)
        assert torch.equal(one.mean, plain.mean) == (entry.geometry.width == 1)
    plain, both = (load_file(stored_shards(tmp_path / name)[0]) for name in ("plain", "both"))
    assert set(both) == set(plain) | {name.replace(".", "_flip.") for name in plain}
    assert all(torch.equal(both[name], tensor) for name, tensor in plain.items())
    for name in ("plain", "both"):
        decode(codec, tmp_path / name, tmp_path / f"{name} decoded", sample=3)
    assert files_of(tmp_path / "plain decoded") == files_of(tmp_path / "both decoded")
    with pytest.raises(UserError, match="no latents of mirrored images; encode with --flips"):
        Latents(tmp_path / "plain", flip=True)
    with pytest.raises(UserError, match="holds no tensor mean_flip"):
        Latents(tmp_path / "plain").posterior(0, flip=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Path:
    """Return latents with flips of 400 images of one size, which differ in their names alone."""
    folder = tmp_path_factory.mktemp("many")
    values = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    (folder / "src").mkdir()
    Image.fromarray(values).save(folder / "src" / "0.png")
    for i in range(1, 400):
        (folder / "src" / f"{i}.png").hardlink_to(folder / "src" / "0.png")
    encode(Codec.load(model_file), folder / "src", folder / "z", flips=True, store="float32")
    return folder / "z"


@pytest.mark.slow
def test_half_of_the_draws_are_mirrored_by_seed_epoch_and_path_alone(many: Path) -> None:
    chosen: dict[tuple[int, int], torch.Tensor] = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        plain, latents = Latents(many, seed=seed), Latents(many, seed=seed, flip=True)
        flipped = torch.zeros(len(latents), dtype=torch.bool)
        for rows in ShapeBatches(latents.shapes, 50, seed=epoch):
            rows = rows._replace(epoch=epoch)
            batch, moments, unflipped = latents[rows], latents.moments(rows), plain[rows]
            for place, index in enumerate(rows.indices):
                flipped[index] = bool((moments.mean[place] == latents.posterior(index, flip=True).mean[0]).all())
                assert torch.equal(batch.z[place], unflipped.z[place]) != bool(flipped[index])
        latents.set_epoch(epoch)
        alone = [latents.moments(BatchIndices((i,), epoch)).mean[0] for i in range(0, 400, 80)]
        assert all(
            torch.equal(mean, latents.posterior(80 * i, flip=bool(flipped[80 * i])).mean[0])
            for i, mean in enumerate(alone)
        )
        chosen[seed, epoch] = flipped
    for flipped in chosen.values():
        assert abs(int(flipped.sum()) - 200) < 40  # four standard deviations
    first, *others = chosen.values()
    assert all(abs(int((first ^ other).sum()) - 200) < 40 for other in others)


def test_which_are_mirrored_does_not_depend_on_the_noise(many: Path) -> None:
    latents = Latents(many, flip=True)
    rows = BatchIndices(tuple(range(400)), 0)
    moments = latents.moments(rows)
    flipped = (moments.mean == latents.posterior(0, flip=True).mean).flatten(1).all(1)
    noise = (latents.draw(moments) - moments.mean) / torch.exp(0.5 * moments.logvar)  # (400, z, h, w)
    means = torch.stack([noise[flipped].mean(0), noise[~flipped].mean(0)])
    assert means.abs().max() < 4.5 / 150**0.5
