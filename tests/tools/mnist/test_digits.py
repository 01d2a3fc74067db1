"""Test the MNIST tools: digits as folders, a classifier for them, NLL estimates and prior samples."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import refused
from tests.support.networks import make_codec
from tests.support.run import write_digits
from tools.mnist import nll
from tools.mnist.digits import Classify, Score, Write, read_digits
from tools.mnist.prior_samples import PriorSamples
from tools.program import main
from train.config.presets import mnist_cvae, mnist_vae


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write two classes, with the same images to train on and to test."""
    folder = write_digits(tmp_path / "raw").parent
    shutil.copy(folder / "train-images-idx3-ubyte.gz", folder / "t10k-images-idx3-ubyte.gz")
    shutil.copy(folder / "train-labels-idx1-ubyte", folder / "t10k-labels-idx1-ubyte")
    return folder


def test_a_classifier_scores_digits_by_their_folders(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Write(raw=raw, dst=tmp_path / "out").run()
    digits = read_digits(raw, "train")
    for image, label, name in zip(digits.images.numpy(), digits.labels.tolist(), digits.names, strict=True):
        assert name.startswith(f"{label}/train-")
        with Image.open(tmp_path / "out" / f"{name}.png") as file:
            assert np.array_equal(np.asarray(file), image)
            assert image.shape == (32, 32) and not image[[0, 1, -2, -1]].any()
    Classify(raw=raw, dst=tmp_path / "net.safetensors", epochs=15).run()
    assert "recognises 100.00% of 36 test digits" in capsys.readouterr().out
    (tmp_path / "out" / "1" / "train-00001.png").rename(tmp_path / "out" / "0" / "wrong.png")
    Score(classifier=tmp_path / "net.safetensors", samples=tmp_path / "out").run()
    assert capsys.readouterr().out.splitlines() == ["0: 94.7% of 19", "1: 100.0% of 17", "all: 97.22% of 36"]


def test_missing_files_are_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["digits", "score", str(tmp_path / "no.safetensors"), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^tools\.mnist\.digits: .*no\.safetensors: no such file; give .*classify"):
        main("tools.mnist.digits", Write | Classify | Score, None)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    refused("no labels beside it", read_digits, raw, "test")
    refused("no such image, folder or tar file", read_digits, tmp_path / "nowhere", "train")


def test_the_nll_does_not_depend_on_batches(raw: Path, tmp_path: Path) -> None:
    make_codec(mnist_vae().codec).save(tmp_path / "m.safetensors")
    images = raw / "train-images-idx3-ubyte.gz"
    options = nll.NLLOptions(
        model=str(tmp_path / "m.safetensors"), images=images, samples=20, first=10, batch_size=4, at_once=100
    )
    found = [nll.estimate(options), nll.estimate(dataclasses.replace(options, batch_size=10, at_once=7))]
    assert found[0].nll == pytest.approx(found[1].nll, rel=1e-5) and found[0].nll < found[0].nelbo
    assert (found[0].images, found[0].latents, found[0].batches_below_elbo) == (10, 50, 0)


def test_prior_samples_lie_in_folders_of_their_classes(tmp_path: Path) -> None:
    make_codec(mnist_cvae().codec).save(tmp_path / "m.safetensors")
    PriorSamples(model=str(tmp_path / "m.safetensors"), dst=tmp_path / "out", count=2, border=2).run()
    paths = list((tmp_path / "out").glob("*/*.png"))
    assert len(paths) == 20
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (32, 32) and image.mode == "L" and path.parent.name in "0123456789"
