"""Latents on disk: they come back as they were, noise is a function of (seed, epoch, path), damage is refused."""

import dataclasses
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import (
    INDEX,
    Row,
    StoredDtype,
    check_model,
    header_of,
    read_index,
    row,
    stored_files,
    stored_shards,
    write_index,
    write_shard,
)
from latent_codec.model import file as model_file
from latent_codec.model.bottlenecks import DiagonalGaussian
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal, text_key
from latent_codec.storage.tensors import KEY

PATHS = ("a.jpg", "a.png", "b/ü.png", "b/c/d.png")


def geometry(width: int, height: int) -> Geometry:
    return Geometry(width=width, height=height, orientation=1, mode="RGB", background=None)


def posterior(seed: int, height: int = 2, width: int = 3, channels: int = 4) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, 1, channels, height, width, generator=generator)
    return DiagonalGaussian(mean, logvar)


def store(folder: Path, codec: Codec, paths: tuple[str, ...] = PATHS, dtype: StoredDtype = "float32") -> None:
    """One posterior for each path, seeded by it; every other image is 17x9 pixels, the rest 16x16."""
    write(folder, codec, [row_of(path, dtype) for path in paths], dtype)


def write(folder: Path, codec: Codec, rows: list[Row], dtype: StoredDtype = "float32", name: str = "name") -> None:
    folder.mkdir(exist_ok=True)
    header = header_of(codec, dtype)
    write_index(folder, header, write_shard(folder, header, name, rows))


def row_of(path: str, dtype: StoredDtype = "float32") -> Row:
    size = (17, 9) if text_key(path) % 2 else (16, 16)
    return row(path, stored(path), 0, geometry(*size), hashlib.sha256(os.fsencode(path)).hexdigest(), dtype)


def stored(path: str) -> DiagonalGaussian:
    return posterior(text_key(path) % 1000, width=3 if text_key(path) % 2 else 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_stored_is_what_is_read_rounded_to_the_stored_type(
    codec: Codec, tmp_path: Path, dtype: StoredDtype
) -> None:
    store(tmp_path, codec, dtype=dtype)
    latents, rounded = Latents(tmp_path), getattr(torch, dtype)
    assert latents.header.dtype == dtype
    assert {t.dtype for shard in tmp_path.glob("*.safetensors") for t in load_file(shard).values()} == {rounded}
    assert [e.path for e in latents.entries] == sorted(PATHS)
    for i, entry in enumerate(latents.entries):
        found, expected = latents.posterior(i), stored(entry.path)
        assert found.mean.dtype == found.logvar.dtype == torch.float32
        assert torch.equal(found.mean, expected.mean.to(rounded).float())
        assert torch.equal(found.logvar, expected.logvar.to(rounded).float())


def test_an_entry_says_where_the_image_came_from(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    found = {e.path: e for e in Latents(tmp_path).entries}
    assert {path: e.label for path, e in found.items()} == {
        "a.jpg": None,
        "a.png": None,
        "b/ü.png": "b",
        "b/c/d.png": "b",
    }
    for path, entry in found.items():
        assert entry.sha256 == hashlib.sha256(path.encode()).hexdigest()
        assert (entry.geometry.width, entry.geometry.height) == ((17, 9) if text_key(path) % 2 else (16, 16))


def test_the_header_says_what_the_numbers_are(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    header = Latents(tmp_path).header
    assert header.model_id == codec.model_id
    assert (header.factor, header.pixel_range) == (8, (-1.0, 1.0))
    assert (header.scale_state, header.second_moment) == ("raw", "logvar")
    assert header.statistics == codec.statistics


def test_the_shards_together_say_what_the_index_says(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    index = read_index(tmp_path / INDEX)
    shards = [read_index(shard) for shard in sorted(tmp_path.glob("*.safetensors"))]
    assert len(shards) == 1
    assert {shard.header for shard in shards} == {index.header}
    assert sorted((e for shard in shards for e in shard.entries), key=lambda e: e.path) == index.entries


def test_many_shards_lose_and_double_nothing(codec: Codec, tmp_path: Path) -> None:
    header, entries = header_of(codec, "float32"), []
    for unit in range(5):
        entries += write_shard(tmp_path, header, f"{unit}", [row_of(f"{unit}/{i}.png") for i in range(unit, 7)])
    write_index(tmp_path, header, entries[::-1])
    latents = Latents(tmp_path)
    assert len(stored_shards(tmp_path)) == len({e.shard for e in latents.entries}) == 5
    assert [e.path for e in latents.entries] == [f"{unit}/{i}.png" for unit in range(5) for i in range(unit, 7)]
    for i, entry in enumerate(latents.entries):
        assert torch.equal(latents.posterior(i).mean, stored(entry.path).mean)


def test_a_shard_holds_images_of_all_sizes_and_equal_rows_give_equal_files(codec: Codec, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        store(tmp_path / folder, codec, tuple(f"{i}.png" for i in range(9)))
    one, two = (stored_files(tmp_path / folder) for folder in ("one", "two"))
    assert [f.name for f in one] == [f.name for f in two] == [INDEX, "latents-name.safetensors"]
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    names = {f"{part}.{size}" for part in ("mean", "logvar") for size in ("2x2", "2x3")}
    shapes = {name: tuple(t.shape) for name, t in load_file(one[1]).items()}
    assert set(shapes) == names and sum(shapes[f"mean.{size}"][0] for size in ("2x2", "2x3")) == 9
    rows = [(e.geometry.width, e.row) for e in read_index(one[1]).entries]
    assert len(set(rows)) == 9 and {width for width, _ in rows} == {17, 16}


@pytest.mark.usefixtures("umask_027")
def test_every_file_has_the_users_umask(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    assert {stat.S_IMODE(f.stat().st_mode) for f in stored_files(tmp_path)} == {0o640}
    assert len(stored_files(tmp_path)) == len(list(tmp_path.iterdir())) == 2


def test_z_depends_on_seed_epoch_and_path_alone(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path / "all", codec)
    store(tmp_path / "one", codec, ("b/ü.png",))
    many, alone = Latents(tmp_path / "all", seed=5), Latents(tmp_path / "one", seed=5)
    place = [e.path for e in many.entries].index("b/ü.png")
    for epoch in (0, 3):
        many.set_epoch(epoch)
        alone.set_epoch(epoch)
        torch.manual_seed(epoch)  # the global state plays no part
        _ = [many[i] for i in reversed(range(len(many)))]
        expected = stored("b/ü.png").sample(
            normal(fold(5, epoch, text_key("b/ü.png"))[None], stored("b/ü.png").mean.shape[1:])
        )[0]
        assert torch.equal(many[place].z, expected)
        assert torch.equal(alone[0].z, expected)
        assert (alone[0].path, alone[0].label) == ("b/ü.png", 0)


def test_other_seeds_epochs_and_paths_draw_other_noise(codec: Codec, tmp_path: Path) -> None:
    zero = DiagonalGaussian(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16))
    write(tmp_path, codec, [row(path, zero, 0, geometry(128, 128), "", "float32") for path in ("a.jpg", "b.jpg")])
    draws = []
    for seed in (0, 1):
        latents = Latents(tmp_path, seed=seed)
        for epoch in (0, 1):
            latents.set_epoch(epoch)
            draws += [latents[0].z.flatten(), latents[1].z.flatten()]
    correlation = torch.corrcoef(torch.stack(draws))  # (8, 8)
    assert (correlation - torch.eye(8)).abs().max() < 5 / 1024**0.5
    assert torch.stack(draws).std().sub(1).abs() < 0.05


def test_normalisation_uses_the_models_statistics(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    raw, scaled = Latents(tmp_path), Latents(tmp_path, normalize=True)
    assert codec.statistics is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (codec.statistics.mean, codec.statistics.std))
    for i in range(len(raw)):
        assert torch.allclose(scaled[i].z * std + mean, raw[i].z, atol=1e-5)
        assert torch.equal(scaled.posterior(i).mean, raw.posterior(i).mean)  # what is stored stays raw


def test_normalisation_without_statistics_is_refused_with_the_remedy(codec: Codec, tmp_path: Path) -> None:
    codec.statistics = None
    store(tmp_path, codec)
    assert len(Latents(tmp_path)) == len(PATHS)
    with pytest.raises(UserError, match="no latent statistics; export"):
        Latents(tmp_path, normalize=True)


def test_another_models_latents_are_refused(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    other = "0" * 64
    assert len(Latents(tmp_path, model_id=codec.model_id)) == len(PATHS)
    with pytest.raises(UserError, match=f"{codec.model_id[:12]}.*000000000000.*--model"):
        Latents(tmp_path, model_id=other)
    with pytest.raises(UserError):
        check_model(Latents(tmp_path).header, other, "here")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_shard_that_cannot_be_written_costs_no_other(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    store(tmp_path, codec)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_file = save_file

    def fail(tensors: Any, path: Path, **options: Any) -> None:
        write_file(tensors, path, **options)
        path.write_bytes(path.read_bytes()[:100])
        raise error

    monkeypatch.setattr(model_file, "save_file", fail)
    with pytest.raises(type(error)):
        write_shard(tmp_path, header_of(codec, "float32"), "name", [row_of("other.png"), row_of("another.png")])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # and no temporary file among them


@pytest.mark.parametrize(("value", "dtype"), [(7e4, "float16"), (3.4e38, "bfloat16"), (float("nan"), "float32")])
@pytest.mark.parametrize("part", ["mean", "logvar"])
def test_values_that_the_stored_type_cannot_hold_are_refused_and_the_others_kept(
    value: float, dtype: StoredDtype, part: str
) -> None:
    bad = posterior(0)
    getattr(bad, part)[0, 1, 1, 1] = value
    both = DiagonalGaussian(*(torch.cat([getattr(p, k) for p in (posterior(1), bad)]) for k in ("mean", "logvar")))
    with pytest.raises(UserError, match=r"^bad\.png: .*float32"):
        row("bad.png", both, 1, geometry(24, 16), "", dtype)
    good = row("good.png", both, 0, geometry(24, 16), "", dtype)
    assert torch.equal(good.mean, posterior(1).mean[0].to(getattr(torch, dtype)))


UNSAFE = ("/a.png", "//a.png", "../a.png", "b/../../a.png", "..", ".", "", "./a.png", "b//a.png", "b/")
UNSAFE += ("b\\a.png", "a\0.png", "\ud800.png")


@pytest.mark.parametrize("path", UNSAFE)
def test_a_path_that_a_reader_would_refuse_is_not_stored(path: str) -> None:
    with pytest.raises(UserError, match="unsafe name"):
        row(path, posterior(0), 0, geometry(24, 16), "", "float32")


def tamper(folder: Path, **changes: Any) -> None:
    """Change fields of the index's first entry."""
    index = json.loads((folder / INDEX).read_text())
    index["entries"][0] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("field", ["path", "shard"])
def test_an_index_that_points_out_of_its_folder_is_refused(codec: Codec, tmp_path: Path, field: str, name: str) -> None:
    store(tmp_path, codec)
    tamper(tmp_path, **{field: name})
    with pytest.raises(UserError, match="damaged latents index: unsafe name"):
        Latents(tmp_path)


def test_two_entries_of_one_path_are_refused(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    tamper(tmp_path, path="a.png")
    with pytest.raises(UserError, match="two entries have the same path"):
        Latents(tmp_path)


ENTRY_DAMAGE: dict[str, Any] = {
    "row": -1,
    "geometry": {"width": 0, "height": 1, "orientation": 1, "mode": "RGB", "background": None},
    "sha256": 7,
    "label": 7,
    "novelty": 1,
}


@pytest.mark.parametrize(("field", "value"), ENTRY_DAMAGE.items())
def test_a_damaged_entry_is_refused(codec: Codec, tmp_path: Path, field: str, value: Any) -> None:
    store(tmp_path, codec)
    tamper(tmp_path, **{field: value})
    with pytest.raises(UserError, match="damaged latents index"):
        Latents(tmp_path)


INDEX_DAMAGE: dict[str, Any] = {
    "model_id": 1,
    "factor": 0,
    "dtype": "float8",
    "scale_state": "scaled",
    "pixel_range": [float("nan"), 1.0],
    "statistics": {"mean": []},
    "entries": {},
    "novelty": 1,
}


@pytest.mark.parametrize(("field", "value"), INDEX_DAMAGE.items())
def test_a_damaged_header_is_refused(codec: Codec, tmp_path: Path, field: str, value: Any) -> None:
    store(tmp_path, codec)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {field: value}))
    with pytest.raises(UserError, match="damaged latents index"):
        Latents(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({k: v for k, v in index.items() if k != field}))
    if field != "novelty":
        with pytest.raises(UserError, match="damaged latents index"):
            Latents(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(codec: Codec, tmp_path: Path, data: bytes) -> None:
    store(tmp_path, codec)
    (tmp_path / INDEX).write_bytes(data)
    with pytest.raises(UserError, match="damaged latents index"):
        Latents(tmp_path)


@pytest.mark.parametrize(("version", "remedy"), [(2, "encode the images again"), (4, "update"), (None, "update")])
def test_another_format_version_is_refused(codec: Codec, tmp_path: Path, version: object, remedy: str) -> None:
    store(tmp_path, codec)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {"format_version": version}))
    with pytest.raises(UserError, match=f"format version {version}; this program reads 3: {remedy}"):
        Latents(tmp_path)


def test_an_index_cut_off_anywhere_is_refused(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    text = (tmp_path / INDEX).read_text()
    for size in range(0, len(text), 97):
        (tmp_path / INDEX).write_text(text[:size])
        with pytest.raises(UserError, match="damaged latents index"):
            Latents(tmp_path)


def test_a_folder_without_latents_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UserError, match=r"no latents there .* make them with"):
            Latents(folder)


def test_a_shard_of_others_is_refused(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not written by latent_codec"):
        read_index(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("text")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_index(tmp_path / "b.safetensors")


SHARDS: dict[str, dict[str, torch.Tensor]] = {
    "without logvar": {"mean.2x2": torch.zeros(2, 4, 2, 2)},
    "of another size alone": {"mean.2x4": torch.zeros(2, 4, 2, 4), "logvar.2x4": torch.zeros(2, 4, 2, 4)},
    "with too few rows": {"mean.2x2": torch.zeros(0, 4, 2, 2), "logvar.2x2": torch.zeros(0, 4, 2, 2)},
    "of another size": {"mean.2x2": torch.zeros(2, 4, 2, 4), "logvar.2x2": torch.zeros(2, 4, 2, 4)},
    "of two sizes": {"mean.2x2": torch.zeros(2, 4, 2, 2), "logvar.2x2": torch.zeros(2, 5, 2, 2)},
    "of scalars": {"mean.2x2": torch.zeros(()), "logvar.2x2": torch.zeros(())},
    "of vectors": {"mean.2x2": torch.zeros(2), "logvar.2x2": torch.zeros(2)},
    "that is not finite": {"mean.2x2": torch.zeros(2, 4, 2, 2), "logvar.2x2": torch.full((2, 4, 2, 2), torch.inf)},
}


@pytest.mark.parametrize("tensors", SHARDS.values(), ids=SHARDS.keys())
def test_a_shard_that_does_not_hold_the_latent_is_refused_by_the_images_name(
    codec: Codec, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write(tmp_path, codec, [row("a.png", posterior(0, width=2), 0, geometry(16, 16), "", "float32")])
    latents = Latents(tmp_path)
    shard = tmp_path / latents.entries[0].shard
    save_file(tensors, shard, metadata={KEY: "{}"})
    with pytest.raises(UserError, match=r"^a\.png: .*latents-name"):
        _ = latents[0]


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_a_missing_or_corrupt_shard_is_refused_by_the_images_name(
    codec: Codec, tmp_path: Path, content: bytes | None
) -> None:
    store(tmp_path, codec, ("a.png",))
    latents = Latents(tmp_path)
    shard = tmp_path / latents.entries[0].shard
    shard.unlink()
    if content is not None:
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"^a\.png: shard latents-name\.safetensors cannot be read"):
        latents.posterior(0)


def test_a_name_that_is_no_utf_8_survives(codec: Codec, tmp_path: Path) -> None:
    path = os.fsdecode(b"caf\xe9/\xff.png")
    store(tmp_path, codec, (path, "a.png"))
    assert {e.path for e in Latents(tmp_path).entries} == {path, "a.png"}
    shards = [read_index(shard) for shard in tmp_path.glob("*.safetensors")]
    assert {e.path for shard in shards for e in shard.entries} == {path, "a.png"}


def test_the_dataset_works_in_a_data_loader(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    latents = Latents(tmp_path)
    loader = torch.utils.data.DataLoader(latents, batch_size=None, shuffle=False)
    for i, sample in enumerate(loader):
        assert torch.equal(sample.z, latents[i].z)


def test_entries_are_checked_however_they_are_made(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec, ("a.png",))
    (entry,) = Latents(tmp_path).entries
    for change in ({"path": "../a"}, {"shard": "/a"}, {"row": -1}):
        with pytest.raises(ValueError):
            dataclasses.replace(entry, **change)
