"""Test the MNIST presets by whole runs on a small IDX file, and what their models can do."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_codec.errors import UserError
from latent_codec.export import export
from latent_codec.folders.decode_latents import decode_latents
from latent_codec.folders.encode_latents import LatentsOptions, encode_latents
from latent_codec.folders.encode_lc import encode_lc
from latent_codec.images.geometry import in_channels
from latent_codec.images.sources import find_images
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.support.checkpoints import assert_same_tensors, checkpoint, log_lines, tensors
from tests.support.run import flags, run, run_ranks, start, write_digits, write_labels
from train.config.presets import mnist_cvae

SMALL = flags(
    "--encoder-widths 12 --decoder-widths 12 --latent-channels 4 --batch-size 8 --steps 12 --save-every 6 "
    "--log-every 1 --eval-every 12 --val-images 4 --lr-schedule cosine --learning-rate 0.01"
)
IWAE = ["mnist_iwae", *SMALL, *flags("--samples 5 --gradient-samples 2 --data")]
COMPUTE = ComputeOptions(batch_size=8, workers=1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "raw")


@pytest.fixture(scope="module")
def iwae(digits: Path) -> Path:
    run([*IWAE, str(digits)], digits.parent / "iwae")
    return digits.parent / "iwae"


def test_the_bound_falls_from_that_of_the_mean_image(iwae: Path) -> None:
    losses = [line["loss"] for line in log_lines(iwae, "train")]
    assert losses[0] < 28 * 28 * np.log(2)  # the bound of a decoder that does not start there
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 10


def test_two_processes_train_the_same_model_as_one(digits: Path, iwae: Path, tmp_path: Path) -> None:
    """Law 5, of an objective that draws several latents and its pixels."""
    run_ranks([*IWAE, str(digits)], tmp_path / "two", 2)
    two = tensors(tmp_path / "two", 12)
    for name, value in tensors(iwae, 12).items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_a_killed_run_resumes_to_the_same_weights(digits: Path, iwae: Path, tmp_path: Path) -> None:
    process = start([*IWAE, str(digits)], tmp_path / "cut")
    process.wait_for(lambda: checkpoint(tmp_path / "cut", 6).exists())
    process.signal(9)
    process.wait()
    run([*IWAE, str(digits)], tmp_path / "cut")
    assert_same_tensors(tensors(tmp_path / "cut", 12), tensors(iwae, 12))


def test_an_exported_model_encodes_and_decodes_the_file(digits: Path, iwae: Path, tmp_path: Path) -> None:
    export(iwae, tmp_path / "m.safetensors", data=(digits,), images=8, half=False)
    runner = Runner(Codec.load(tmp_path / "m.safetensors"), COMPUTE)
    assert encode_latents(runner, digits, tmp_path / "z", quiet=True).done == 36
    assert decode_latents(runner, tmp_path / "z", tmp_path / "back", quiet=True).done == 36
    assert sorted(p.name for p in (tmp_path / "back").iterdir() if p.is_dir() and p.name[0] != ".") == ["0", "1"]


def test_a_conditional_models_samples_are_of_their_class(digits: Path, tmp_path: Path) -> None:
    longer = flags("--steps 150 --classes 0 1 --eval-every 150 --save-every 150 --beta 100")
    run(["mnist_cvae", *SMALL, *longer, "--data", str(digits)], tmp_path / "run")
    codec = Codec.load(checkpoint(tmp_path / "run", 150) / "ema.safetensors")
    labels = torch.tensor([0, 1] * 8)
    mean = codec.decode(torch.randn(16, 4, 1, 1, generator=torch.Generator().manual_seed(0)), labels)
    brighter_above = mean[:, :, :14].mean((1, 2, 3)) > mean[:, :, 14:].mean((1, 2, 3))
    assert torch.equal(brighter_above, labels == 0)


def test_a_conditional_model_takes_an_images_class_from_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(dataclasses.replace(mnist_cvae().codec, classes=("0", "1"))).eval()
    runner, digits = Runner(codec, COMPUTE), write_digits(tmp_path / "raw")
    write_labels(digits.parent, [0] * 35 + [2])
    encoded = encode_latents(runner, digits, tmp_path / "z", LatentsOptions(store="float32"), quiet=True)
    assert encoded.done == 35 and list(encoded.failures) == ["2/train-00035"]
    assert "class '2', but the model knows 0, 1" in encoded.failures["2/train-00035"]
    pixels = in_channels(find_images(digits)[3].read().pixels[None], 1)
    right, wrong = (codec.encode(pixels, torch.tensor([label])).mean for label in (0, 1))
    stored = Latents(tmp_path / "z").posterior(3).mean
    torch.testing.assert_close(stored, right, rtol=1e-5, atol=1e-5)
    assert (stored - wrong).abs().max() > 1e-3
    assert decode_latents(runner, tmp_path / "z", tmp_path / "back", quiet=True).done == 35
    with pytest.raises(UserError, match=r"each image's class, one of 2, which a \.lc file does not hold"):
        encode_lc(runner, digits, tmp_path / "lc", quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mnist_cvae --val-images 4 --classes 0 2", "class '1', but the model knows 0, 2"),
        ("mnist_vae --closed-form", "closed_form needs a gaussian likelihood, not bernoulli"),
        ("pca --classes 0 1", "linear: principal components have no place for 2 classes"),
        ("photo --mean-start", "mean_start needs an mlp backbone and a bernoulli likelihood"),
    ],
)
def test_mismatched_options_are_refused(digits: Path, tmp_path: Path, change: str, message: str) -> None:
    process = start([*flags(change), "--data", str(digits)], tmp_path / "run")
    assert process.wait() == 1
    assert message in process.text and len(process.text.splitlines()) == 1
