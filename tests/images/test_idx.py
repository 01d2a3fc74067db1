"""Check that IDX files are read like folders of classes, and that a damaged one is refused."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_codec.images.sources import find_images
from tests.support.errors import refused
from train.data.crops import fingerprint

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
LABELS = np.array([7, 0, 7], np.uint8)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write(folder: Path, suffix: str = "", pixels: np.ndarray = PIXELS, labels: np.ndarray | None = LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix else bytes
    if labels is not None:
        (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    path = folder / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx(pixels)))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_are_the_files_values_named_by_their_class(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix)
    sources = find_images(path)
    assert [s.name for s in sources] == ["0/train-00001", "7/train-00000", "7/train-00002"]
    assert [s.label for s in sources] == ["0", "7", "7"]
    for source, row in zip(sources, [1, 0, 2], strict=True):
        pixels, geometry = source.read()
        assert torch.equal(pixels, torch.from_numpy(PIXELS[row]).expand(3, -1, -1))
        assert (geometry.height, geometry.width, geometry.mode) == (4, 5, "L")


def test_without_labels_images_have_no_class(tmp_path: Path) -> None:
    sources = find_images(write(tmp_path, labels=None))
    assert [(s.name, s.label) for s in sources] == [(f"train-0000{i}", None) for i in range(3)]


def test_in_a_folder_a_file_counts_once_packed_and_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "raw", ".gz")
    packed = [s.name for s in find_images(tmp_path)]
    write(tmp_path / "raw")
    inside = [f"raw/{s.name}" for s in find_images(tmp_path / "raw")]
    assert [s.name for s in find_images(tmp_path)] == packed == inside


def test_the_fingerprint_tells_the_content_packed_or_not(tmp_path: Path) -> None:
    found = [
        fingerprint(find_images(write(tmp_path / name, suffix, pixels)))
        for name, suffix, pixels in (("a", "", PIXELS), ("b", ".gz", PIXELS), ("c", "", 255 - PIXELS))
    ]
    assert found[0] == found[1] != found[2]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    for data in (idx(PIXELS)[:-1], idx(PIXELS) + b"\0", idx(PIXELS[:0])):
        path.write_bytes(data)
        refused("does not fit its", find_images, path)
    for data in (idx(PIXELS)[:9], idx(PIXELS[0]), b"\0\0\x0d" + idx(PIXELS)[3:]):
        path.write_bytes(data)
        refused("no IDX file of uint8 values in 3 dimensions", find_images, path)


def test_a_cut_gzip_file_and_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, ".gz")
    path.write_bytes(path.read_bytes()[:-9])
    refused("cannot be read", find_images, path)
    refused("2 labels for 3 images", find_images, write(tmp_path / "other", labels=LABELS[:2]))


def test_a_packed_file_is_not_unpacked_beyond_what_its_header_says(tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte takes neither time nor memory to refuse."""
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 1, 4, 5)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header)
        for _ in range(256):
            file.write(bytes(2**20))
    tracemalloc.start()
    refused("does not fit", find_images, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**20, 2**20, 2**20)))
    refused("promises .* bytes, more than 1073741824; split it", find_images, path)
