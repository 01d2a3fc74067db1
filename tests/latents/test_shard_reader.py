"""BatchIndices come as safetensors has them; what a file does not hold is an error, whatever its bytes."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latent_codec.latents.shard_reader import ShardReader
from tests.support.errors import rejected

TENSORS = {"a": torch.arange(24.0).reshape(4, 2, 3), "b": torch.arange(10).reshape(5, 2).half()}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "s", metadata={"k": "v"})
    return tmp_path / "s"


def row_of(reader: ShardReader, shard: str, name: str, row: int) -> np.ndarray:
    location = reader.locate(shard, name)
    out = np.empty(location.shape[1:], {"F32": np.float32, "F16": np.float16}[location.dtype])
    reader.read(shard, (location,), row, (out.view(np.uint8),))
    return out


def test_every_row_of_every_tensor_is_read(shard: Path) -> None:
    for reader in (made := ShardReader(shard.parent), pickle.loads(pickle.dumps(made))):
        for name, tensor in TENSORS.items():
            assert reader.locate("s", name).shape == tuple(tensor.shape)
            for row in range(len(tensor)):
                assert np.array_equal(row_of(reader, "s", name, row), tensor[row].numpy())


def test_missing_shards_tensors_and_rows_are_refused(shard: Path) -> None:
    reader = ShardReader(shard.parent)
    rejected("no tensor c", reader.locate, "s", "c")
    rejected("no row 4, only 4 rows", row_of, reader, "s", "a", 4)
    with pytest.raises(FileNotFoundError):
        reader.locate("none", "a")


def test_few_files_stay_open_and_all_can_be_read(tmp_path: Path) -> None:
    for i in range(9):
        save_file({"a": torch.full((2, 4), float(i))}, tmp_path / f"{i}")
    reader = ShardReader(tmp_path, open_files=3)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None  # noqa: PTH208
    for _ in range(2):
        assert all(row_of(reader, f"{i}", "a", 1).tolist() == [i] * 4 for i in range(9))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) - before <= 3  # noqa: PTH208


def test_a_header_is_parsed_once(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: parsed.append(text) or loads(text, **options))
    reader = ShardReader(shard.parent)
    for row in range(4):
        row_of(reader, "s", "a", row)
        row_of(reader, "s", "b", row)
    assert len(parsed) == 1


def test_a_file_cut_off_anywhere_is_refused(shard: Path) -> None:
    whole, reader = shard.read_bytes(), ShardReader(shard.parent)
    row_of(reader, "s", "a", 0)
    os.truncate(shard, len(whole) - 110)  # while it is open
    rejected("ends within a row", row_of, reader, "s", "a", 3)
    for size in range(len(whole)):
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            ShardReader(shard.parent).locate("s", "a")


DAMAGE: dict[str, Any] = {
    "beyond the end": {"data_offsets": [0, 4000], "shape": [1000]},
    "negative": {"data_offsets": [-4, 0], "shape": [1]},
    "of another size": {"shape": [4, 2, 2]},
    "of a negative shape": {"shape": [-4, -6]},
    "of words": {"shape": ["4"]},
    "of fractions": {"shape": [4.0, 6]},
    "of truths": {"shape": [True, 24]},
    "of an unknown type": {"dtype": "F7"},
    "of a type that is none": {"dtype": ["F32"]},
    "without a shape": {"shape": None},
    "with one offset": {"data_offsets": [0]},
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_tensor_that_does_not_lie_in_its_file_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4, 2, 3], "data_offsets": [0, 96]} | change}).encode()
    (tmp_path / "s").write_bytes(struct.pack("<Q", len(header)) + header + bytes(96))
    rejected("tensor a does not lie within the file", ShardReader(tmp_path).locate, "s", "a")


def test_a_header_that_is_none_or_huge_is_refused(tmp_path: Path) -> None:
    for header in (b"[]", b"{", b"\xff", b"null"):
        (tmp_path / "s").write_bytes(struct.pack("<Q", len(header)) + header + bytes(96))
        with pytest.raises(ValueError):
            ShardReader(tmp_path).locate("s", "a")
    (tmp_path / "s").write_bytes(struct.pack("<Q", 2**63) + bytes(96))
    rejected("cut off in its header", ShardReader(tmp_path).locate, "s", "a")
