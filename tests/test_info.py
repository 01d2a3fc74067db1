"""Check that `info` describes a file as it is."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from latent_codec.bitstream import container
from latent_codec.bitstream.container import OVERHEAD, unpack
from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import UserError
from latent_codec.info import describe
from latent_codec.latents.format import INDEX
from latent_codec.model.codec import Codec
from latent_codec.model.config import LinearConfig
from latent_codec.model.describe import count_flops
from tests.conftest import Draw
from tests.support.errors import refused
from tests.support.folder import make
from tests.support.networks import CONV
from tests.support.prior import context_prior
from tests.test_cli import Do, Run
from tests.test_cli import do as do  # the fixtures
from tests.test_cli import run as run
from train.config.presets import photo


def test_the_photo_preset_keeps_to_its_budget() -> None:
    # The encoder's limit is 1/50 of the SD-VAE encoder's 270 GFLOP for a 256x256 image.
    flops = count_flops(photo().codec)
    assert 1e9 < flops.encoder <= 5.4e9 and 1e9 < flops.decoder <= 12.4e9


def test_flops_are_two_for_each_multiply_accumulate(codec: Codec) -> None:
    config = dataclasses.replace(codec.config, backbone=LinearConfig(patch=8))
    encoder, decoder = 2 * 64 * 192 * 8, 2 * 64 * 192 * 4  # 8x8 patches of 192 values; mean and logvar of 4 channels
    assert count_flops(config, 64)[:2] == (encoder, decoder)


def test_flops_of_every_convolution_and_of_attention_are_counted(codec: Codec) -> None:
    backbones = (dataclasses.replace(CONV, widths=(8, 16), mid_attention=attention) for attention in (True, False))
    with_attention, without = (count_flops(dataclasses.replace(codec.config, backbone=b), 32) for b in backbones)
    n, d = 16 * 16, 16  # tokens, width
    expected = 4 * 2 * n * d * d + 2 * 2 * n * n * d  # four projections, two products
    assert with_attention.encoder - without.encoder == expected
    assert with_attention.decoder - without.decoder == expected


def test_counting_leaves_no_trace_and_needs_no_memory(codec: Codec) -> None:
    state = torch.get_rng_state()
    huge = dataclasses.replace(codec.config.backbone, encoder_widths=(8, 2**17), decoder_widths=(8, 2**17))
    assert count_flops(dataclasses.replace(codec.config, backbone=huge), 8).encoder > 2**34 * 9 * 2 * 2
    assert torch.equal(torch.get_rng_state(), state) and torch.zeros(1).device.type == "cpu"


def assert_says(where: Path, *parts: object, model: Path | None = None) -> str:
    """Describe what is there, with each of these parts; return the whole text."""
    text = describe(str(where), model and str(model))
    assert [part for part in map(str, parts) if part not in text] == []
    return text


def assert_described(codec: Codec, folder: Path, *parts: object) -> str:
    codec.save(folder / "m.safetensors")
    return assert_says(folder / "m.safetensors", *parts)


def test_a_models_id_size_and_parts_are_said(codec: Codec, tmp_path: Path) -> None:
    flops, parts = count_flops(codec.config), (codec.model_id, codec.config.backbone, codec.config.likelihood)
    size = f"encoder {flops.encoder / 1e9:.2f} GFLOP, decoder {flops.decoder / 1e9:.2f} GFLOP per 256x256"
    assert_described(codec, tmp_path, *parts, size, "4 channels, 1/8 of each side", "over made up (3 images)")
    other = Codec(dataclasses.replace(codec.config, backbone=LinearConfig(patch=6)))  # 6 does not divide 256
    assert_described(other, tmp_path, "258x258 image", "statistics  none")


def test_training_is_described_from_an_exports_provenance(codec: Codec, tmp_path: Path) -> None:
    training = {"data_images": 12, "data": ["a.tar", "b.tar"], "git_commit": "abc"}
    codec.provenance = {"progress": {"step": 7, "skipped": 0, "minutes": 3.2}, "training": training}
    assert_described(codec, tmp_path, "7 steps, 3 minutes, 12 images of a.tar, b.tar, commit abc")
    for provenance in ({"progress": 5}, {"progress": {"step": 1}}, {"imported_from": "elsewhere"}):
        codec.provenance = provenance
        assert_described(codec, tmp_path, *provenance)


@pytest.fixture
def latents(codec: Codec, tmp_path: Path, draw: Draw) -> Path:
    for name, width in (("a", 16), ("b", 17), ("c", 16)):
        draw(tmp_path / "src" / f"{name}.png", width, 16)
    make("latents", codec, tmp_path / "src", tmp_path / "latents")
    return tmp_path / "latents"


def test_latents_are_counted_with_their_real_bytes(codec: Codec, latents: Path, tmp_path: Path) -> None:
    (shard,) = latents.glob("*.safetensors")
    size = shard.stat().st_size
    rate = f"{8 * size / (16 * 16 + 17 * 16 + 16 * 16):.3f} bits per pixel"
    about = (codec.model_id, rate, "3 images in 1 shards", "float16, raw, 1/8", "over made up")
    text = assert_says(latents, *about)
    assert describe(str(latents / INDEX)) == describe(str(shard)) == text
    assert_says(shard.rename(tmp_path / "moved.safetensors"), f"3 images in 1 shards, {size / 1e6:.2f} MB")
    refused(f"1 of its 1 shards are missing: {re.escape(shard.name)}", describe, str(latents))


def test_priors_are_described(codec: Codec, tmp_path: Path) -> None:
    assert codec.priors is not None and codec.priors.context is not None
    factorized = f"factorized: {len(codec.priors.factorized.tables)} tables", "steps of 0.1 to 0.25"
    context = "context: groups of 1, 3 channels, levels 2, width 8, 481 tables; streams of format 3"
    assert_described(codec, tmp_path, *factorized, context)
    codec.priors = codec.priors._replace(context=context_prior((1, 3), 8, 0, centred=True))
    assert_described(codec, tmp_path, "groups of 1, 3 channels, width 8, 481 tables; streams of format 2")
    codec.priors = codec.priors._replace(context=None)
    assert "context" not in assert_described(codec, tmp_path)
    codec.priors = None
    assert_described(codec, tmp_path, "priors      none")


NAMES, BIAS = ("plain.png.lc", "special.jpg.lc"), "backbone.linear.encoder.bias"


@pytest.fixture
def streams(codec: Codec, tmp_path: Path, draw: Draw) -> Path:
    """Make plain.png.lc with the context prior, and special.jpg.lc: grey, rotated, dithered, factorised, step 1/2.

    Their model, ../maker.safetensors, makes streams in no other module.
    """
    codec.state_dict()[BIAS][0] += 1
    codec.save(tmp_path / "maker.safetensors")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = draw(tmp_path / "src" / "plain.png", 16, 16)
    special = draw(tmp_path / "src" / "special.jpg", 30, 20, "L", exif=exif)
    assert make("streams", codec, plain, tmp_path / "streams", step=1.0).done == 1
    assert make("streams", codec, special, tmp_path / "streams", step=0.5, sample=1, prior="factorized").done == 1
    return tmp_path / "streams"


def test_a_stream_is_described_without_its_model(streams: Path) -> None:
    plain, special = (streams / name for name in NAMES)
    size, header = plain.stat().st_size, container.read(special)
    sizes = f"plain.png.lc, {size} bytes", f"{8 * size / 256:.3f} bits", f"{size - OVERHEAD} bytes, {OVERHEAD} more"
    assert_says(plain, *sizes, "16x16, colour\n", "context", "the mean, rounded, step 1\n")
    origin = "20x30, grey, turned upright from EXIF orientation 6\n", "factorized", header.stream_id.hex()
    assert_says(special, *origin, f"a draw, dithered with seed {header.seed}, step 0.5")


def test_a_streams_model_is_recognised(streams: Path, codec: Codec, tmp_path: Path) -> None:
    maker, other = tmp_path / "maker.safetensors", tmp_path / "other.safetensors"
    for name in NAMES:
        assert_says(streams / name, f"model       {maker} (", model=maker)
    codec.state_dict()[BIAS][0] += 1
    for priors in (codec.priors, None):
        codec.priors = priors
        codec.save(other)
        assert_says(streams / "plain.png.lc", "model       not ", model=other)
    refused("neither a file nor a shipped model", describe, str(streams / "plain.png.lc"), "no-such-model")


@pytest.mark.slow
def test_a_stream_of_a_shipped_model_names_it_and_so_does_the_error_of_decoding_it_with_another(
    streams: Path, codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latent_codec.model.shipped.FOLDERS", (tmp_path / "shipped",))
    assert_says(streams / "plain.png.lc", "model       stream id ")  # no model is there
    (tmp_path / "shipped").mkdir()
    (tmp_path / "maker.safetensors").rename(tmp_path / "shipped" / "maker.safetensors")
    codec.state_dict()[BIAS][0] += 1
    codec.save(tmp_path / "shipped" / "another.safetensors")
    for name in NAMES:
        assert_says(streams / name, "model       maker (")
    with pytest.raises(UserError, match="give --model maker, which made it"):
        StreamReader(codec, "cpu").check(unpack((streams / "plain.png.lc").read_bytes()))


def test_a_folder_of_streams_is_counted_with_its_real_bytes(streams: Path, tmp_path: Path) -> None:
    maker, size = tmp_path / "maker.safetensors", sum(f.stat().st_size for f in streams.glob("*.lc"))
    about = "2 images", f"{8 * size / (256 + 600):.3f} bits per pixel", "1 rounded, 1 dithered, step 0.5 to 1"
    assert assert_says(streams, *about, model=maker).count(f"model       {maker} (") == 2  # an id for each prior


def test_streams_in_tar_shards_are_counted_as_those_in_a_folder(do: Do, run: Run) -> None:
    assert do("encode photos files").code == do("encode photos shards --tar").code == 0
    assert run("info", "shards").out == run("info", "files").out
    (shard,) = Path("shards").glob("*.tar")
    assert run("info", shard).out == run("info", "files").out
    Path("shards/cut.tar").write_bytes(b"x" * 100)
    found = run("info", "shards")
    assert found.code == 1 and "3 images" in found.out and "; 1 damaged" in found.out and "shards/cut.tar" in found.err
    shard.unlink()
    for where in ("shards", "shards/cut.tar"):
        found = run("info", where)
        assert found.code == 2 and "shards/cut.tar" in found.err and "safetensors" not in found.err


def test_a_cut_shard_of_latents_is_named(do: Do) -> None:
    assert do("encode photos latents --format safetensors").code == 0
    (shard,) = Path("latents").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    found = do("info latents")
    assert found.code == 1 and "; 1 damaged" in found.out and f"{shard}: damaged" in found.err


def test_damaged_streams_are_refused_by_name(streams: Path) -> None:
    path = streams / "plain.png.lc"
    path.write_bytes(path.read_bytes()[:-1])
    refused(r"plain\.png\.lc: damaged", describe, str(path))
    damaged: list[str] = []
    assert "1 images" in (text := describe(str(streams), None, damaged)) and "; 1 damaged" in text
    assert len(damaged) == 1 and damaged[0].startswith("plain.png.lc: damaged")
    for other in streams.glob("*.lc"):
        other.write_bytes(b"x")
    refused("all 2 files are damaged", describe, str(streams))
    refused(r"none\.lc: cannot be read", describe, str(streams / "none.lc"))


def test_files_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"\x00" * 100)
    (tmp_path / "junk.safetensors").write_text("text")
    reasons = {name: "not a safetensors file" for name in ("junk", "junk.safetensors")}
    reasons |= {"none": "neither a file nor a shipped model", ".": "no latents there", INDEX: "no latents there"}
    for name, reason in reasons.items():
        refused(reason, describe, str(tmp_path / name))
