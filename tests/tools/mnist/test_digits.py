"""Digits as folders, and a classifier that tells what it was taught."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_codec.errors import UserError
from tests.train.test_families import write_digits
from tools.mnist.digits import Classify, Score, Write, read_digits


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two classes; the same images to train on and to test."""
    folder = write_digits(tmp_path / "raw").parent
    shutil.copy(folder / "train-images-idx3-ubyte.gz", folder / "t10k-images-idx3-ubyte.gz")
    shutil.copy(folder / "train-labels-idx1-ubyte", folder / "t10k-labels-idx1-ubyte")
    return folder


def test_each_digit_lies_in_the_folder_of_its_class_within_a_black_border(raw: Path, tmp_path: Path) -> None:
    Write(raw=raw, dst=tmp_path / "out").run()
    digits = read_digits(raw, "train")
    for image, label, name in zip(digits.images.numpy(), digits.labels.tolist(), digits.names, strict=True):
        assert name.startswith(f"{label}/train-")
        with Image.open(tmp_path / "out" / f"{name}.png") as file:
            found = np.asarray(file)
        assert found.shape == (32, 32) and np.array_equal(found[2:-2, 2:-2], image)
        assert found.sum() == image.sum(dtype=np.int64)


def test_a_trained_classifier_scores_digits_by_their_folders(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Classify(raw=raw, dst=tmp_path / "net.safetensors", epochs=15).run()
    assert "recognises 100.00% of 36 test digits" in capsys.readouterr().out
    Write(raw=raw, dst=tmp_path / "out").run()
    (tmp_path / "out" / "1" / "train-00001.png").rename(tmp_path / "out" / "0" / "wrong.png")
    capsys.readouterr()
    Score(classifier=tmp_path / "net.safetensors", samples=tmp_path / "out").run()
    assert capsys.readouterr().out.splitlines() == ["0: 94.7% of 19", "1: 100.0% of 17", "all: 97.22% of 36"]


def test_what_is_missing_is_said(raw: Path, tmp_path: Path) -> None:
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no labels beside it"):
        read_digits(raw, "test")
    with pytest.raises(UserError, match="no such image, folder or tar file"):
        read_digits(tmp_path / "nowhere", "train")
