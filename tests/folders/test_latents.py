"""Test folders of latents: exact sizes, no image lost, noise from (seed, path) alone, half of the draws mirrored."""

import json
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_codec.folders.jobs import OVERWRITE
from latent_codec.images.buckets import ResizeOptions
from latent_codec.images.geometry import Resized
from latent_codec.images.sources import Source
from latent_codec.inference.options import ComputeOptions
from latent_codec.latents.batches import BatchIndices, ShapeBatches
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import INDEX, stored_files, stored_shards
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.support.errors import refused
from tests.support.folder import assert_told, black_and_grey, greatest_difference, images, make, small_units
from tests.support.latents import geometry

encode, decode = partial(make, "latents"), partial(make, "images of latents")
ORIENTATION = 0x0112


# Every width and every height from 1 to 18, and long thin images.
SIZES = sorted({(i, 19 - i) for i in range(1, 19)} | {(7, 9), (1, 1), (8, 8), (17, 16), (1, 40), (40, 1)})
MODES = [("L", "png"), ("L", "jpg"), ("LA", "png"), ("RGB", "png"), ("RGBA", "png"), ("RGBA", "webp"), ("P", "gif")]


def test_images_come_back_upright_in_their_exact_size_and_grey_or_rgb(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    src, expected = tmp_path / "src", {}
    for width, height in SIZES:
        draw(src / f"{width}x{height}.png", width, height)
        expected[f"{width}x{height}.png"] = (width, height), "RGB", None, 1
    for mode, suffix in MODES:
        draw(src / f"{mode}.{suffix}", 11, 9, mode)
        background = "#ffffff" if "A" in mode else None
        expected[f"{mode}.{suffix}"] = (11, 9), "L" if mode.startswith("L") else "RGB", background, 1
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        draw(src / f"{orientation}.jpg", 21, 10, exif=exif)
        expected[f"{orientation}.jpg"] = (10, 21) if orientation >= 5 else (21, 10), "RGB", None, orientation
    assert not encode(codec, src, tmp_path / "latents").failures
    assert not decode(codec, tmp_path / "latents", tmp_path / "decoded").failures
    found, geometry = images(tmp_path / "decoded"), {e.path: e.geometry for e in Latents(tmp_path / "latents").entries}
    assert found.keys() == {f"{name}.png" for name in expected}
    for name, result in expected.items():
        image, stored = found[f"{name}.png"], geometry[name]
        assert (image.size, image.mode, stored.background, stored.orientation) == result
        assert image.getexif().get(ORIENTATION, 1) == 1  # not turned a second time


def test_resized_images_are_made_again_by_other_sizes_and_only_they_say_so(
    codec: Codec, tmp_path: Path, draw: Draw
) -> None:
    draw(tmp_path / "src" / "a" / "x.png", 90, 60)
    with tarfile.open(tmp_path / "src.tar", "w") as archive:
        archive.add(tmp_path / "src" / "a" / "x.png", "a/x.png")
    plain = tmp_path / "plain"
    assert encode(codec, tmp_path / "src", plain).done == 1
    assert "resized" not in (plain / INDEX).read_text()
    resize = ResizeOptions(size=(32, 32), crop=True)
    resized = geometry(32, 32, resized=Resized(original_size=(90, 60), crop_ltrb=(8, 0, 40, 32)))
    for name in ("src", "src.tar"):
        first, second = (encode(codec, tmp_path / name, tmp_path / f"{name}.z", resize=resize) for _ in range(2))
        assert (first.done, second.skipped) == (1, 1)
        assert [entry.geometry for entry in Latents(tmp_path / f"{name}.z").entries] == [resized]
    assert encode(codec, tmp_path / "src", plain, resize=ResizeOptions(buckets="64")).done == 1
    assert Latents(plain).shapes == [(6, 10)]
    decode(codec, plain, tmp_path / "out")
    assert [image.size for image in images(tmp_path / "out").values()] == [(80, 48)]


def test_what_is_stored_is_the_posterior_on_the_background(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    a = draw(tmp_path / "src" / "a.png", 16, 8)
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "src" / "b.png")
    encode(codec, tmp_path / "src", tmp_path / "latents", store="float32", background="#102030")
    for i, image in enumerate([Image.open(a), Image.new("RGB", (8, 8), "#102030")]):
        with torch.inference_mode():
            expected = codec.encode(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None])
        found = Latents(tmp_path / "latents").posterior(i)
        assert torch.allclose(found.mean, expected.mean, atol=1e-6)
        assert torch.allclose(found.logvar, expected.logvar, atol=1e-6)


def test_noise_depends_on_seed_and_path_alone(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    for i in range(5):
        draw(tmp_path / "all" / f"{i}.png", 24, 16, seed=i // 2)
    draw(tmp_path / "all" / "large.png", 40, 40)
    encode(codec, tmp_path / "all", tmp_path / "all latents")
    encode(codec, tmp_path / "all" / "3.png", tmp_path / "one latents", ComputeOptions(batch_size=1, workers=1))
    ways = {"batch of 1": ("all", 1, 1, 7), "batch of 4": ("all", 4, 1, 7), "3 workers": ("all", 4, 3, 7)}
    ways |= {"alone": ("one", 4, 1, 7), "other seed": ("all", 4, 1, 8), "mode": ("all", 4, 1, None)}
    for name, (which, batch, workers, seed) in ways.items():
        torch.manual_seed(len(name))  # the global state plays no part
        compute = ComputeOptions(batch_size=batch, workers=workers)
        decode(codec, tmp_path / f"{which} latents", tmp_path / name, compute, sample=seed)
    first = tmp_path / "batch of 1" / "3.png.png"
    for name in ("batch of 4", "3 workers", "alone"):
        assert greatest_difference(first, tmp_path / name / "3.png.png") <= 1  # rounding, of convolutions in batches
    for name in ("other seed", "mode"):
        assert greatest_difference(first, tmp_path / name / "3.png.png") > 10
    assert greatest_difference(tmp_path / "mode" / "2.png.png", tmp_path / "mode" / "3.png.png") <= 1  # one picture
    assert greatest_difference(tmp_path / "batch of 1" / "2.png.png", first) > 10


REASONS = {
    "truncated.jpg": "damaged or cut off",
    "text.png": "not a readable image",
    "empty.webp": "the file is empty",
    "bomb.png": "3000x2000 = 6000000 pixels exceed the limit of 1000000",
    "plugin.png": "ZeroDivisionError: in some plugin",
}


def test_bad_images_are_reported_by_name_and_reason_and_the_rest_goes_on(
    codec: Codec, tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src, read = tmp_path / "src", Source.read_bytes
    for name in ("a.png", "m.png", "plugin.png", "z.png"):
        draw(src / name, 20, 12)
    whole = draw(src / "truncated.jpg", 64, 64).read_bytes()
    (src / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (src / "text.png").write_text("no picture")
    (src / "empty.webp").write_bytes(b"")
    Image.new("1", (3000, 2000)).save(src / "bomb.png")

    def surprise(source: Source) -> bytes:
        if source.name == "plugin.png":
            raise ZeroDivisionError("in some plugin")
        return read(source)

    monkeypatch.setattr(Source, "read_bytes", surprise)
    summary = encode(codec, src, tmp_path / "latents", max_pixels=10**6)
    assert (summary.found, summary.done) == (8, 3)
    assert_told(summary, REASONS, capsys.readouterr().err)
    decode(codec, tmp_path / "latents", tmp_path / "out")
    assert images(tmp_path / "out").keys() == {"a.png.png", "m.png.png", "z.png.png"}


def test_latents_that_do_not_fit_the_stored_type_fail_alone(codec: Codec, tmp_path: Path) -> None:
    codec.state_dict()["backbone.linear.encoder.weight"].fill_(1e3)  # black becomes -192,000, middle grey 753
    summary = encode(codec, black_and_grey(tmp_path / "src"), tmp_path / "latents")
    assert summary.failures.keys() == {"black.png"} and "--store float32" in summary.failures["black.png"]
    assert encode(codec, tmp_path / "src", tmp_path / "wide", store="float32").done == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_coarse_networks_still_give_float32_posteriors(codec: Codec, tmp_path: Path, draw: Draw, dtype: Any) -> None:
    draw(tmp_path / "a.png", 16, 16)
    encode(codec, tmp_path / "a.png", tmp_path / "fine", store="float32")
    encode(codec, tmp_path / "a.png", tmp_path / "coarse", ComputeOptions(dtype=dtype), store="float32")
    fine, coarse = (Latents(tmp_path / name).posterior(0).mean for name in ("fine", "coarse"))
    assert not torch.equal(coarse, coarse.to(getattr(torch, dtype)).float())  # not rounded to the networks' type
    assert torch.allclose(fine, coarse, atol=0.02)


@pytest.fixture
def latents(codec: Codec, tmp_path: Path, draw: Draw) -> Path:
    """Return latents of a.png and b.png (16x16) in one shard and c.png (24x16) in another."""
    for name, width in (("a", 16), ("b", 16), ("c", 24)):
        draw(tmp_path / "src" / f"{name}.png", width, 16)
    encode(codec, tmp_path / "src", tmp_path / "latents", resume=small_units(2))
    return tmp_path / "latents"


def test_images_that_a_shard_holds_otherwise_fail_alone(codec: Codec, tmp_path: Path, latents: Path) -> None:
    shard = latents / next(e.shard for e in Latents(latents).entries if e.path == "a.png")
    first_row = {name: tensor[:1].clone() for name, tensor in load_file(shard).items()}
    more_channels, both = {name: torch.cat([t, t, t], 1) for name, t in first_row.items()}, {"a.png", "b.png"}
    changes = {
        "missing": (lambda: shard.unlink(), both),
        "text": (lambda: shard.write_bytes(b"text"), both),
        "a row less": (lambda: save_file(first_row, shard), {"b.png"}),
        "other channels": (lambda: save_file(more_channels, shard), both),
    }
    for name, (change, failures) in changes.items():
        change()
        assert decode(codec, latents, tmp_path / name).failures.keys() == failures
        assert images(tmp_path / name).keys() == {f"{name}.png" for name in {*both, "c.png"} - failures}


def test_tampered_latents_and_those_of_other_models_are_refused(codec: Codec, tmp_path: Path, latents: Path) -> None:
    text = (latents / INDEX).read_text()
    before = sorted(tmp_path.rglob("*"))
    for path in ("/evil.png", "../evil.png", "x/../../evil.png"):
        index = json.loads(text)
        index["entries"][0]["path"] = path
        (latents / INDEX).write_text(json.dumps(index))
        refused("unsafe name", decode, codec, latents, tmp_path / "out")
    (latents / INDEX).write_text(text)
    codec.state_dict()["backbone.linear.encoder.bias"][0] += 1
    refused(r"made by model .* give the right one with --model", decode, codec, latents, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_latents_are_refused_unless_to_be_overwritten(codec: Codec, tmp_path: Path, latents: Path) -> None:
    (tmp_path / "src" / "c.png").unlink()
    shutil.rmtree(latents / ".latent_codec")
    before = files_of(latents)
    refused("no such image", encode, codec, tmp_path / "none", latents, resume=OVERWRITE)
    for _ in range(2):
        refused(r"holds latents already.*--overwrite", encode, codec, tmp_path / "src", latents)
        assert files_of(latents) == before
        (latents / INDEX).unlink(missing_ok=True)  # as a killed process leaves them
        before.pop(INDEX, None)
    encode(codec, tmp_path / "src", latents, resume=OVERWRITE)
    assert [e.path for e in Latents(latents).entries] == ["a.png", "b.png"] and len(stored_files(latents)) == 2


# Latents of mirrored images: encoding the mirrored file gives them.


TO_MIRROR = {"a.png": (17, 9), "b/c.png": (16, 16), "b/d.png": (1, 1), "e.png": (23, 8), "f.png": (16, 16)}


def mirrored(src: Path) -> Path:
    """Write a folder's images mirrored into another."""
    copy = shutil.copytree(src, src.with_name("mirrored"))
    for path in copy.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    return copy


def test_mirrored_posteriors_are_those_of_the_mirrored_files_and_the_images_own_stay(
    codec: Codec, tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    for seed, (name, size) in enumerate(TO_MIRROR.items()):
        draw(photos / name, *size, seed=seed)
    largest: list[int] = []
    real = codec.encode
    monkeypatch.setattr(codec, "encode", lambda x, labels: largest.append(len(x)) or real(x, labels))
    compute = ComputeOptions(batch_size=2, workers=1)
    encode(codec, photos, tmp_path / "both", compute, flips=True)
    assert max(largest) == 2 and sum(largest) == 2 * len(TO_MIRROR)  # memory for one batch is enough
    encode(codec, photos, tmp_path / "plain", compute)
    encode(codec, mirrored(photos), tmp_path / "expected", compute)
    found, expected = Latents(tmp_path / "both"), Latents(tmp_path / "expected")
    assert [e.path for e in found.entries] == sorted(TO_MIRROR) == [e.path for e in expected.entries]
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
    refused("no latents of mirrored images; encode with --flips", Latents, tmp_path / "plain", flip=True)
    refused("holds no tensor mean_flip", Latents(tmp_path / "plain").posterior, 0, flip=True)


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
        for i in range(0, 400, 80):
            alone = latents.moments(BatchIndices((i,), epoch))
            assert torch.equal(alone.mean, latents.posterior(i, flip=bool(flipped[i])).mean)
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
