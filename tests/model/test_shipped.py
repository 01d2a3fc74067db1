"""Test that the recorded results and the card are those of the shipped model."""

import json
from typing import Any

import pytest

from latent_codec.model.codec import Codec
from tests.support.data import ROOT

CHECKPOINTS = ROOT / "checkpoints"
CARD = CHECKPOINTS / "photo.md"


def results(name: str) -> dict[str, Any]:
    return json.loads((CHECKPOINTS / name).read_text())


@pytest.fixture(scope="module")
def photo() -> Codec:
    return Codec.load("photo")


def test_results_and_card_are_the_models_own(photo: Codec) -> None:
    assert photo.priors is not None
    ids = {kind: photo.priors.stream_id(photo.model_id, kind).hex() for kind in ("context", "factorized")}
    rd = results("photo-rd.json")["about"]
    assert rd["model_id"] == photo.model_id and rd["stream_ids"] == ids
    assert results("photo-coding.json")["about"]["model_id"] == photo.model_id
    assert results("photo.json")["results"]["photo"]["model_id"] == photo.model_id
    card = CARD.read_text()
    assert all(text in card for text in (photo.model_id, *ids.values()))


def test_files_stay_within_what_the_prior_says() -> None:
    """At most 1.01 times the ideal code length and 64 bytes, and ahead of JPEG between 0.25 and 0.8 bits per pixel."""
    found = results("photo-rd.json")
    for image in found["images"]:
        for row in image["rows"]:
            if row["ideal_bpp"] is not None:
                assert row["bytes"] <= 1.01 * row["ideal_bpp"] * image["pixels"] / 8 + 64
    assert all(gain["db"] > 0 for gain in found["against"]["JPEG"]["psnr_gains"])
    assert min(results("photo-coding.json")["results"]["files"]["context_saves"].values()) >= 0.18
