"""Test that the benchmark of whole commands runs them, and reports what they did."""

import json
from pathlib import Path

import pytest
import torch

from latent_codec.images.read import read_image
from tests.conftest import Draw
from tests.evaluation.conftest import encoded
from tests.support.errors import refused
from tests.support.networks import CONV, config_of, make_codec
from tools.benchmark import commands
from tools.benchmark.diffusers_loop import Loop


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i in range(3):
        draw(tmp_path / "photos" / f"{i}.png", 24, 16, seed=i)
    return tmp_path / "photos"


@pytest.mark.slow
def test_a_command_reports_its_seconds_and_its_memory(photos: Path, tmp_path: Path, model_file: Path) -> None:
    ran = commands.run("tools.encode", photos, tmp_path / "z", "--model", model_file)
    assert len(list((tmp_path / "z").glob("*.lc"))) == 3
    assert 0 <= ran.own_seconds < ran.seconds and 50e6 < ran.peak_bytes < 4e9
    assert ran.stages.keys() >= {"decode", "network", "writing"}
    refused("exit code 1", commands.run, "tools.nowhere")


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_commands_are_timed_beside_their_networks(
    photos: Path, tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    ended = commands.CommandRun(2.0, 10**8, "5 images in 1.5 s\ndecode 0.2 s, network 1.0 s, writing 0.1 s")
    monkeypatch.setattr(commands, "run", lambda *argv: ended)
    kind = {"encode": commands.Encode, "decode": commands.Decode}[command]
    kind(dir=str(photos), model=str(model_file), count=5, rounds=1, batch_size=2, out=tmp_path / "out").run()
    found = json.loads((tmp_path / "out").read_text())["results"]
    share, alone = f"share_of_{command}r_alone", found[f"{command}r alone"]
    assert len(found) == 4 and alone[share] == 1
    for row in (row for name, row in found.items() if name.startswith(f"{command} ")):
        assert row[f"{share}_after_start"] == pytest.approx(5 / 1.5 / alone["images_per_second"])
        assert row["seconds_in_stages"] == {"decode": 0.2, "network": 1.0, "writing": 0.1}


def test_the_plain_loop_draws_from_the_same_posterior(photos: Path, tmp_path: Path) -> None:
    codec = make_codec(config_of(CONV))
    codec.backbone.state_dict()["quant_conv.bias"][4:] = -29.0  # next to no variance: what is drawn is the mean
    codec.save(tmp_path / "conv.safetensors")
    with torch.random.fork_rng():
        Loop(src=photos, dst=tmp_path / "z", weights=tmp_path / "conv.safetensors", batch_size=2, workers=0).run()
    for name in ("0.png", "2.png"):
        z = torch.load(tmp_path / "z" / f"{name}.pt", weights_only=True)
        expected = encoded(codec, read_image(photos / name).pixels).mean[0]
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-3)
