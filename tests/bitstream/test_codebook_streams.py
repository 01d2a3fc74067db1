"""`.lc` files of models with a codebook hold its indices; those of an autoencoder its latents, rounded."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.bitstream.container import Stream, pack, unpack
from latent_codec.bitstream.rate_control import Rate
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import evaluate
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.folders.decode_lc import decode_streams
from latent_codec.folders.encode_latents import encode_folder
from latent_codec.folders.encode_lc import encode_streams
from latent_codec.images.geometry import pad
from latent_codec.images.sources import find_images
from latent_codec.inference.calibration import calibrate
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.info import describe
from latent_codec.model.codec import Codec
from latent_codec.model.config import BottleneckConfig, FiniteScalarConfig, IdentityConfig, VectorQuantizerConfig
from latent_codec.prior.rans import Coder
from tests.conftest import Draw, files_of
from tests.support import reference_decoder
from tools.stress import fuzz
from tools.stress.mutants import mutate

CPU = ComputeOptions(batch_size=2, workers=1)
SIZES = [(70, 41), (8, 8), (1, 1), (33, 64), (40, 40)]
VQ, FSQ = VectorQuantizerConfig(codes=37), FiniteScalarConfig(levels=(5, 3, 2, 4))
codebooks = pytest.mark.parametrize("bottleneck", [VQ, FSQ], ids=["vq", "fsq"])
kinds = pytest.mark.parametrize("bottleneck", [VQ, FSQ, IdentityConfig()], ids=["vq", "fsq", "identity"])


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i, size in enumerate(SIZES):
        draw(tmp_path / "photos" / f"{i}.png", *size, seed=i)
    return tmp_path / "photos"


@pytest.fixture
def model(codec: Codec, bottleneck: BottleneckConfig, photos: Path, tmp_path: Path) -> Codec:
    """Random weights, measured on the photos, through a file."""
    config = dataclasses.replace(codec.config, bottleneck=bottleneck)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Codec(config).eval()
    calibrate(made, find_images(photos), "the photos", quiet=True)
    made.save(tmp_path / "model.safetensors")
    return Codec.load(tmp_path / "model.safetensors")


def encode(model: Codec, photos: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    summary = encode_streams(Runner(model, CPU), photos, folder, **{"rate": Rate(), "quiet": True} | options)
    assert summary.done == len(SIZES) and not summary.failures
    return files_of(folder)


def read(model: Codec, data: bytes) -> torch.Tensor:
    stream, reader = unpack(data), StreamReader(model, "cpu")
    reader.check(stream)
    (found,) = reader.decompress([stream])
    if isinstance(found, UserError):
        raise found
    return found


@codebooks
def test_a_file_holds_the_codes_of_its_image(model: Codec, photos: Path, tmp_path: Path) -> None:
    independent = reference_decoder.read_model(tmp_path / "model.safetensors")
    for name, data in encode(model, photos, tmp_path / "lc").items():
        pixels = next(s for s in find_images(photos) if f"{s.name}.lc" == name).read().pixels
        with torch.no_grad():
            posterior = model.encode(pad(pixels, model.factor)[None])
        assert torch.equal(read(model, data), posterior.mode()[0])
        again = reference_decoder.decode(data, independent)
        np.testing.assert_array_equal(again.values, posterior.coded[0].numpy())
        np.testing.assert_array_equal(again.latents, posterior.mode()[0].numpy())


@kinds
def test_folders_come_back_at_their_sizes(model: Codec, photos: Path, tmp_path: Path) -> None:
    encode(model, photos, tmp_path / "lc")
    assert decode_streams(Runner(model, CPU), tmp_path / "lc", tmp_path / "images", quiet=True).done == len(SIZES)
    for i, size in enumerate(SIZES):
        assert Image.open(tmp_path / "images" / f"{i}.png.png").size == size


@codebooks
def test_files_do_not_depend_on_batch_or_tiles(model: Codec, photos: Path, tmp_path: Path) -> None:
    together = encode(model, photos, tmp_path / "a")
    tile = 8 * (2 * max(model.backbone.encoder_margin, model.backbone.decoder_margin) + 1)
    others = [ComputeOptions(batch_size=1, workers=1), dataclasses.replace(CPU, tile=tile)]
    for i, compute in enumerate(others):
        encode_streams(Runner(model, compute), photos, tmp_path / f"{i}", rate=Rate(), quiet=True)
        assert files_of(tmp_path / f"{i}") == together


@codebooks
def test_the_table_prices_codes_as_they_were_seen(model: Codec, photos: Path, tmp_path: Path) -> None:
    assert model.priors is not None
    tables = model.priors.factorized.tables
    assert len(tables) == 1 and tables.first.tolist() == [0] and tables.sizes.tolist() == [model.config.codes + 1]
    counts = np.zeros(model.config.codes)
    for data in encode(model, photos, tmp_path / "lc").values():
        values = reference_decoder.decode(data, reference_decoder.read_model(tmp_path / "model.safetensors")).values
        counts += np.bincount(values.flatten(), minlength=len(counts))
    frequency = tables.frequencies(0)[:-1]
    assert (np.diff(frequency[np.argsort(counts, kind="stable")]) >= -1).all()  # rounding may take one
    expected = (counts + 0.5) / (counts.sum() + len(counts) / 2 + 0.5)
    np.testing.assert_allclose(frequency / 2**24, expected, rtol=1e-4)


@codebooks
@pytest.mark.parametrize(
    ("rate", "sample", "flag"),
    [
        (Rate(step=1.0), None, "--step"),
        (Rate(bpp=1.0), None, "--bpp"),
        (Rate(psnr=20.0), None, "--psnr"),
        (Rate(max_bytes=100), None, "--max-bytes"),
        (Rate(), 3, "--sample"),
    ],
)
def test_what_leaves_no_choice_is_refused(
    model: Codec, photos: Path, tmp_path: Path, rate: Rate, sample: int | None, flag: str
) -> None:
    with pytest.raises(UserError, match=f"^{flag}: this model's files hold the indices"):
        encode_streams(Runner(model, CPU), photos, tmp_path / "lc", rate=rate, sample=sample, quiet=True)
    assert not (tmp_path / "lc").exists()


@kinds
def test_latents_to_train_on_need_a_gaussian(model: Codec, photos: Path, tmp_path: Path) -> None:
    kind = model.config.bottleneck.kind
    with pytest.raises(UserError, match=f"which a {kind} bottleneck does not have; write .lc files"):
        encode_folder(Runner(model, CPU), photos, tmp_path / "latents", quiet=True)
    with pytest.raises(UserError, match=f"--rd .* a {kind} bottleneck"):
        rate_distortion(Runner(model, CPU), photos, RateDistortionOptions(steps=[1.0]))


@kinds
def test_an_evaluation_counts_the_bytes_of_the_files(model: Codec, photos: Path, tmp_path: Path) -> None:
    report = evaluate(Runner(model, CPU), photos, out=tmp_path / "out", quiet=True)
    files = files_of(tmp_path / "out" / "streams")
    pixels = sum(w * h for w, h in SIZES)
    assert report.summary["disk_bpp"] == pytest.approx(8 * sum(map(len, files.values())) / pixels)
    assert "kl_bpp" not in report.summary and all("kl_bpp" not in record for record in report.images)
    decode_streams(Runner(model, CPU), tmp_path / "out" / "streams", tmp_path / "images", quiet=True)
    assert files_of(tmp_path / "images") == files_of(tmp_path / "out" / "decoded")
    (tmp_path / "out" / "results.json").unlink()
    with pytest.raises(UserError, match=r"without the results\.json of an evaluation"):
        evaluate(Runner(model, CPU), photos, out=tmp_path / "out", quiet=True)


@codebooks
def test_info_says_how_many_codes(model: Codec, tmp_path: Path) -> None:
    assert f"a table of {model.config.codes} codes" in describe(str(tmp_path / "model.safetensors"))


@codebooks
def test_info_calls_a_files_latents_indices(model: Codec, photos: Path, tmp_path: Path) -> None:
    name = next(iter(encode(model, photos, tmp_path / "lc")))
    text = describe(str(tmp_path / "lc" / name), str(tmp_path / "model.safetensors"))
    assert f"latents     indices of a codebook of {model.config.codes}\n" in text
    assert "the mean, rounded, step 1" in describe(str(tmp_path / "lc" / name), None)  # the file alone cannot tell


# What is damaged is refused


@codebooks
def test_mutants_are_refused_or_are_exactly_what_an_encoder_writes(model: Codec, photos: Path, tmp_path: Path) -> None:
    originals = list(encode(model, photos, tmp_path / "lc").values())
    judge = fuzz.Judge(model, originals)
    with torch.inference_mode():
        verdicts = judge.judge([mutate(originals, 0, n) for n in range(1500)])
    assert [v for v in verdicts if v.outcome == "WRONG"] == []
    assert sum(v.outcome == "refused" for v in verdicts) > 1000
    assert any("outside 0 to" in v.reason or "step or dither" in v.reason for v in verdicts)


@codebooks
def test_every_flipped_bit_and_truncation_is_refused(model: Codec, photos: Path, tmp_path: Path) -> None:
    data = bytearray(encode(model, photos, tmp_path / "lc")["0.png.lc"])
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError):
            unpack(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
    for length in range(len(data)):
        with pytest.raises(UserError):
            unpack(bytes(data[:length]))


@codebooks
def test_indices_beyond_the_codebook_and_steps_are_refused(model: Codec, tmp_path: Path, photos: Path) -> None:
    sound = unpack(encode(model, photos, tmp_path / "lc")["1.png.lc"])
    streams, codes = StreamCodec(model, "cpu"), model.config.codes
    independent = reference_decoder.read_model(tmp_path / "model.safetensors")
    assert codes is not None
    for value in (-1, codes, 2**15 - 1):
        payload = Coder(streams.prior.tables).encode([(np.array([value]), np.array([0]))])
        data = pack(Stream(sound.header, payload))
        with pytest.raises(UserError, match=f"outside 0 to {codes - 1}"):
            read(model, data)
        with pytest.raises(reference_decoder.RefusalError, match="no such code"):
            reference_decoder.decode(data, independent)
    for change in ({"step": 1025}, {"seed": 0}):
        data = pack(Stream(dataclasses.replace(sound.header, **change), sound.payload))
        with pytest.raises(UserError, match="a step or dither"):
            read(model, data)
        with pytest.raises(reference_decoder.RefusalError, match="no step"):
            reference_decoder.decode(data, independent)


@codebooks
def test_latents_that_are_not_finite_are_an_error(model: Codec) -> None:
    with pytest.raises(UserError, match="not finite"):
        StreamCodec(model, "cpu").scale(torch.tensor([[[3, -1]]]), 1024, None)
    coder = StreamCodec(model, "cpu")
    good = coder.quantize(coder.scale(torch.tensor([[[3, 1]]]), 1024, None))
    assert good.values.tolist() == [[[3, 1]]]


@pytest.mark.parametrize("bottleneck", [IdentityConfig()])
def test_an_autoencoder_has_one_step_for_all_channels(model: Codec, photos: Path, tmp_path: Path) -> None:
    assert model.priors is not None and model.statistics is not None
    assert model.statistics.posterior_std is None
    rms = np.sqrt(np.mean(np.square(model.statistics.std)))
    np.testing.assert_allclose(model.priors.channel_steps, np.sqrt(12) / 16 * rms, rtol=1e-6)
    coarse, fine = (
        sum(map(len, encode(model, photos, tmp_path / f"{step}", rate=Rate(step=step)).values())) for step in (4.0, 0.5)
    )
    assert coarse < fine
