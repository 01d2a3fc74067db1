"""Shipped models are found by name, and the one that is shipped is the one that was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from latent_codec.model import shipped
from latent_codec.model.codec import Codec
from latent_codec.model.shipped import resolve
from tests.support.data import ROOT
from tests.support.errors import refused


@pytest.fixture
def folder(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of the shipped models tiny and other."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in ("tiny", "other"):
        (folder / f"{name}.safetensors").write_bytes(model_file.read_bytes())
    monkeypatch.setattr(shipped, "FOLDERS", [tmp_path / "absent", folder])
    return folder


def test_a_shipped_model_is_loaded_by_name_even_beside_a_folder_of_that_name(
    folder: Path, codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert resolve("tiny") == folder / "tiny.safetensors" and Codec.load("tiny").model_id == codec.model_id


@pytest.mark.parametrize("name", ["photo2", "tiny.pt", "nowhere/tiny.safetensors", "tiny-1.5"])
@pytest.mark.usefixtures("folder")
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    refused(f"{name}: neither a file nor a shipped model; shipped are: other, tiny$", Codec.load, name)


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "checkpoints" / name).read_text())


def test_the_photo_model_is_the_one_that_was_measured() -> None:
    photo = Codec.load("photo")
    assert photo.model_id == "302a3de7aa04e996142bfb495225fcb9290809c75faff1344059c8126f0d1a95"
    assert photo.statistics is not None and photo.priors is not None
    ids = {kind: photo.priors.stream_id(photo.model_id, kind).hex() for kind in ("context", "factorized")}
    about = results("photo-rd.json")["about"]
    assert about["model_id"] == photo.model_id and about["stream_ids"] == ids
    assert results("photo-coding.json")["about"]["model_id"] == photo.model_id
    assert results("photo.json")["results"]["photo"]["model_id"] == photo.model_id
