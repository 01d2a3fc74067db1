"""Test folders of `.lc` files: exact sizes, no image lost, files that depend on their image alone."""

import dataclasses
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from latent_codec.bitstream import container
from latent_codec.bitstream.stream_codec import dither_seed
from latent_codec.inference.options import ComputeOptions
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.support.errors import refused
from tests.support.folder import assert_told, black_and_grey, greatest_difference, images, make, temporary_files

encode, decode = partial(make, "streams"), partial(make, "images of streams")
SIZES = {"0.png": (24, 16), "1.png": (17, 33), "2.png": (9, 7), "3.png": (24, 16), "4.png": (17, 33), "5.png": (9, 7)}


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i, (name, size) in enumerate(SIZES.items()):
        draw(tmp_path / "photos" / name, *size, seed=i)
    return tmp_path / "photos"


@pytest.mark.slow
@hypothesis_settings(max_examples=20)
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    mode=st.sampled_from(["L", "RGB", "RGBA"]),
    prior=st.sampled_from(["context", "factorized"]),
    sample=st.none() | st.integers(0, 2**64 - 1),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    rate=st.sampled_from([{}, {"step": 0.1}, {"step": 50.0}, {"max_bytes": 3000, "step": 0.1}]),
)
def test_an_image_comes_back_in_its_exact_size(
    model_file: Path, width: int, height: int, mode: str, prior: Any, sample: int | None, dtype: Any, rate: Any
) -> None:
    codec = Codec.load(model_file)
    bands, compute = {"L": 1, "RGB": 3, "RGBA": 4}[mode], ComputeOptions(dtype=dtype)
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, bands), np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels).save(work / "a.png")
        assert not encode(codec, work / "a.png", work / "z", compute, sample=sample, prior=prior, **rate).failures
        assert not decode(codec, work / "z", work / "out", compute).failures
        (image,) = images(work / "out").values()
        assert (image.size, image.mode) == ((width, height), "L" if mode == "L" else "RGB")
        header = container.read(work / "z" / "a.png.lc")
        assert header.prior == prior and (header.seed is None) == (sample is None)
        assert header.geometry.background == ("#ffffff" if mode == "RGBA" else None)


WAYS: list[dict[str, Any]] = [{"sample": 3}, {"psnr": 6.0, "sample": 3}, {"max_bytes": 400, "prior": "factorized"}]


@pytest.mark.slow
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_files_and_latents_depend_on_no_batch_worker_or_thread(
    codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    forward, seen = codec.likelihood_params, []
    monkeypatch.setattr(
        codec, "likelihood_params", lambda z, labels: seen.extend(v.numpy().tobytes() for v in z) or forward(z, labels)
    )
    files, found, threads_before = [], [], torch.get_num_threads()
    for batch, workers, threads in ((1, 1, 1), (3, 2, 2)):
        out, compute = tmp_path / f"{batch}", ComputeOptions(batch_size=batch, workers=workers)
        torch.set_num_threads(threads)
        try:
            assert not encode(codec, photos, out, compute, **options).failures
            decode(codec, tmp_path / "1", tmp_path / f"out {batch}", compute)
        finally:
            torch.set_num_threads(threads_before)
        files.append(files_of(out))
        found.append(sorted(seen[-6:]))
    assert files[0] == files[1] and found[0] == found[1] and len(files[0]) == len(set(found[0])) == 6
    encode(codec, photos / "4.png", tmp_path / "alone", **options)
    assert files_of(tmp_path / "alone") == {"4.png.lc": files[0]["4.png.lc"]}


def test_a_draw_depends_on_seed_and_name_alone(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / "src" / name, 24, 16, seed=0)
    for name, sample in (("mean", None), ("one", 1), ("again", 1), ("two", 2)):
        torch.manual_seed(len(name))  # the global state plays no part
        encode(codec, tmp_path / "src", tmp_path / name, sample=sample)
    mean, one, again, two = (files_of(tmp_path / name) for name in ("mean", "one", "again", "two"))
    assert mean["a.png.lc"] == mean["b.png.lc"] and one == again
    assert len({*one.values(), *two.values()}) == 4
    seeds = [container.unpack(data).seed for data in (*one.values(), *two.values())]
    assert seeds == [dither_seed(s, name) for s in (1, 2) for name in ("a.png", "b.png")]
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds) and len(set(seeds)) == 4


TREE = ("a.jpg", "a.png", "a.webp", "a.jpg.png", "sub/deep er/ünï/日本語.png", "#1 50%.bmp", " .png", "x.png.jpg")


def test_trees_and_whole_names_are_kept_and_never_collide(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    for i, name in enumerate(TREE):
        draw(tmp_path / "src" / name, 8 + i, 5)
    with tarfile.open(tmp_path / "src.tar", "w") as archive:
        archive.add(tmp_path / "src", ".")
    for where, folder in (("src", "z"), ("src.tar", "of tar")):
        encode(codec, tmp_path / where, tmp_path / folder)
    assert files_of(tmp_path / "z").keys() == {f"{name}.lc" for name in TREE}
    assert files_of(tmp_path / "of tar") == {f"src/{name}": data for name, data in files_of(tmp_path / "z").items()}
    for suffix, image_format in (("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")):
        decode(codec, tmp_path / "z", tmp_path / suffix, image_format=suffix)
        found = images(tmp_path / suffix)
        sizes = {f"{name}.{suffix}": (8 + i, 5) for i, name in enumerate(TREE)}
        assert {name: image.size for name, image in found.items()} == sizes
        assert {image.format for image in found.values()} == {image_format}


@pytest.mark.parametrize("evil", ["../evil.png", "b\\evil.png"])
def test_a_member_whose_name_is_no_plain_path_stops_all(codec: Codec, photos: Path, tmp_path: Path, evil: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(photos, ".")
        archive.add(photos / "0.png", evil)
    for kind in ("streams", "latents"):
        refused(r"unsafe name .*evil\.png.*; rename it", make, kind, codec, tmp_path / "x.tar", tmp_path / "z")
    assert not list(tmp_path.rglob("evil*")) and not list((tmp_path / "z").iterdir())


def test_folders_without_streams_are_refused(codec: Codec, tmp_path: Path) -> None:
    (tmp_path / "a.png.lc").mkdir()
    refused(r"no \.lc files there", decode, codec, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prior", ["factorized", "context"])
def test_files_that_cannot_be_decoded_fail_by_name_and_reason_and_the_others_go_on(
    codec: Codec, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prior: str
) -> None:
    encode(codec, photos, tmp_path / "z", prior=prior)
    paths = {name: tmp_path / "z" / f"{name}.png.lc" for name in "012345678"}
    stream = container.read(paths["3"])
    before, bit, after = stream.payload[:4], stream.payload[4] ^ 1, stream.payload[5:]
    changed = dataclasses.replace(stream, payload=before + bytes([bit]) + after)
    other = dataclasses.replace(stream, stream_id=bytes(8))
    paths["3"].write_bytes(container.pack(changed))  # no encoder wrote that, in a batch with the sound "0"
    paths["5"].write_bytes(paths["5"].read_bytes()[:-1])
    paths["6"].write_bytes(container.pack(other))
    paths["7"].write_bytes(b"no stream at all, but long enough for a header's 47 bytes")
    paths["8"].write_bytes(paths["2"].read_bytes())
    for name in "78":
        with paths[name].open("r+b") as file:
            file.truncate(2**40)  # takes no room on the disk, and would in memory
    reasons = dict.fromkeys("14", "17x33 = 561 pixels exceed the limit of 400") | dict.fromkeys("35", "damaged: ")
    reasons |= {"6": "made by another model", "7": "not a .lc stream: ", "8": "header promises"}
    summary = decode(codec, tmp_path / "z", tmp_path / "out", max_pixels=400)
    assert_told(summary, {f"{name}.png.lc": why for name, why in reasons.items()}, capsys.readouterr().err)
    assert images(tmp_path / "out").keys() == {"0.png.png", "2.png.png"}


def test_a_prior_that_the_model_has_not_is_refused(codec: Codec, photos: Path, tmp_path: Path) -> None:
    encode(codec, photos / "0.png", tmp_path / "streams")
    assert codec.priors is not None
    codec.priors = codec.priors._replace(context=None)
    (reason,) = decode(codec, tmp_path / "streams", tmp_path / "out").failures.values()
    assert "coded under a context prior" in reason
    refused("the model has no context prior", encode, codec, photos, tmp_path / "z", prior="context")
    codec.priors = None
    for work, where in ((encode, photos), (decode, tmp_path / "streams")):
        refused("the model has no prior", work, codec, where, tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_files_of_both_priors_are_decoded_together(codec: Codec, photos: Path, tmp_path: Path) -> None:
    for prior in ("context", "factorized"):
        encode(codec, photos, tmp_path / "z" / prior, prior=prior, sample=1)
        shutil.rmtree(tmp_path / "z" / prior / ".latent_codec")
    assert decode(codec, tmp_path / "z", tmp_path / "out", ComputeOptions(batch_size=8)).done == 12
    for name in SIZES:  # the same latents, for dither is the same under both
        assert greatest_difference(*(tmp_path / "out" / p / f"{name}.png" for p in ("context", "factorized"))) <= 1


@pytest.mark.parametrize("rate", [{}, {"bpp": 9.0}, {"psnr": 6.0}, {"max_bytes": 400}], ids=str)
def test_latents_that_no_stream_holds_fail_alone(codec: Codec, tmp_path: Path, rate: dict[str, Any]) -> None:
    codec.state_dict()["backbone.linear.encoder.weight"].fill_(1e37)  # black becomes infinite, middle grey 7.5e36
    codec.state_dict()["backbone.linear.encoder.bias"].zero_()
    failures = encode(codec, black_and_grey(tmp_path / "src"), tmp_path / "z", **rate).failures
    assert "not finite; try --dtype float32" in failures["black.png"]
    assert "larger --step" in failures["grey.png"] and temporary_files(tmp_path / "z") == []
