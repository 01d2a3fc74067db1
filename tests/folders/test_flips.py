"""Test latents of mirrored images: encoding the mirrored file gives them, and they are half of the draws."""

import shutil
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
from tests.folders.test_latents import PAIRS, decode, encode
from tests.test_cli import Run, run  # noqa: F401 (a fixture)

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


def test_a_mirrored_posterior_is_that_of_the_mirrored_file(codec: Codec, tmp_path: Path, photos: Path) -> None:
    encode(codec, photos, tmp_path / "z", flips=True)
    encode(codec, mirror(photos, tmp_path / "mirrored"), tmp_path / "expected")
    found, expected = Latents(tmp_path / "z"), Latents(tmp_path / "expected")
    assert [e.path for e in found.entries] == sorted(SIZES) == [e.path for e in expected.entries]
    for i, entry in enumerate(found.entries):
        one, other, plain = found.posterior(i, flip=True), expected.posterior(i), found.posterior(i)
        assert torch.equal(one.mean, other.mean) and torch.equal(one.logvar, other.logvar)
        assert torch.equal(one.mean, plain.mean) == (entry.geometry.width == 1)


def test_the_images_themselves_are_stored_as_without_flips(codec: Codec, tmp_path: Path, photos: Path) -> None:
    for flips in (False, True):
        encode(codec, photos, tmp_path / f"{flips}", flips=flips)
        decode(codec, tmp_path / f"{flips}", tmp_path / f"{flips} decoded", sample=3)
    assert files_of(tmp_path / "False decoded") == files_of(tmp_path / "True decoded")
    plain, both = (load_file(stored_shards(tmp_path / f"{flips}")[0]) for flips in (False, True))
    assert set(both) == set(plain) | {name.replace(".", "_flip.") for name in plain}
    assert all(torch.equal(both[name], tensor) for name, tensor in plain.items())


def test_flips_are_another_setting(codec: Codec, tmp_path: Path, photos: Path) -> None:
    encode(codec, photos, tmp_path / "whole", resume=PAIRS, flips=True)
    assert encode(codec, photos, tmp_path / "whole", resume=PAIRS, flips=True).skipped == len(SIZES)
    assert encode(codec, photos, tmp_path / "z", resume=PAIRS).done == len(SIZES)
    assert encode(codec, photos, tmp_path / "z", resume=PAIRS, flips=True).done == len(SIZES)
    assert files_of(tmp_path / "z") == files_of(tmp_path / "whole")


def many(codec: Codec, folder: Path) -> Path:
    """Make latents with flips of 400 images of one size, which differ in their names alone."""
    values = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    (folder / "src").mkdir(parents=True)
    Image.fromarray(values).save(folder / "src" / "0.png")
    for i in range(1, 400):
        shutil.copy(folder / "src" / "0.png", folder / "src" / f"{i}.png")
    encode(codec, folder / "src", folder / "z", flips=True, store="float32")
    return folder / "z"


def test_half_of_the_draws_are_mirrored_by_seed_epoch_and_path_alone(codec: Codec, tmp_path: Path) -> None:
    folder = many(codec, tmp_path)
    chosen: dict[tuple[int, int], torch.Tensor] = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        plain, latents = Latents(folder, seed=seed), Latents(folder, seed=seed, flip=True)
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


def test_which_are_mirrored_does_not_depend_on_the_noise(codec: Codec, tmp_path: Path) -> None:
    latents = Latents(many(codec, tmp_path), flip=True)
    rows = BatchIndices(tuple(range(400)), 0)
    moments = latents.moments(rows)
    flipped = (moments.mean == latents.posterior(0, flip=True).mean).flatten(1).all(1)
    noise = (latents.draw(moments) - moments.mean) / torch.exp(0.5 * moments.logvar)  # (400, z, h, w)
    means = torch.stack([noise[flipped].mean(0), noise[~flipped].mean(0)])
    assert means.abs().max() < 4.5 / 150**0.5


def test_latents_without_flips_are_refused_with_the_remedy(codec: Codec, tmp_path: Path, photos: Path) -> None:
    encode(codec, photos, tmp_path / "z")
    with pytest.raises(UserError, match="no latents of mirrored images; encode with --flips"):
        Latents(tmp_path / "z", flip=True)
    with pytest.raises(UserError, match="holds no tensor mean_flip"):
        Latents(tmp_path / "z").posterior(0, flip=True)


def test_memory_for_one_batch_is_enough(
    codec: Codec, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: list[int] = []
    real = codec.encode

    def count(pixels: torch.Tensor, labels: torch.Tensor) -> object:
        largest.append(len(pixels))
        return real(pixels, labels)

    monkeypatch.setattr(codec, "encode", count)
    encode(codec, photos, tmp_path / "z", ComputeOptions(batch_size=2, workers=1), flips=True)
    assert max(largest) == 2 and sum(largest) == 2 * len(SIZES)
