"""Check that each program, by its own way of reading, trains on what the latents say."""

import dataclasses
import io
import json
import os
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.datasets import DatasetFolder

from latent_codec.images.buckets import ResizeOptions
from latent_codec.images.geometry import Resized
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.read import read_cache
from latent_codec.interop.caches.registry import CacheName
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.conftest import Draw
from tests.support.caches import EVERY, PATHS, close, draws, flipped_draws, made, samples, scaled, store
from tests.support.folder import make
from tests.support.latents import geometry, row_of, write


def test_every_registered_format_is_tested() -> None:
    assert set(EVERY) == set(get_args(CacheName))


@pytest.mark.parametrize("arch", ["sd", "sd3", "flux"])
def test_kohya_finds_its_file_by_the_images_name_and_size(mixed: Latents, tmp_path: Path, arch: str) -> None:
    z, flipped = draws(mixed), flipped_draws(mixed)
    made(mixed, "kohya", tmp_path / "out", arch=arch)
    for entry in mixed.entries:
        width, height = entry.geometry.width, entry.geometry.height
        path = tmp_path / "out" / f"{PurePosixPath(entry.path).with_suffix('')}_{width:04d}x{height:04d}_{arch}.npz"
        with np.load(path) as npz:
            end = "" if arch == "sd" else f"_{z[entry.path].shape[1]}x{z[entry.path].shape[2]}"
            expected = [scaled(mixed, t) if arch == "flux" else t for t in (z[entry.path], flipped[entry.path])]
            for key, value in zip(("latents", "latents_flipped"), expected, strict=True):
                assert npz[key + end].dtype == np.float32 and close(npz[key + end], value)
            assert npz["original_size" + end].tolist() == [width, height]
            assert npz["crop_ltrb" + end].tolist() == [0, 0, width, height]


def test_a_resized_image_has_its_own_size_in_names_and_keys(shared_codec: Codec, tmp_path: Path) -> None:
    """kohya's and musubi-tuner's loaders look for the size of the image file, and musubi-tuner's knows no EXIF."""
    resized = Resized(original_size=(150, 200), crop_ltrb=(0, 10, 64, 74))
    row = row_of("a.jpg", "float16", side=64)
    shape = geometry(64, 64, orientation=6, resized=resized)
    row = row._replace(entry=dataclasses.replace(row.entry, geometry=shape))
    latents = write(tmp_path / "z", shared_codec, [row], "float16")
    turned = r"1 image, a\.jpg \(64x64\), is turned by EXIF"
    notes = made(latents, "kohya", tmp_path / "kohya", arch="sdxl").notes
    notes += made(latents, "musubi", tmp_path / "musubi", arch="zi").notes
    assert [bool(re.match(turned, note)) for note in notes] == [True, True]
    with np.load(tmp_path / "kohya" / "a_0150x0200_sdxl.npz") as npz:
        assert npz["original_size"].tolist() == [150, 200] and npz["crop_ltrb"].tolist() == [8, 0, 56, 64]
    with safe_open(tmp_path / "musubi" / "a_0200x0150_zi.safetensors", framework="pt") as file:
        assert [file.metadata()[side] for side in ("width", "height")] == ["200", "150"]
    back = read_cache(tmp_path / "kohya", tmp_path / "back", "kohya", shared_codec, CacheOptions(arch="sdxl"))
    assert not back.summary.failures and Latents(tmp_path / "back").entries[0].geometry == shape


def test_musubi_stacks_the_latents_of_its_buckets(shared_codec: Codec, tmp_path: Path, draw: Draw) -> None:
    """Its loader takes the bucket from the size in a file's name, and these are `resolution = [64, 64]`'s."""
    buckets = {(90, 60): (80, 48), (60, 90): (48, 80), (481, 321): (80, 48), (50, 50): (64, 64), (10, 100): (32, 128)}
    for width, height in buckets:
        draw(tmp_path / "photos" / f"{width}.png", width, height)
    make("latents", shared_codec, tmp_path / "photos", tmp_path / "z", resize=ResizeOptions(buckets="64"))
    assert not made(Latents(tmp_path / "z"), "musubi", tmp_path / "out", arch="zi").notes
    for (width, height), (wide, tall) in buckets.items():
        (latents,) = load_file(tmp_path / "out" / f"{width}_{width:04d}x{height:04d}_zi.safetensors").values()
        assert latents.shape == (4, tall // 8, wide // 8)


@pytest.mark.parametrize(
    ("to", "arch", "side", "step"),
    [("kohya", "sd", 96, 64), ("kohya", "sdxl", 80, 32), ("musubi", "zi", 24, 16), ("kohya", "sdxl", 96, None)],
)
def test_sizes_of_no_bucket_are_told_once(
    shared_codec: Codec, tmp_path: Path, to: CacheName, arch: str, side: int, step: int | None
) -> None:
    notes = made(store(tmp_path / "z", shared_codec, side=side, flips=False), to, tmp_path / "out", arch=arch).notes
    told = rf"4 images, such as cat/a\.jpg \({side}x{side}\), are of .* multiples of {step}: .* --buckets "
    assert [bool(re.match(told, note)) for note in notes] == ([] if step is None else [True])


def test_kohyas_flux_latents_take_a_scale_that_is_given(latents: Latents, tmp_path: Path) -> None:
    made(latents, "kohya", tmp_path / "out", arch="flux", scaling_factor=0.3611, shift_factor=0.1159)
    with np.load(tmp_path / "out" / "cat" / "a_0016x0016_flux.npz") as npz:
        assert close(npz["latents_2x2"], (draws(latents)["cat/a.jpg"] - 0.1159) * 0.3611)


@pytest.mark.parametrize(
    ("arch", "name", "frames", "normalized"),
    [
        ("hv", "hunyuan_video", 1, False),
        ("qi", "qwen_image", 1, True),
        ("zi", "z_image", 0, False),
        ("f2d", "flux_2_dev", 0, True),
    ],
)
def test_musubi_lists_one_folder_and_takes_size_and_name_from_it(
    shared_codec: Codec, tmp_path: Path, arch: str, name: str, frames: int, normalized: bool
) -> None:
    latents = store(tmp_path / "z", shared_codec, ("a/one_two.png", "b/three.png"), side=None)
    assert "mirrored images are left out" in made(latents, "musubi", tmp_path / "out", arch=arch).notes[0]
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob(f"*_{arch}.safetensors"):
        *words, size, _ = path.name.split("_")
        assert len(size) == 9
        ((key, found["_".join(words)]),) = load_file(path).items()
        assert key.rsplit("_", 2)[0] == "latents"  # the trainer drops the type and the size
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert (metadata["architecture"], metadata["format_version"]) == (name, "1.0.1")
        assert [int(side) for side in size.split("x")] == [int(metadata[side]) for side in ("width", "height")]
    assert len(found) == 2
    for path, z in draws(latents).items():
        expected = scaled(latents, z) if normalized else z
        assert close(found[Path(path).stem], expected[:, None] if frames else expected)


def test_comfyui_loads_raw_latents(mixed: Latents, tmp_path: Path) -> None:
    made(mixed, "comfyui", tmp_path / "out", seed=3, epoch=2)
    for path, z in draws(mixed, 3, 2).items():
        found = load_file(tmp_path / "out" / f"{path}.latent")
        multiplier = 1.0 if "latent_format_version_0" in found else 1 / 0.18215
        assert close(found["latent_tensor"].float() * multiplier, z[None])


def test_lightningdit_indexes_shards_by_their_labels_and_normalises(latents: Latents, tmp_path: Path) -> None:
    made(latents, "lightningdit", tmp_path / "out", shard_images=3)
    z, flipped = draws(latents), flipped_draws(latents)
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(shards) == 2
    one, other, labels = (torch.cat([s[key] for s in shards]) for key in ("latents", "latents_flip", "labels"))
    for i, entry in enumerate(latents.entries):
        assert torch.equal(one[i], z[entry.path]) and torch.equal(other[i], flipped[entry.path])
        assert latents.classes[labels[i]] == entry.label
    statistics = torch.load(tmp_path / "out" / "latents_stats.pt")
    assert close(statistics["mean"], one.mean(dim=[0, 2, 3], keepdim=True))
    assert close(statistics["std"], one.std(dim=[0, 2, 3], keepdim=True))


def test_mar_reads_a_folder_of_classes_with_means_before_log_variances(mixed: Latents, tmp_path: Path) -> None:
    made(mixed, "mar", tmp_path / "out")
    dataset = DatasetFolder(str(tmp_path / "out"), loader=np.load, extensions=(".npz",))
    assert dataset.classes == list(mixed.classes) and len(dataset) == len(mixed)
    for path, target in dataset.samples:
        index = [entry.path for entry in mixed.entries].index(os.path.relpath(path, tmp_path / "out")[: -len(".npz")])
        assert target == mixed.labels[index]
        for key, flip in (("moments", False), ("moments_flip", True)):
            mean, logvar = torch.from_numpy(np.load(path)[key]).chunk(2, dim=0)
            expected = mixed.posterior(index, flip=flip)
            assert torch.equal(mean, expected.mean[0]) and torch.equal(logvar, expected.logvar[0])


def test_edm2_sorts_a_zip_and_looks_labels_up_by_name(latents: Latents, tmp_path: Path) -> None:
    notes = made(latents, "edm2", tmp_path / "out").notes
    assert any("in [0.0, 1.0]" in note for note in notes) and any("raw_std=[1, 2, 0.5, 4]" in note for note in notes)
    with zipfile.ZipFile(tmp_path / "out" / "latents.zip") as file:
        names = sorted(name for name in file.namelist() if name.lower().endswith((".npy", ".png")))
        labels = dict(json.loads(file.read("dataset.json"))["labels"])
        images = [np.load(io.BytesIO(file.read(name))) for name in names]
    assert [labels[name] for name in names] == latents.labels.tolist()
    assert len(names) == len(latents) and names[0] == "00000/img-mean-std-00000000.npy"
    for i, image in enumerate(images):
        mean, std = torch.from_numpy(image).float().chunk(2, dim=0)
        expected = latents.posterior(i)
        assert torch.equal(mean, expected.mean[0]) and close(std, expected.std[0])


def test_edm2_has_labels_for_all_images_or_for_none(shared_codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", shared_codec, ("a/a.png", "b.png"))
    assert any("not every image has a class" in note for note in made(latents, "edm2", tmp_path / "out").notes)
    with zipfile.ZipFile(tmp_path / "out" / "latents.zip") as file:
        assert json.loads(file.read("dataset.json"))["labels"] is None


@pytest.mark.parametrize("scale", ["raw", "normalized"])
def test_webdataset_groups_members_by_key(shared_codec: Codec, tmp_path: Path, scale: str) -> None:
    latents = store(tmp_path / "z", shared_codec, ("a.png", *PATHS), side=None)
    made(latents, "webdataset", tmp_path / "out", scale=scale, shard_images=3)
    shards = [samples(shard) for shard in sorted((tmp_path / "out").glob("*.tar"))]
    assert [len(shard) for shard in shards] == [3, 2]
    z, flipped = draws(latents), flipped_draws(latents)
    for sample, entry, label in zip(
        [s for shard in shards for s in shard], latents.entries, latents.labels.tolist(), strict=True
    ):
        one, other = (t[entry.path] if scale == "raw" else scaled(latents, t[entry.path]) for t in (z, flipped))
        assert close(sample["npy"], one) and close(sample["flip.npy"], other)
        assert sample.get("cls", -1) == label and sample["json"]["scale"] == scale
        assert sample["__key__"].rpartition("/")[0] == entry.path.rpartition("/")[0]
        assert (sample["json"]["width"], sample["json"]["height"]) == (entry.geometry.width, entry.geometry.height)


@pytest.mark.parametrize(("given", "factor"), [({"scale": "raw"}, 1.0), ({"scaling_factor": 0.2889}, 0.2889)])
def test_dc_ae_replaces_an_images_suffix(mixed: Latents, tmp_path: Path, given: dict[str, Any], factor: float) -> None:
    made(mixed, "npy", tmp_path / "out", **{"scale": "normalized"} | given)
    for path, z in draws(mixed).items():
        assert close(np.load(tmp_path / "out" / (path[: path.rfind(".")] + ".npy")), z * factor)
