"""The codec's interface, and finding and loading a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latent_codec.errors import UserError
from latent_codec.model import codec as codec_module
from latent_codec.model.codec import Codec
from latent_codec.model.shipped import resolve
from latent_codec.storage.json_config import dumps
from latent_codec.storage.tensors import KEY
from tests.support.data import ROOT

SHIPPED = ROOT / "checkpoints" / "photo.safetensors"


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def test_one_latent_element_stands_for_factor_squared_pixels(codec: Codec, pixels: torch.Tensor) -> None:
    posterior = codec.encode(pixels)
    assert codec.factor == 8
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 2, 3)
    assert codec.decode(posterior.mode()).shape == pixels.shape
    assert codec.decode_uint8(posterior.mode()).shape == pixels.shape


@torch.inference_mode()
def test_uint8_pixels_are_the_likelihoods_floats(codec: Codec, pixels: torch.Tensor) -> None:
    a, b = codec.encode(pixels), codec.encode(codec.likelihood.from_uint8(pixels))
    assert torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar)


@torch.inference_mode()
def test_decoded_bytes_are_the_decoded_floats_rounded_and_clipped(codec: Codec) -> None:
    z = 30 * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    levels = (codec.decode(z) + 1) * 127.5
    assert levels.min() < 0 and levels.max() > 255
    assert torch.equal(codec.decode_uint8(z), levels.round().clamp(0, 255).to(torch.uint8))


@torch.inference_mode()
def test_an_image_does_not_see_its_batch(codec: Codec, pixels: torch.Tensor) -> None:
    together, alone = codec.encode(pixels), codec.encode(pixels[1:])
    assert torch.allclose(together.mean[1:], alone.mean, atol=1e-6)
    assert torch.allclose(together.logvar[1:], alone.logvar, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 15, 16), (1, 3, 16, 17), (1, 4, 8, 8)])
def test_pixels_that_do_not_fit_are_refused_with_the_remedy(codec: Codec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8; pad them"):
        codec.encode(torch.zeros(shape))


@torch.inference_mode()
def test_saving_and_loading_changes_nothing(codec: Codec, pixels: torch.Tensor, tmp_path: Path) -> None:
    codec.save(tmp_path / "m.safetensors")
    loaded = Codec.load(tmp_path / "m.safetensors")
    assert not loaded.training
    assert (loaded.config, loaded.statistics, loaded.provenance) == (codec.config, codec.statistics, codec.provenance)
    assert loaded.model_id == codec.model_id
    a, b = codec.encode(pixels), loaded.encode(pixels)
    assert torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar)
    assert torch.equal(codec.decode(a.mean), loaded.decode(a.mean))


def test_a_half_file_is_loaded_as_float32(codec: Codec, tmp_path: Path) -> None:
    codec.save(tmp_path / "m.safetensors", half=True)
    assert {t.dtype for t in Codec.load(tmp_path / "m.safetensors").state_dict().values()} == {torch.float32}


def test_a_model_is_loaded_by_path_in_either_form(model_file: Path, codec: Codec) -> None:
    assert Codec.load(model_file).model_id == Codec.load(str(model_file)).model_id == codec.model_id


@pytest.fixture
def shipped(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped models: tiny and other."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in ("tiny", "other"):
        (folder / f"{name}.safetensors").write_bytes(model_file.read_bytes())
    monkeypatch.setattr(codec_module, "_SHIPPED", (tmp_path / "absent", folder))
    return folder


def test_a_shipped_model_is_loaded_by_name(shipped: Path, codec: Codec) -> None:
    assert resolve("tiny") == shipped / "tiny.safetensors"
    assert Codec.load("tiny").model_id == codec.model_id


@pytest.mark.parametrize("name", ["photo2", "tiny.pt", "nowhere/tiny.safetensors", "tiny-1.5"])
@pytest.mark.usefixtures("shipped")
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: neither a file nor a shipped model; shipped are: other, tiny$"):
        Codec.load(name)


def test_a_folder_called_like_a_shipped_model_does_not_hide_it(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert resolve("tiny") == shipped / "tiny.safetensors"


def test_the_photo_model_is_shipped_with_its_statistics_and_its_own_results() -> None:
    photo = Codec.load("photo")
    assert photo.statistics is not None
    assert photo.model_id == Codec.load(SHIPPED).model_id
    assert photo.model_id == json.loads(SHIPPED.with_suffix(".json").read_text())["results"]["photo"]["model_id"]
    assert photo.model_id in SHIPPED.with_suffix(".md").read_text(encoding="utf-8")


CONFIGS = {
    "a patch of 0": {"patch": 0, "stem": 0},
    "a stem of 1": {"stem": 1},
    "too few widths": {"encoder_widths": [8]},
    "no widths": {"encoder_widths": [], "encoder_depths": []},
    "a negative width": {"decoder_widths": [8, -8]},
    "a width that no memory holds": {"decoder_widths": [8, 2**40]},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_makes_no_model_is_refused(model_file: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with safe_open(model_file, framework="pt") as file:
        header = json.loads(file.metadata()[KEY])
    header["config"]["backbone"] |= change
    save_file(load_file(model_file), tmp_path / "m.safetensors", metadata={KEY: dumps(header)})
    with pytest.raises(UserError, match=r"m\.safetensors"):
        Codec.load(tmp_path / "m.safetensors")
