"""Test folders of `.lc` files: exact sizes, no image lost, files that depend on their image alone."""

import dataclasses
import re
import shutil
import tarfile
import tempfile
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
from latent_codec.bitstream.container import OVERHEAD
from latent_codec.bitstream.rate_control import Rate
from latent_codec.bitstream.stream_codec import StreamReader, dither_seed
from latent_codec.errors import UserError
from latent_codec.folders.decode_images import DecodeOptions
from latent_codec.folders.decode_lc import decode_lc
from latent_codec.folders.encode_latents import encode_latents
from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
from latent_codec.folders.jobs import OVERWRITE, RESUME, Resume
from latent_codec.folders.summary import Summary
from latent_codec.images.read import ReadOptions, read_image
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.metrics import distortion
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of

CPU = ComputeOptions(batch_size=4, workers=2)
RATES: list[dict[str, Any]] = [{}, {"step": 0.3}, {"bpp": 9.0}, {"psnr": 6.0}, {"max_bytes": 400}]


def encode(
    codec: Codec,
    where: str | Path,
    folder: Path,
    compute: ComputeOptions = CPU,
    resume: Resume = RESUME,
    **options: Any,
) -> Summary:
    """Encode by options of `Rate`, `ReadOptions` and `EncodeOptions`; no image is lost."""
    rate = Rate(**{name: options.pop(name) for name in ("step", "bpp", "psnr", "max_bytes") if name in options})
    read = ReadOptions(**{name: options.pop(name) for name in ("background", "max_pixels") if name in options})
    chosen = EncodeOptions(rate=rate, read=read, **options)
    summary = encode_lc(Runner(codec, compute), where, folder, chosen, resume=resume, quiet=True)
    assert summary.done + summary.skipped + len(summary.failures) == summary.found
    assert len(list(folder.rglob("*.lc"))) >= summary.done
    return summary


def decode(
    codec: Codec, where: Path, folder: Path, compute: ComputeOptions = CPU, resume: Resume = RESUME, **options: Any
) -> Summary:
    summary = decode_lc(Runner(codec, compute), where, folder, DecodeOptions(**options), resume=resume, quiet=True)
    assert summary.done + summary.skipped + len(summary.failures) == summary.found
    return summary


def contents(folder: Path) -> dict[str, bytes]:
    """Return all outputs by name; no file must be left that was being written."""
    found = files_of(folder)
    found.pop("failures.jsonl", None)
    assert not [name for name in found if name.endswith(".tmp")]
    return found


def images(folder: Path) -> dict[str, Image.Image]:
    return {name: Image.open(folder / name) for name in contents(folder)}


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i in range(9):
        draw(tmp_path / "photos" / f"{i}.png", *((24, 16), (17, 33), (9, 7))[i % 3], seed=i)
    return tmp_path / "photos"


@pytest.fixture
def streams(codec: Codec, photos: Path, tmp_path: Path) -> Path:
    assert not encode(codec, photos, tmp_path / "streams").failures
    return tmp_path / "streams"


@hypothesis_settings(max_examples=25)
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    mode=st.sampled_from(["L", "RGB", "RGBA"]),
    prior=st.sampled_from(["context", "factorized"]),
    sample=st.none() | st.integers(0, 2**64 - 1),
    rate=st.sampled_from([{}, {"step": 0.1}, {"step": 50.0}, {"max_bytes": 3000, "step": 0.1}]),
)
def test_an_image_comes_back_in_its_exact_size(
    model_file: Path, width: int, height: int, mode: str, prior: Any, sample: int | None, rate: dict[str, Any]
) -> None:
    codec = Codec.load(model_file)
    bands = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, bands), np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels).save(work / "a.png")
        assert not encode(codec, work / "a.png", work / "z", sample=sample, prior=prior, **rate).failures
        assert not decode(codec, work / "z", work / "out").failures
        (image,) = images(work / "out").values()
        assert image.size == (width, height)
        assert image.mode == ("L" if mode == "L" else "RGB")
        header = container.read(work / "z" / "a.png.lc").header
        assert header.prior == prior and (header.seed is None) == (sample is None)
        assert header.geometry.background == ("#ffffff" if mode == "RGBA" else None)


WAYS: list[dict[str, Any]] = [
    {"sample": 3},
    {"step": 0.3, "prior": "factorized"},
    {"bpp": 9.0, "prior": "factorized", "sample": 3},
    {"psnr": 6.0, "sample": 3},
    {"max_bytes": 400},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_files_and_latents_depend_on_no_batch_worker_or_thread(
    codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "4.png", tmp_path / "one")
    forward, latents = codec.decode_uint8, []
    monkeypatch.setattr(
        codec, "decode_uint8", lambda z, _: latents.extend(v.numpy().tobytes() for v in z) or forward(z)
    )
    files, found, threads_before = [], [], torch.get_num_threads()
    for batch, workers, threads in ((1, 1, 1), (8, 3, 1), (3, 2, 2)):
        out, compute = tmp_path / f"{batch}", ComputeOptions(batch_size=batch, workers=workers)
        torch.set_num_threads(threads)
        try:
            assert not encode(codec, photos, out, compute, **options).failures
            latents.clear()
            decode(codec, tmp_path / "1", tmp_path / f"out {batch}", compute)
        finally:
            torch.set_num_threads(threads_before)
        files.append(contents(out))
        found.append(sorted(latents))
    assert files[0] == files[1] == files[2] and len(files[0]) == 9
    assert found[0] == found[1] == found[2] and len(found[0]) == 9
    encode(codec, tmp_path / "one", tmp_path / "alone", **options)
    assert contents(tmp_path / "alone") == {"4.png.lc": files[0]["4.png.lc"]}


def test_a_draw_depends_on_seed_and_name_alone(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / "src" / name, 24, 16, seed=0)
    for name, sample in (("mean", None), ("one", 1), ("again", 1), ("two", 2)):
        torch.manual_seed(len(name))  # the global state plays no part
        encode(codec, tmp_path / "src", tmp_path / name, sample=sample)
    mean, one, again, two = (contents(tmp_path / name) for name in ("mean", "one", "again", "two"))
    assert mean["a.png.lc"] == mean["b.png.lc"]
    assert one == again
    assert len({*one.values(), *two.values()}) == 4
    seeds = [container.unpack(data).header.seed for data in (*one.values(), *two.values())]
    assert seeds == [dither_seed(s, name) for s in (1, 2) for name in ("a.png", "b.png")]
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds) and len(set(seeds)) == 4


def test_draws_lie_around_the_mean(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png", 200, 200)
    reader = StreamReader(codec, "cpu")
    for name, options in (("fine", {"step": 1 / 64}), ("draw", {"sample": 0, "step": 2.0})):
        encode(codec, tmp_path / "a.png", tmp_path / name, **options)
    fine, drawn = (reader.decompress([container.read(tmp_path / n / "a.png.lc")])[0] for n in ("fine", "draw"))
    assert isinstance(fine, torch.Tensor) and isinstance(drawn, torch.Tensor) and codec.priors is not None
    error = (drawn - fine) / torch.from_numpy(2 * codec.priors.channel_steps)[:, None, None]  # in steps
    assert error.abs().max() < 0.52
    assert abs(error.mean()) < 0.02 and abs(error.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize("bpp", [6.0, 20.0])
def test_bits_per_pixel_are_those_of_whole_files_over_the_images_own_pixels(
    codec: Codec, photos: Path, tmp_path: Path, bpp: float
) -> None:
    summary = encode(codec, photos, tmp_path / "z", bpp=bpp)
    for name, data in contents(tmp_path / "z").items():
        width, height = Image.open(photos / name.removesuffix(".lc")).size
        assert 8 * len(data) / (width * height) <= bpp
    refused = [name for name, reason in summary.failures.items() if "allow at least that" in reason]
    assert set(refused) == set(summary.failures) == ({f"{i}.png" for i in (2, 5, 8)} if bpp == 6 else set())


def test_bytes_are_kept_to_or_the_image_fails_alone(codec: Codec, photos: Path, tmp_path: Path) -> None:
    summary = encode(codec, photos, tmp_path / "z", max_bytes=72, step=0.1)
    found = contents(tmp_path / "z")
    assert found and summary.done == len(found)
    assert max(map(len, found.values())) <= 72
    assert all("as small as 72 bytes" in reason for reason in summary.failures.values())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_written_image_has_the_psnr_asked_for(codec: Codec, tmp_path: Path, mode: str) -> None:
    slope = np.linspace(60, 190, 24 * 21).reshape(21, 24).astype(np.uint8)
    Image.fromarray(slope).convert(mode).save(tmp_path / "a.png")
    encode(codec, tmp_path / "a.png", tmp_path / "fine", step=1 / 16)
    best = decoded_psnr(codec, tmp_path / "a.png", tmp_path / "fine")
    summary = encode(codec, tmp_path / "a.png", tmp_path / "z", psnr=best - 1)
    assert not summary.failures
    assert decoded_psnr(codec, tmp_path / "a.png", tmp_path / "z") >= best - 1
    assert len(contents(tmp_path / "z")["a.png.lc"]) < len(contents(tmp_path / "fine")["a.png.lc"])


def decoded_psnr(codec: Codec, original: Path, folder: Path) -> float:
    decode(codec, folder, folder / "out", resume=OVERWRITE)
    a, b = (read_image(path).pixels[None] for path in (original, folder / "out" / "a.png.png"))
    shutil.rmtree(folder / "out")
    return distortion.psnr(a, b).item()


TREE = (
    "a.jpg",
    "a.png",
    "a.webp",
    "a.jpg.png",
    "sub/a.jpg",
    "sub/deep er/ünï/日本語.png",
    "#1 50%.bmp",
    " .png",
    ".png.jpg",
)


def test_trees_and_whole_names_are_kept_and_never_collide(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    for i, name in enumerate(TREE):
        draw(tmp_path / "src" / name, 8 + i, 5)
    encode(codec, tmp_path / "src", tmp_path / "z")
    assert set(contents(tmp_path / "z")) == {f"{name}.lc" for name in TREE}
    for suffix, image_format in (("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")):
        decode(codec, tmp_path / "z", tmp_path / suffix, image_format=suffix)
        found = images(tmp_path / suffix)
        assert {name: image.size for name, image in found.items()} == {
            f"{name}.{suffix}": (8 + i, 5) for i, name in enumerate(TREE)
        }
        assert {image.format for image in found.values()} == {image_format}


@pytest.mark.parametrize("evil", ["../evil.png", "b/../../../evil.png", "b\\evil.png"])
def test_a_member_whose_name_is_no_plain_path_stops_all_before_any_work(
    codec: Codec, photos: Path, tmp_path: Path, evil: str
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(photos, ".")
        archive.add(photos / "0.png", evil)
    for make in (encode_lc, encode_latents):
        with pytest.raises(UserError, match=r"unsafe name .*evil\.png.*; rename it"):
            make(Runner(codec, CPU), tmp_path / "x.tar", tmp_path / "z", quiet=True)
    assert not list(tmp_path.rglob("evil*")) and not list((tmp_path / "z").iterdir())


def test_a_name_too_long_for_its_new_suffix_fails_alone(codec: Codec, tmp_path: Path, draw: Draw) -> None:
    long = "x" * 250 + ".png"
    for name in (long, "a.png"):
        draw(tmp_path / "src" / name, 8, 8)
    assert set(encode(codec, tmp_path / "src", tmp_path / "z").failures) == {long}
    assert set(contents(tmp_path / "z")) == {"a.png.lc"}


def test_existing_files_are_refused_before_any_work_unless_to_be_overwritten(
    codec: Codec, photos: Path, streams: Path, tmp_path: Path
) -> None:
    def ours_no_longer(folder: Path) -> dict[str, bytes]:
        shutil.rmtree(folder / ".latent_codec")
        return contents(folder)

    (streams / "3.png.lc").write_text("mine")
    before = ours_no_longer(streams)
    with pytest.raises(UserError, match=r"exists already: .*\.png\.lc and 8 more.*--overwrite"):
        encode(codec, photos, streams)
    assert contents(streams) == before
    encode(codec, photos, streams, resume=OVERWRITE)
    assert not decode(codec, streams, tmp_path / "out").failures
    before = ours_no_longer(tmp_path / "out")
    with pytest.raises(UserError, match=r"exists already: .*\.png\.png and 8 more.*--overwrite"):
        decode(codec, streams, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert decode(codec, streams, tmp_path / "out", resume=OVERWRITE).done == 9


BREAK: dict[str, Any] = {
    "cut": lambda data: data[:-1],
    "cut within its header": lambda data: data[:20],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "another file": lambda data: b"no stream at all, but long enough for a header's 47 bytes",
    "header": lambda data: data[:18] + bytes([data[18] ^ 1]) + data[19:],
    "payload": lambda data: data[:-9] + bytes([data[-9] ^ 16]) + data[-8:],
    "checksum": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
}


def test_damaged_files_fail_by_name_and_the_others_go_on(
    codec: Codec, streams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = contents(streams)
    for i, change in enumerate(BREAK.values()):
        (streams / f"{i}.png.lc").write_bytes(change(good[f"{i}.png.lc"]))
    summary = decode(codec, streams, tmp_path / "out")
    broken = {f"{i}.png.lc" for i in range(len(BREAK))}
    assert set(summary.failures) == broken
    assert all(re.match(r"(damaged|not a \.lc stream): ", reason) for reason in summary.failures.values())
    assert set(contents(tmp_path / "out")) == {f"{i}.png.png" for i in range(len(BREAK), 9)}
    printed = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[0] for line in printed) == sorted(broken)


def test_a_payload_that_no_encoder_wrote_fails_alone_in_its_batch(codec: Codec, photos: Path, tmp_path: Path) -> None:
    for prior in ("factorized", "context"):
        work = tmp_path / prior
        encode(codec, photos, work / "z", prior=prior)
        header, payload = container.read(work / "z" / "3.png.lc")
        changed = payload[:4] + bytes([payload[4] ^ 1]) + payload[5:]
        (work / "z" / "3.png.lc").write_bytes(container.pack(container.Stream(header, changed)))
        summary = decode(codec, work / "z", work / "out", ComputeOptions(batch_size=8, workers=1))
        assert set(summary.failures) == {"3.png.lc"} and "damaged: " in summary.failures["3.png.lc"]
        assert contents(work / "out").keys() == {f"{i}.png.png" for i in range(9) if i != 3}


def test_no_more_is_read_than_a_header_promises(codec: Codec, streams: Path, tmp_path: Path) -> None:
    for name in ("0.png.lc", "1.png.lc"):
        with (streams / name).open("r+b") as file:
            file.truncate(2**40)  # takes no room on the disk, and would in memory
    with (streams / "1.png.lc").open("r+b") as file:
        file.write(b"text")
    summary = decode(codec, streams, tmp_path / "out")
    assert set(summary.failures) == {"0.png.lc", "1.png.lc"}
    assert "header promises" in summary.failures["0.png.lc"] and "not a .lc" in summary.failures["1.png.lc"]


def test_another_models_files_are_refused_each_by_name(codec: Codec, streams: Path, tmp_path: Path) -> None:
    codec.state_dict()["backbone.linear.encoder.bias"][0] += 1
    summary = decode(codec, streams, tmp_path / "out")
    assert len(summary.failures) == 9 and all("made by another model" in r for r in summary.failures.values())
    assert contents(tmp_path / "out") == {}


def test_a_prior_that_the_model_has_not_is_refused(codec: Codec, photos: Path, streams: Path, tmp_path: Path) -> None:
    assert codec.priors is not None
    codec.priors = codec.priors._replace(context=None)
    summary = decode(codec, streams, tmp_path / "out")
    assert all("coded under a context prior" in reason for reason in summary.failures.values())
    assert summary.done == 0
    with pytest.raises(UserError, match="the model has no context prior"):
        encode(codec, photos, tmp_path / "z", prior="context")
    codec.priors = None
    with pytest.raises(UserError, match="the model has no prior"):
        encode(codec, photos, tmp_path / "z")
    with pytest.raises(UserError, match="the model has no prior"):
        decode(codec, streams, tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_files_of_both_priors_are_decoded_together(codec: Codec, photos: Path, tmp_path: Path) -> None:
    for prior in ("context", "factorized"):
        encode(codec, photos, tmp_path / "z" / prior, prior=prior, sample=1)
    assert decode(codec, tmp_path / "z", tmp_path / "out", ComputeOptions(batch_size=8, workers=2)).done == 18
    for i in range(9):  # the same latents, for dither is the same under both
        a, b = (np.asarray(Image.open(tmp_path / "out" / p / f"{i}.png.png"), int) for p in ("context", "factorized"))
        assert np.abs(a - b).max() <= 1


def test_larger_images_than_allowed_are_refused_both_ways(
    codec: Codec, photos: Path, streams: Path, tmp_path: Path
) -> None:
    for work, where, names in ((encode, photos, "{}.png"), (decode, streams, "{}.png.lc")):
        summary = work(codec, where, tmp_path / work.__name__, max_pixels=400)
        assert set(summary.failures) == {names.format(i) for i in (1, 4, 7)}
        assert all("17x33 = 561 pixels exceed the limit of 400" in reason for reason in summary.failures.values())
        with pytest.raises(UserError, match="limit of 0 pixels refuses every image"):
            work(codec, where, tmp_path / "none", max_pixels=0)


def test_options_without_sense_are_refused_before_any_work(codec: Codec, photos: Path, tmp_path: Path) -> None:
    for options, reason in (
        ({"background": "white"}, "'white' is not a colour"),
        ({"sample": -1}, "--sample -1 is no seed"),
        ({"sample": 2**64}, "is no seed"),
    ):
        with pytest.raises(UserError, match=reason):
            encode(codec, photos, tmp_path / "z", **options)
    two = Codec(dataclasses.replace(codec.config, image_channels=2))
    for work in (encode, decode):
        with pytest.raises(UserError, match="images of 2 channels"):
            work(two, photos, tmp_path / "z")
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_latents_that_no_stream_holds_fail_alone(codec: Codec, tmp_path: Path, rate: dict[str, Any]) -> None:
    codec.state_dict()["backbone.linear.encoder.weight"].fill_(1e37)  # black becomes infinite, middle grey 7.5e36
    codec.state_dict()["backbone.linear.encoder.bias"].zero_()
    (tmp_path / "src").mkdir()
    for name, level in (("black", 0), ("grey", 128)):
        Image.new("L", (8, 8), level).save(tmp_path / "src" / f"{name}.png")
    failures = encode(codec, tmp_path / "src", tmp_path / "z", **rate).failures
    assert "not finite; try --dtype float32" in failures["black.png"]
    assert "larger --step" in failures["grey.png"]


def test_the_summary_counts_the_real_bytes_and_pixels(codec: Codec, photos: Path, tmp_path: Path) -> None:
    encoded = encode(codec, photos, tmp_path / "z")
    found = contents(tmp_path / "z")
    size, pixels = sum(map(len, found.values())), 3 * (24 * 16 + 17 * 33 + 9 * 7)
    assert (encoded.bytes_in, encoded.bytes_out) == (sum(map(len, contents(photos).values())), size)
    assert f"{8 * size / pixels:.3f} bits per pixel" in str(encoded)
    assert all(len(data) == OVERHEAD + len(container.unpack(data).payload) for data in found.values())
    decoded = decode(codec, tmp_path / "z", tmp_path / "out")
    assert decoded.bytes_in == size
    assert decoded.bytes_out == sum(map(len, contents(tmp_path / "out").values()))


def test_coarse_networks_still_make_sound_files(codec: Codec, photos: Path, tmp_path: Path) -> None:
    compute = ComputeOptions(dtype="bfloat16", batch_size=4, workers=2)
    assert not encode(codec, photos, tmp_path / "z", compute, psnr=6.0).failures
    assert not decode(codec, tmp_path / "z", tmp_path / "out", compute).failures
