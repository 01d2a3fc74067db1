"""Check that caches become latents again: whole where they hold moments, other programs' files as they say they are."""

import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latent_codec.errors import UserError
from latent_codec.images.geometry import Resized
from latent_codec.interop.caches import read as read_module
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.read import read_cache
from latent_codec.interop.caches.registry import CacheName
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import stored_files
from latent_codec.model.codec import Codec
from tests.conftest import files_of
from tests.images.test_sources import tar
from tests.support.caches import EVERY, PATHS, close, draws, flipped_draws, made, store
from tests.support.errors import refused

SINGLE = [name for name in EVERY if name not in ("mar", "edm2")]
NAMELESS = "npy"
"""Its files have no room for what they are of."""


def back(codec: Codec, source: CacheName, where: Path, folder: Path, *, overwrite: Any = False, **given: Any) -> Any:
    """Read a cache and check that every image is accounted for."""
    converted = read_cache(where, folder, source, codec, CacheOptions(**given), overwrite=overwrite)
    summary = converted.summary
    assert summary.done + len(summary.failures) == summary.found
    assert not stored_files(folder) or len(Latents(folder)) == summary.done
    return converted


def test_mar_gives_back_every_number(shared_codec: Codec, mixed: Latents, tmp_path: Path) -> None:
    made(mixed, "mar", tmp_path / "cache")
    assert not back(shared_codec, "mar", tmp_path / "cache", tmp_path / "out").notes
    found = Latents(tmp_path / "out", model_id=shared_codec.model_id)
    assert found.header == mixed.header
    facts = [[(e.path, e.geometry, e.sha256, e.label) for e in one.entries] for one in (found, mixed)]
    assert facts[0] == facts[1]
    for i in range(len(mixed)):
        for flip in (False, True):
            one, other = found.posterior(i, flip=flip), mixed.posterior(i, flip=flip)
            assert torch.equal(one.mean, other.mean) and torch.equal(one.logvar, other.logvar)
    made(found, "mar", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "cache")


def test_edm2_gives_back_exact_means_and_close_variances(shared_codec: Codec, latents: Latents, tmp_path: Path) -> None:
    made(latents, "edm2", tmp_path / "cache")
    for where in (tmp_path / "cache", tmp_path / "cache" / "latents.zip"):
        back(shared_codec, "edm2", where, tmp_path / "out", overwrite=True, store="float32")
        found = Latents(tmp_path / "out", model_id=shared_codec.model_id)
        facts = [[(e.path, e.geometry, e.sha256) for e in one.entries] for one in (found, latents)]
        assert facts[0] == facts[1]
        for i in range(len(latents)):
            one, other = found.posterior(i), latents.posterior(i)
            assert torch.equal(one.mean, other.mean) and close(one.logvar, other.logvar)


@pytest.mark.parametrize("source", SINGLE)
def test_a_single_draw_becomes_the_mean_and_its_variance_the_lower_clamp(
    shared_codec: Codec, latents: Latents, mixed: Latents, tmp_path: Path, source: CacheName
) -> None:
    cached = latents if source in ("lightningdit", NAMELESS) else mixed  # of one size; without a place for sizes
    made(cached, source, tmp_path / "cache", seed=5, epoch=1, **EVERY[source])
    (note,) = back(shared_codec, source, tmp_path / "cache", tmp_path / "out", store="float32", **EVERY[source]).notes
    assert "4 images come of single draws" in note and "-16" in note
    found, drawn, flipped = Latents(tmp_path / "out"), draws(cached, 5, 1), flipped_draws(cached, 5, 1)
    whole = {path.rpartition(".")[0] if source == NAMELESS else path: path for path in PATHS}
    geometry = {entry.path: entry.geometry for entry in cached.entries}
    assert {entry.path for entry in found.entries} == set(whole)
    assert found.header.flips == (source in ("kohya", "lightningdit", "webdataset"))
    for i, entry in enumerate(found.entries):
        assert torch.allclose(found.posterior(i).mean[0], drawn[whole[entry.path]], atol=1e-5)
        assert bool((found.posterior(i).logvar == -16).all())
        if found.header.flips:
            assert torch.allclose(found.posterior(i, flip=True).mean[0], flipped[whole[entry.path]], atol=1e-5)
        assert entry.geometry == geometry[whole[entry.path]] and entry.label == entry.path[:3]


Z = torch.arange(24, dtype=torch.float32).reshape(4, 2, 3) / 7
SCALED = (Z - torch.tensor([0.5, -1.0, 0.0, 2.0])[:, None, None]) / torch.tensor([1.0, 2.0, 0.5, 4.0])[:, None, None]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder for each program with a file as the program itself writes it."""
    root = tmp_path_factory.mktemp("others")
    for source in EVERY:
        (root / source / "sub").mkdir(parents=True)
    sizes = {"original_size_2x3": np.array([20, 13]), "crop_ltrb_2x3": np.array([0, 0, 20, 13])}
    np.savez(root / "kohya" / "sub" / "a_0020x0013_flux.npz", latents_2x3=SCALED.numpy(), **sizes)
    metadata = {"architecture": "wan", "width": "60", "height": "45", "format_version": "1.0.1"}
    tensors = {"latents_1x2x3_bfloat16": SCALED[:, None].contiguous().bfloat16()}
    save_file(tensors, root / "musubi" / "a_0060x0045_wan.safetensors", metadata)
    save_file({"varlen_t5_bfloat16": torch.zeros(1)}, root / "musubi" / "a_wan_te.safetensors", metadata)
    save_file({"latent_tensor": Z[None] * 0.18215}, root / "comfyui" / "a.latent")
    both = torch.stack([Z + 1, Z])
    tensors = {"latents": both, "latents_flip": both + 1, "labels": torch.tensor([0, 7])}
    save_file(tensors, root / "lightningdit" / "latents_rank00_shard000.safetensors")
    moments = torch.cat([Z, torch.full_like(Z, -30.0)]).numpy()
    np.savez(root / "mar" / "sub" / "a.JPEG.npz", moments=moments, moments_flip=moments + 1)
    np.save(root / "edm2" / "sub" / "img-mean-std-00000000.npy", torch.cat([Z, torch.ones_like(Z)]).numpy())
    (root / "edm2" / "dataset.json").write_text('{"labels": [["sub/img-mean-std-00000000.npy", 3]]}')
    np.save(root / "npy" / "sub" / "a.npy", Z.numpy() * 0.5)
    np.save(buffer := io.BytesIO(), Z.numpy())
    tar(root / "webdataset" / "0.tar", {"sub/a.npy": buffer.getvalue(), "sub/a.cls": b"3"})
    return root


OTHERS: dict[CacheName, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "kohya": ("sub/a", (20, 13), {"arch": "flux"}),
    "musubi": ("a", (24, 16), {"arch": "wan"}),
    "comfyui": ("a", (24, 16), {}),
    "lightningdit": ("00007/latents_rank00_shard000-000001", (24, 16), {}),
    "mar": ("sub/a.JPEG", (24, 16), {}),
    "edm2": ("00003/sub-img-mean-std-00000000", (24, 16), {}),
    "webdataset": ("sub/a", (24, 16), {"scale": "raw"}),
    "npy": ("sub/a", (24, 16), {"scale": "normalized", "scaling_factor": 0.5}),
}
"""Path, size and options of the last image of each."""


@pytest.mark.parametrize("source", OTHERS)
def test_files_of_other_programs_are_read(shared_codec: Codec, others: Path, tmp_path: Path, source: CacheName) -> None:
    path, size, given = OTHERS[source]
    given = given | {"store": "float32"}
    assert not back(shared_codec, source, others / source, tmp_path / "out", **given).summary.failures
    found = Latents(tmp_path / "out")
    entry, posterior = found.entries[-1], found.posterior(len(found) - 1)
    assert (entry.path, entry.geometry.width, entry.geometry.height) == (path, *size)
    if source == "musubi":  # resized to its bucket from the size in its name
        assert entry.geometry.resized == Resized(original_size=(60, 45), crop_ltrb=(0, 1, 24, 17))
    tolerance = 2e-2 if source == "musubi" else 1e-5  # its own bfloat16
    assert torch.allclose(posterior.mean[0], Z, atol=tolerance)
    assert bool((posterior.logvar == (0.0 if source == "edm2" else -16.0)).all())  # -30 clamped as the model's are


@pytest.mark.parametrize("source", EVERY)
def test_a_damaged_file_fails_alone(shared_codec: Codec, latents: Latents, tmp_path: Path, source: CacheName) -> None:
    """Shards are refused, because their images are not known."""
    made(latents, source, tmp_path / "cache", **EVERY[source])
    bad, *others = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".pt")
    whole = bad.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2], whole[:-40]):
        bad.write_bytes(data)
        if others:
            given = {"overwrite": True, **EVERY[source]}
            summary = back(shared_codec, source, tmp_path / "cache", tmp_path / "out", **given).summary
            assert (summary.done, len(summary.failures)) == (3, 1) and next(iter(summary.failures)) in bad.as_posix()
        elif data != whole[:-40]:
            with pytest.raises(UserError, match=rf"{bad.name}: no"):
                back(shared_codec, source, tmp_path / "cache", tmp_path / "out", **EVERY[source])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_nothing_is_unpickled(shared_codec: Codec, cache: Path, tmp_path: Path) -> None:
    np.save(cache / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(cache / "b.npz", moments=np.array([print], dtype=object))
    for source, given in (("npy", {"scale": "raw"}), ("mar", {})):
        summary = back(shared_codec, source, cache, tmp_path / "out", **given).summary
        assert "needs pickle" in next(iter(summary.failures.values()))


def test_latents_of_another_model_are_refused(codec: Codec, latents: Latents, tmp_path: Path) -> None:
    made(latents, "mar", tmp_path / "cache")
    codec.backbone.linear.encoder.bias.data += 1  # pyright: ignore
    failures = back(codec, "mar", tmp_path / "cache", tmp_path / "out").summary.failures
    assert len(failures) == 4 and all("give the right --model" in reason for reason in failures.values())


def test_latents_that_cannot_be_the_models_fail_by_name(shared_codec: Codec, cache: Path, tmp_path: Path) -> None:
    wrong = {
        "channels": (np.zeros((3, 2, 2)), "3 channels are no latent of this model, which has latents of 4"),
        "numbers": (np.full((4, 2, 2), np.nan), "not finite"),
        "dimensions": (np.zeros((4, 4)), "(4, 4) where latents"),
        "large": (np.full((4, 2, 2), 1e6), "give --store float32"),
        "whole": (np.zeros((4, 2, 2), int), "int64"),
    }
    for name, (array, _) in wrong.items():
        np.save(cache / f"{name}.npy", array)
    reasons = back(shared_codec, "npy", cache, tmp_path / "out", scale="raw").summary.failures
    assert reasons.keys() == wrong.keys() and all(reason in reasons[name] for name, (_, reason) in wrong.items())


def test_mirror_images_come_for_all_or_for_none(shared_codec: Codec, cache: Path, tmp_path: Path) -> None:
    moments = np.zeros((8, 2, 2), np.float32)
    np.savez(cache / "0.npz", moments=moments[:7])
    np.savez(cache / "a.npz", moments=moments, moments_flip=moments)
    np.savez(cache / "b.npz", moments=moments)
    np.savez(cache / "c.npz", moments=moments, moments_flip=moments[:, :1])
    failures = back(shared_codec, "mar", cache, tmp_path / "out").summary.failures
    assert set(failures) == {"0", "b", "c"} and "not all images come with their mirror images'" in failures["b"]
    assert "7 channels of moments, not 2 x 4" in failures["0"] and "another size" in failures["c"]


def test_latents_in_the_way_are_kept_unless_they_may_go(shared_codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", shared_codec)
    made(latents, "mar", tmp_path / "cache")
    expected = files_of(tmp_path / "z")
    with pytest.raises(UserError, match="holds latents already; give another folder, or --overwrite"):
        back(shared_codec, "mar", tmp_path / "cache", tmp_path / "z")
    assert files_of(tmp_path / "z") == expected
    back(shared_codec, "mar", tmp_path / "cache", tmp_path / "z", overwrite=True, shard_images=3)
    shards = [entry.shard for entry in Latents(tmp_path / "z").entries]
    assert sorted(map(shards.count, set(shards))) == [1, 3] and set(files_of(tmp_path / "z")) == {"index.json", *shards}


def test_an_index_is_true_whenever_another_takes_its_place(
    shared_codec: Codec, latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for seed in (0, 1):
        made(latents, "comfyui", tmp_path / f"{seed}", seed=seed)
    back(shared_codec, "comfyui", tmp_path / "0", out)
    before = [Latents(out).posterior(i).mean for i in range(4)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(read_module, "write_index", MagicMock(side_effect=KeyboardInterrupt))
        back(shared_codec, "comfyui", tmp_path / "1", out, overwrite=True)
    assert all(torch.equal(Latents(out).posterior(i).mean, before[i]) for i in range(4))
    back(shared_codec, "comfyui", tmp_path / "1", out, overwrite=True)
    assert not any(torch.equal(Latents(out).posterior(i).mean, before[i]) for i in range(4))
    assert len(stored_files(out)) == 2


def test_a_place_without_a_cache_is_refused(shared_codec: Codec, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, given in EVERY.items():
        with pytest.raises(UserError, match=rf"no latents as {source} has them|no zip file"):
            back(shared_codec, source, tmp_path / "empty", tmp_path / "out", **given)
        refused("no such folder or file", back, shared_codec, source, tmp_path / "none", tmp_path / "out", **given)
    with pytest.raises(UserError, match="--seed is not for --from npy"):
        back(shared_codec, "npy", tmp_path / "empty", tmp_path / "out", scale="raw", seed=1)
    with zipfile.ZipFile(tmp_path / "empty" / "latents.zip", "w") as file:
        file.writestr("dataset.json", "[]")
    refused(r"dataset\.json has no list", back, shared_codec, "edm2", tmp_path / "empty", tmp_path / "out")


def test_files_that_claim_more_than_they_hold_take_no_memory(
    shared_codec: Codec, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header's claim, a packed member and a sparse one can each stand for gigabytes."""
    monkeypatch.chdir(cache)
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, {"descr": "<f4", "fortran_order": False, "shape": (4, 2**15, 2**15)})
    Path("a.npy").write_bytes(claim.getvalue())
    with (
        zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("moments.npy", "w", force_zip64=True) as m,
    ):
        for _ in range(260):
            m.write(bytes(2**20))
    with zipfile.ZipFile("b.npz", "w") as file:
        file.writestr("moments.npy", claim.getvalue())
    with zipfile.ZipFile("latents.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("00000/img-mean-std-00000000.npy", claim.getvalue())
    with tarfile.open("a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        sparse = tarfile.TarInfo("x.npy")
        sparse.size, sparse.pax_headers = 5, {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(2**40)}
        archive.addfile(sparse, io.BytesIO(b"12345"))
    tracemalloc.start()
    for source, count in (("npy", 1), ("mar", 2), ("edm2", 1), ("webdataset", 1)):
        given = {"scale": "raw"} if source in ("npy", "webdataset") else {}
        assert len(back(shared_codec, source, cache, tmp_path / "out", **given).summary.failures) == count
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
