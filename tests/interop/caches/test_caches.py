"""Caches of other programs, each read by that program's own rules: what it then trains on is what the latents say."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.datasets import DatasetFolder

from latent_codec.model.codec import Codec
from tests.support.caches import PATHS, close, draws, flipped_draws, made, samples, scaled, store


@pytest.mark.parametrize("arch", ["sd", "sdxl", "flux"])
def test_kohya_finds_its_file_by_the_images_name_and_size(codec: Codec, tmp_path: Path, arch: str) -> None:
    latents = store(tmp_path / "z", codec, side=None)
    z, flipped = draws(latents), flipped_draws(latents)
    assert not made(latents, "kohya", tmp_path / "out", arch=arch).notes
    for entry in latents.entries:
        width, height = entry.geometry.width, entry.geometry.height
        path = tmp_path / "out" / f"{os.path.splitext(entry.path)[0]}_{width:04d}x{height:04d}_{arch}.npz"  # noqa: PTH122
        with np.load(path) as npz:
            bucket = 8 * z[entry.path].shape[2], 8 * z[entry.path].shape[1]
            end = f"_{bucket[1] // 8}x{bucket[0] // 8}" if arch == "flux" else ""
            expected = [scaled(codec, t) if arch == "flux" else t for t in (z[entry.path], flipped[entry.path])]
            for key, value in zip(("latents", "latents_flipped"), expected, strict=True):
                assert npz[key + end].dtype == np.float32 and close(npz[key + end], value)
            assert npz["original_size" + end].tolist() == [width, height]
            assert npz["crop_ltrb" + end].tolist() == [0, 0, width, height]


def test_kohyas_flux_latents_take_a_scale_that_is_given(codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", codec, ("a.png",))
    made(latents, "kohya", tmp_path / "out", arch="flux", scaling_factor=0.3611, shift_factor=0.1159)
    with np.load(tmp_path / "out" / "a_0016x0016_flux.npz") as npz:
        assert close(npz["latents_2x2"], (draws(latents)["a.png"] - 0.1159) * 0.3611)


def musubi_batch(path: Path) -> dict[str, torch.Tensor]:
    """How the trainer names what it reads: types go, and of latents the sizes."""
    found: dict[str, torch.Tensor] = {}
    for key, value in load_file(path).items():
        name = key.rsplit("_", 1)[0]
        found[name.rsplit("_", 1)[0] if name.startswith("latents_") else name] = value
    return found


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
    codec: Codec, tmp_path: Path, arch: str, name: str, frames: int, normalized: bool
) -> None:
    paths = ("a/one_two.png", "b/three.png")
    latents = store(tmp_path / "z", codec, paths, side=None)
    assert "mirrored images are left out" in made(latents, "musubi", tmp_path / "out", arch=arch).notes[0]
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob(f"*_{arch}.safetensors"):
        *words, size, _ = path.name.split("_")
        assert len(size) == 9
        found["_".join(words)] = musubi_batch(path)["latents"]
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert (metadata["architecture"], metadata["format_version"]) == (name, "1.0.1")
        assert [int(side) for side in size.split("x")] == [int(metadata[side]) for side in ("width", "height")]
    for path, z in draws(latents).items():
        expected = scaled(codec, z) if normalized else z
        assert close(found[Path(path).stem], expected[:, None] if frames else expected)
    assert len(found) == len(paths)


def test_comfyui_loads_raw_latents(codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", codec, side=None)
    made(latents, "comfyui", tmp_path / "out", seed=3, epoch=2)
    for path, z in draws(latents, 3, 2).items():
        found = load_file(tmp_path / "out" / f"{path}.latent")
        multiplier = 1.0 if "latent_format_version_0" in found else 1 / 0.18215
        assert close(found["latent_tensor"].float() * multiplier, z[None])


def test_lightningdit_indexes_shards_by_their_labels_and_normalises(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latent_codec.interop.caches.lightningdit._MOST_IMAGES", 3)
    latents = store(tmp_path / "z", codec)
    made(latents, "lightningdit", tmp_path / "out")
    z, flipped = draws(latents), flipped_draws(latents)
    rows: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            for i in range(file.get_slice("labels").get_shape()[0]):
                one = [file.get_slice(key)[i : i + 1] for key in ("latents", "latents_flip", "labels")]
                rows.append((one[0][0], one[1][0], int(one[2].squeeze(0))))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    for (one, other, label), entry in zip(rows, latents.entries, strict=True):
        assert torch.equal(one, z[entry.path]) and torch.equal(other, flipped[entry.path])
        assert latents.classes[label] == entry.label
    statistics = torch.load(tmp_path / "out" / "latents_stats.pt")
    everything = torch.stack([one for one, _, _ in rows])
    assert close(statistics["mean"], everything.mean(dim=[0, 2, 3], keepdim=True))
    assert close(statistics["std"], everything.std(dim=[0, 2, 3], keepdim=True))


class CachedFolder(DatasetFolder):
    """As MAR sets torchvision's up."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), loader=None, extensions=(".npz",))  # pyright: ignore

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        path, target = self.samples[index]
        with np.load(path) as data:
            return {key: data[key] for key in ("moments", "moments_flip")}, target


def test_mar_reads_a_folder_of_classes_with_means_before_log_variances(codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", codec, side=None)
    made(latents, "mar", tmp_path / "out")
    dataset = CachedFolder(tmp_path / "out")
    assert dataset.classes == list(latents.classes) and len(dataset) == len(latents)
    for i, (path, target) in enumerate(dataset.samples):
        index = [entry.path for entry in latents.entries].index(os.path.relpath(path, tmp_path / "out")[: -len(".npz")])
        assert target == latents.labels[index]
        for key, flip in (("moments", False), ("moments_flip", True)):
            mean, logvar = torch.from_numpy(dataset[i][0][key]).chunk(2, dim=0)
            expected = latents.posterior(index, flip=flip)
            assert torch.equal(mean, expected.mean[0]) and torch.equal(logvar, expected.logvar[0])


def test_edm2_sorts_a_zip_and_looks_labels_up_by_name(codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", codec)
    notes = made(latents, "edm2", tmp_path / "out").notes
    assert any("in [0.0, 1.0]" in note for note in notes) and any("raw_std=[1, 2, 0.5, 4]" in note for note in notes)
    with zipfile.ZipFile(tmp_path / "out" / "latents.zip") as file:
        names = sorted(name for name in file.namelist() if os.path.splitext(name)[1].lower() in (".npy", ".png"))  # noqa: PTH122
        labels = dict(json.loads(file.read("dataset.json"))["labels"])
        images = [np.load(io.BytesIO(file.read(name))) for name in names]
    assert np.array([labels[name] for name in names]).tolist() == latents.labels.tolist()
    assert len({image.shape for image in images}) == 1 and len(names) == len(latents)
    assert names[0] == "00000/img-mean-std-00000000.npy"
    for i, image in enumerate(images):
        mean, std = torch.from_numpy(image).float().chunk(2, dim=0)
        expected = latents.posterior(i)
        assert torch.equal(mean, expected.mean[0]) and close(std, expected.std[0])


def test_edm2_has_labels_for_all_images_or_for_none(codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", codec, ("a/a.png", "b.png"))
    assert "not every image has a class" in made(latents, "edm2", tmp_path / "out").notes[0]
    with zipfile.ZipFile(tmp_path / "out" / "latents.zip") as file:
        assert json.loads(file.read("dataset.json"))["labels"] is None


@pytest.mark.parametrize("scale", ["raw", "normalized"])
def test_webdataset_groups_members_by_key(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str
) -> None:
    monkeypatch.setattr("latent_codec.interop.caches.webdataset._IMAGES", 3)
    latents = store(tmp_path / "z", codec, ("a.png", *PATHS), side=None)
    made(latents, "webdataset", tmp_path / "out", scale=scale)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    found = [sample for shard in shards for sample in samples(shard)]
    assert len(shards) == 2 and [len(samples(shard)) for shard in shards] == [3, 2]
    z, flipped = draws(latents), flipped_draws(latents)
    for sample, entry, label in zip(found, latents.entries, latents.labels.tolist(), strict=True):
        one, other = (t[entry.path] if scale == "raw" else scaled(codec, t[entry.path]) for t in (z, flipped))
        assert close(sample["npy"], one) and close(sample["flip.npy"], other)
        assert sample.get("cls", -1) == label and sample["json"]["scale"] == scale
        assert sample["__key__"].rpartition("/")[0] == entry.path.rpartition("/")[0]
        assert (sample["json"]["width"], sample["json"]["height"]) == (entry.geometry.width, entry.geometry.height)


@pytest.mark.parametrize(("given", "factor"), [({"scale": "raw"}, 1.0), ({"scaling_factor": 0.2889}, 0.2889)])
def test_dc_ae_replaces_an_images_suffix(codec: Codec, tmp_path: Path, given: dict[str, Any], factor: float) -> None:
    latents = store(tmp_path / "z", codec, side=None)
    made(latents, "npy", tmp_path / "out", **{"scale": "normalized"} | given)
    for path, z in draws(latents).items():
        assert close(np.load(tmp_path / "out" / (path[: path.rfind(".")] + ".npy")), z * factor)
