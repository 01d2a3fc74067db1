"""Check that stored latents come back as they were, and that unsafe or damaged indices are refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_codec.latents import format as layout
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian
from tests.support.errors import refused
from tests.support.latents import PATHS, geometry, posterior, row_of, seed_of, size_of, store, stored


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_posteriors_come_back_rounded_as_stored(codec: Codec, tmp_path: Path, dtype: layout.StoredDtype) -> None:
    latents, rounded = store(tmp_path, codec, dtype=dtype), getattr(torch, dtype)
    assert latents.header.dtype == dtype
    assert {t.dtype for shard in layout.stored_shards(tmp_path) for t in load_file(shard).values()} == {rounded}
    assert [e.path for e in latents.entries] == sorted(PATHS)
    for i, entry in enumerate(latents.entries):
        found, expected = latents.posterior(i), stored(entry.path)
        assert found.mean.dtype == found.logvar.dtype == torch.float32
        assert torch.equal(found.mean, expected.mean.to(rounded).float())
        assert torch.equal(found.logvar, expected.logvar.to(rounded).float())


def test_the_index_describes_images_and_numbers(codec: Codec, tmp_path: Path) -> None:
    header, entries = layout.read_index(store(tmp_path, codec).folder / layout.INDEX)
    assert {e.path: e.label for e in entries} == {"a.jpg": None, "a.png": None, "b/ü.png": "b", "b/c/d.png": "b"}
    for entry in entries:
        assert entry.sha256 == f"{seed_of(entry.path):064x}"
        assert (entry.geometry.width, entry.geometry.height) == size_of(entry.path)
    assert (header.model_id, header.factor, header.pixel_range) == (codec.model_id, 8, (-1.0, 1.0))
    assert (header.scale_state, header.second_moment, header.statistics) == ("raw", "logvar", codec.statistics)


def test_many_shards_together_hold_what_the_index_says(codec: Codec, tmp_path: Path) -> None:
    header, entries = layout.latents_header(codec, "float32"), []
    for unit in range(5):
        entries += layout.write_shard(tmp_path, header, f"{unit}", [row_of(f"{unit}/{i}.png") for i in range(unit, 7)])
    layout.write_index(tmp_path, header, entries[::-1])
    latents, shards = Latents(tmp_path), [layout.read_index(shard) for shard in layout.stored_shards(tmp_path)]
    assert len(shards) == 5 and {shard.header for shard in shards} == {latents.header}
    assert sorted((e for shard in shards for e in shard.entries), key=lambda e: e.path) == latents.entries
    assert [e.path for e in latents.entries] == [f"{unit}/{i}.png" for unit in range(5) for i in range(unit, 7)]
    for i, entry in enumerate(latents.entries):
        assert torch.equal(latents.posterior(i).mean, stored(entry.path).mean)


def test_a_shard_holds_images_of_all_sizes_and_equal_rows_give_equal_files(codec: Codec, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        store(tmp_path / folder, codec, tuple(f"{i}.png" for i in range(9)))
    one, two = (layout.stored_files(tmp_path / folder) for folder in ("one", "two"))
    assert [f.name for f in one] == [f.name for f in two] == [layout.INDEX, "latents-name.safetensors"]
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    shapes = {name: tuple(t.shape) for name, t in load_file(one[1]).items()}
    assert set(shapes) == {f"{moment}.{size}" for moment in ("mean", "logvar") for size in ("2x2", "2x3")}
    assert sum(shapes[f"mean.{size}"][0] for size in ("2x2", "2x3")) == 9
    assert len({(e.geometry, e.row) for e in layout.read_index(one[1]).entries}) == 9


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_shard_that_cannot_be_written_changes_no_file(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    store(tmp_path, codec)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        layout.write_shard(tmp_path, layout.latents_header(codec, "float32"), "name", [row_of("other.png")])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # and no temporary file among them


@pytest.mark.parametrize(("value", "dtype"), [(7e4, "float16"), (3.4e38, "bfloat16"), (float("nan"), "float32")])
@pytest.mark.parametrize("moment", ["mean", "logvar"])
def test_values_out_of_range_are_refused_and_others_kept(value: float, dtype: layout.StoredDtype, moment: str) -> None:
    bad = posterior(0)
    getattr(bad, moment)[0, 1, 1, 1] = value
    both = DiagonalGaussian(*(torch.cat([getattr(p, k) for p in (posterior(1), bad)]) for k in ("mean", "logvar")))
    entry = layout.unplaced_entry("bad.png", geometry(24, 16), "")
    refused(r"^bad\.png: .*float32", layout.latents_row, entry, both, 1, dtype)
    assert torch.equal(layout.latents_row(entry, both, 0, dtype).mean, posterior(1).mean[0].to(getattr(torch, dtype)))


def test_a_name_that_is_no_utf_8_survives(codec: Codec, tmp_path: Path) -> None:
    path = os.fsdecode(b"caf\xe9/\xff.png")
    latents = store(tmp_path, codec, (path, "a.png"))
    assert {e.path for e in latents.entries} == {path, "a.png"}
    assert {e.path for s in layout.stored_shards(tmp_path) for e in layout.read_index(s).entries} == {path, "a.png"}


UNSAFE = ("/a.png", "//a.png", "../a.png", "b/../../a.png", "..", ".", "", "./a.png", "b//a.png", "b/")
UNSAFE += ("b\\a.png", "a\0.png", "\ud800.png")


@pytest.mark.parametrize("name", UNSAFE)
def test_a_path_out_of_its_folder_is_neither_stored_nor_read(codec: Codec, tmp_path: Path, name: str) -> None:
    refused("unsafe name", layout.unplaced_entry, name, geometry(24, 16), "")
    store(tmp_path, codec)
    text = (tmp_path / layout.INDEX).read_text()
    for field in ("path", "shard"):
        index = json.loads(text)
        index["entries"][0][field] = name
        (tmp_path / layout.INDEX).write_text(json.dumps(index))
        refused("damaged latents index: unsafe name", layout.read_index, tmp_path / layout.INDEX)


def entry_with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index | {"entries": [index["entries"][0] | changes, *index["entries"][1:]]}


FIELDS = ("model_id", "factor", "dtype", "scale_state", "pixel_range", "statistics", "entries")
DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "row below 0": entry_with(row=-1),
    "empty image": entry_with(geometry={"width": 0, "height": 1, "orientation": 1, "mode": "RGB", "background": None}),
    "checksum of another type": entry_with(sha256=7),
    "label of another type": entry_with(label=7),
    "unknown field of an entry": entry_with(novelty=1),
    "two entries of one path": entry_with(path="a.png"),
    "model of another type": lambda index: index | {"model_id": 1},
    "factor below 1": lambda index: index | {"factor": 0},
    "unknown dtype": lambda index: index | {"dtype": "float8"},
    "scaled latents": lambda index: index | {"scale_state": "scaled"},
    "infinite range": lambda index: index | {"pixel_range": [float("nan"), 1.0]},
    "incomplete statistics": lambda index: index | {"statistics": {"mean": []}},
    "entries in an object": lambda index: index | {"entries": {}},
    "unknown field": lambda index: index | {"novelty": 1},
    "a list": lambda index: [index],
    "null": lambda _: None,
} | {f"no {field}": lambda index, field=field: {k: v for k, v in index.items() if k != field} for field in FIELDS}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_refused(codec: Codec, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    store(tmp_path, codec)
    (tmp_path / layout.INDEX).write_text(json.dumps(change(json.loads((tmp_path / layout.INDEX).read_text()))))
    refused("damaged latents index", layout.read_index, tmp_path / layout.INDEX)


def test_an_index_that_is_no_json_or_cut_off_anywhere_is_refused(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec)
    whole = (tmp_path / layout.INDEX).read_bytes()
    for data in (b"\xff\xfe", b"[" * 100_000, *(whole[:size] for size in range(0, len(whole), 97))):
        (tmp_path / layout.INDEX).write_bytes(data)
        refused("damaged latents index", layout.read_index, tmp_path / layout.INDEX)


@pytest.mark.parametrize(("version", "remedy"), [(2, "encode the images again"), (4, "update"), (None, "update")])
def test_another_format_version_is_refused(codec: Codec, tmp_path: Path, version: object, remedy: str) -> None:
    store(tmp_path, codec)
    index = json.loads((tmp_path / layout.INDEX).read_text())
    (tmp_path / layout.INDEX).write_text(json.dumps(index | {"format_version": version}))
    refused(f"format version {version}; this program reads 3: {remedy}", layout.read_index, tmp_path / layout.INDEX)


def test_a_folder_without_latents_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        refused(r"no latents there .* make them with", layout.read_index, folder / layout.INDEX)


def test_a_shard_of_another_program_is_refused(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(1)}, tmp_path / "a.safetensors")
    refused("not written by latent_codec", layout.read_index, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("text")
    refused("not a safetensors file", layout.read_index, tmp_path / "b.safetensors")
