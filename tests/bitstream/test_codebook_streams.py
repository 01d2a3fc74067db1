"""`.lc` files of models with a codebook hold its indices; those of an autoencoder hold its latents, rounded."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.bitstream.container import pack, unpack
from latent_codec.bitstream.rate_control import Rate
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import evaluate
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.folders.decode_lc import decode_lc
from latent_codec.folders.encode_latents import encode_latents
from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
from latent_codec.images.geometry import pad
from latent_codec.images.sources import find_images
from latent_codec.inference.calibration import calibrate
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.info import describe
from latent_codec.model.codec import Codec
from latent_codec.model.config import FiniteScalarConfig, IdentityConfig, VectorQuantizerConfig
from latent_codec.prior.rans import Coder
from tests.conftest import files_of
from tests.support import reference_decoder
from tests.support.errors import refused
from tests.support.networks import make_codec
from tests.support.subject import decompress
from tools.stress import fuzz
from tools.stress.mutants import mutate

CPU = ComputeOptions(batch_size=2, workers=1)
SIZES = [(70, 41), (8, 8), (1, 1), (33, 64), (40, 40)]
VQ, FSQ = VectorQuantizerConfig(codes=37), FiniteScalarConfig(levels=(5, 3, 2, 4))
codebooks = pytest.mark.parametrize("made", [VQ, FSQ], ids=["vq", "fsq"], indirect=True)
kinds = pytest.mark.parametrize("made", [VQ, FSQ, IdentityConfig()], ids=["vq", "fsq", "identity"], indirect=True)


class Made(NamedTuple):
    """A model with random weights, measured on photos, and their files."""

    runner: Runner
    reference: reference_decoder.Model
    folder: Path

    photos: Path
    files: dict[str, bytes]

    @property
    def model(self) -> Codec:
        return self.runner.codec

    def read(self, data: bytes) -> torch.Tensor:
        return decompress(StreamReader(self.model, "cpu"), data)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    model = make_codec(dataclasses.replace(Codec.load(model_file).config, bottleneck=request.param))
    calibrate(model, find_images(folder / "photos"), "the photos", quiet=True)
    model.save(folder / "model.safetensors")
    runner = Runner(Codec.load(folder / "model.safetensors"), CPU)
    files = encode(runner, folder / "photos", folder / "lc")
    reference = reference_decoder.read_model(folder / "model.safetensors")
    return Made(runner, reference, folder, folder / "photos", files)


def encode(runner: Runner, photos: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    summary = encode_lc(runner, photos, folder, EncodeOptions(**options), quiet=True)
    assert summary.done == len(SIZES) and not summary.failures
    return files_of(folder)


@codebooks
def test_a_file_holds_the_codes_of_its_image(made: Made) -> None:
    for source in find_images(made.photos):
        data = made.files[f"{source.name}.lc"]
        with torch.no_grad():
            posterior = made.model.encode(pad(source.read().pixels, made.model.factor)[None])
        assert torch.equal(made.read(data), posterior.mode()[0])
        again = reference_decoder.decode(data, made.reference)
        np.testing.assert_array_equal(again.values, posterior.coded[0].numpy())
        np.testing.assert_array_equal(again.latents, posterior.mode()[0].numpy())


@codebooks
def test_files_do_not_depend_on_batch_or_tiles(made: Made, tmp_path: Path) -> None:
    backbone = made.model.backbone
    tile = 8 * (2 * max(backbone.encoder_margin, backbone.decoder_margin) + 1)  # pyright: ignore
    runner = Runner(made.model, dataclasses.replace(CPU, batch_size=1, tile=tile))
    assert encode(runner, made.photos, tmp_path / "lc") == made.files


@codebooks
def test_the_table_prices_codes_by_how_often_they_were_seen(made: Made) -> None:
    assert made.model.priors is not None
    tables = made.model.priors.factorized.tables
    assert len(tables) == 1 and tables.first.tolist() == [0] and tables.sizes.tolist() == [made.model.config.codes + 1]
    counts = np.zeros(made.model.config.codes)
    for data in made.files.values():
        values = reference_decoder.decode(data, made.reference).values
        counts += np.bincount(values.flatten(), minlength=len(counts))
    frequency = tables.frequencies(0)[:-1]
    assert (np.diff(frequency[np.argsort(counts, kind="stable")]) >= -1).all()  # rounding may take one
    expected = (counts + 0.5) / (counts.sum() + len(counts) / 2 + 0.5)
    np.testing.assert_allclose(frequency / 2**24, expected, rtol=1e-4)


@codebooks
def test_options_that_cannot_matter_are_refused(made: Made, tmp_path: Path) -> None:
    rates = {"--step": Rate(step=1), "--bpp": Rate(bpp=1), "--psnr": Rate(psnr=20), "--max-bytes": Rate(max_bytes=100)}
    for flag, options in {"--sample": {"sample": 3}, **{flag: {"rate": rate} for flag, rate in rates.items()}}.items():
        with pytest.raises(UserError, match=f"^{flag}: this model's files hold the indices"):
            encode(made.runner, made.photos, tmp_path / "lc", **options)
    refused("this model's are indices", encode, made.runner, made.photos, tmp_path / "lc", refine=1)
    assert not (tmp_path / "lc").exists()


@kinds
def test_latents_to_train_on_need_a_gaussian(made: Made, tmp_path: Path) -> None:
    kind = made.model.config.bottleneck.kind
    with pytest.raises(UserError, match=f"which the {kind} bottleneck does not have; write .lc files"):
        encode_latents(made.runner, made.photos, tmp_path / "latents", quiet=True)
    with pytest.raises(UserError, match=f"--rd .* a {kind} bottleneck"):
        rate_distortion(made.runner, made.photos, RateDistortionOptions(steps=[1.0]))


@kinds
def test_an_evaluation_counts_the_bytes_of_the_files(made: Made, tmp_path: Path) -> None:
    report = evaluate(made.runner, made.photos, out=tmp_path / "out", quiet=True)
    files = files_of(tmp_path / "out" / "streams")
    assert files == made.files
    assert report.summary["disk_bpp"] == pytest.approx(8 * sum(map(len, files.values())) / sum(w * h for w, h in SIZES))
    assert "kl_bpp" not in report.summary and all("kl_bpp" not in record for record in report.images)
    assert decode_lc(made.runner, made.folder / "lc", tmp_path / "images", quiet=True).done == len(SIZES)
    assert files_of(tmp_path / "images") == files_of(tmp_path / "out" / "decoded")
    assert [Image.open(tmp_path / "images" / f"{i}.png.png").size for i in range(len(SIZES))] == SIZES
    (tmp_path / "out" / "results.json").unlink()
    with pytest.raises(UserError, match=r"without the results\.json of an evaluation"):
        evaluate(made.runner, made.photos, out=tmp_path / "out", quiet=True)


@codebooks
def test_info_names_the_codebook(made: Made) -> None:
    model, file = str(made.folder / "model.safetensors"), str(made.folder / "lc" / "0.png.lc")
    assert f"a table of {made.model.config.codes} codes" in describe(model)
    assert f"latents     indices of a codebook of {made.model.config.codes}\n" in describe(file, model)
    assert "the mean, rounded, step 1" in describe(file, None)  # the file alone cannot tell


@pytest.mark.slow
@codebooks
def test_mutants_are_refused_or_are_exactly_what_an_encoder_writes(made: Made) -> None:
    originals = list(made.files.values())
    judge = fuzz.Judge(made.model, originals)
    with torch.inference_mode():
        verdicts = judge.judge([mutate(originals, 0, n) for n in range(400)])
    assert [v for v in verdicts if v.outcome == "WRONG"] == []
    assert sum(v.outcome == "refused" for v in verdicts) > 250
    assert any("outside 0 to" in v.reason or "step or dither" in v.reason for v in verdicts)


@codebooks
def test_indices_beyond_the_codebook_and_steps_are_refused(made: Made) -> None:
    sound, codes, coder = unpack(made.files["1.png.lc"]), made.model.config.codes, StreamCodec(made.model, "cpu")
    assert codes is not None

    def assert_refused(message: str, reason: str, **change: Any) -> None:
        stream = dataclasses.replace(sound, **change)
        refused(message, made.read, pack(stream))
        with pytest.raises(reference_decoder.RefusalError, match=reason):
            reference_decoder.decode(pack(stream), made.reference)

    for value in (-1, codes, 2**15 - 1):
        payload = Coder(coder.prior.tables).encode([(np.array([value]), np.array([0]))])
        assert_refused(f"outside 0 to {codes - 1}", "no such code", payload=payload)
    for change in ({"step": 1025}, {"seed": 0}):
        assert_refused("a step or dither", "no step", **change)
    with pytest.raises(UserError, match="not finite"):  # which is index -1
        coder.scale(torch.tensor([[[3, -1]]]), 1024, None)
    assert coder.code(coder.scale(torch.tensor([[[3, 1]]]), 1024, None)).quantized.values.tolist() == [[[3, 1]]]


@pytest.mark.parametrize("made", [IdentityConfig()], indirect=True)
def test_an_autoencoder_has_one_step_for_all_channels(made: Made, tmp_path: Path) -> None:
    assert made.model.priors is not None and made.model.statistics is not None
    assert made.model.statistics.posterior_std is None
    rms = np.sqrt(np.mean(np.square(made.model.statistics.std)))
    np.testing.assert_allclose(made.model.priors.channel_steps, np.sqrt(12) / 16 * rms, rtol=1e-6)
    rates = (Rate(step=step) for step in (4.0, 0.5))
    coarse, fine = (encode(made.runner, made.photos, tmp_path / f"{rate.step}", rate=rate) for rate in rates)
    assert sum(map(len, coarse.values())) < sum(map(len, fine.values()))
