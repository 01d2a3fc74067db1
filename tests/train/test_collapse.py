"""Test that a provoked collapse is reported once, and that a sound run reports nothing."""

import dataclasses
import math
from pathlib import Path

import pytest

from tests.support.checkpoints import log_lines
from tests.support.run import flags, run, write_digits
from train.collapse import signs_of_collapse
from train.config.presets import autoencoder, mnist_iwae, mnist_vae

SOUND = {"kl_per_latent": 0.5, "active_channels": 20.0, "clamped": 0.0, "shuffle_cost": 50.0}
TOY = flags(
    "mnist_vae --encoder-widths 16 --decoder-widths 16 --latent-channels 4 --batch-size 8 --steps 120 --save-every 60 "
    "--log-every 120 --eval-every 60 --val-images 6 --lr-schedule cosine --learning-rate 0.01 --data"
)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kl_per_latent": 0.001}, "kl_vanished"),
        ({"active_channels": 12.0}, "channels_inactive"),
        ({"clamped": 0.2}, "logvar_clamped"),
        ({"shuffle_cost": 0.5}, "latents_ignored"),
    ],
)
def test_each_sign_is_named_alone(change: dict[str, float], name: str) -> None:
    for preset in (mnist_vae(), mnist_iwae()):
        assert list(signs_of_collapse(SOUND, preset, 10)) == []
        assert [sign.name for sign in signs_of_collapse(SOUND | change, preset, 10)] == [name]


def test_warm_ups_unknown_costs_and_constant_kls_are_no_signs() -> None:
    config = mnist_vae()
    objective = dataclasses.replace(config.objective, warmup="linear", warmup_steps=50)  # pyright: ignore
    config = dataclasses.replace(config, objective=objective)
    dead = SOUND | {"kl_per_latent": 0.0}
    assert [len(list(signs_of_collapse(dead, config, step))) for step in (49, 50)] == [0, 1]
    assert list(signs_of_collapse(SOUND | {"shuffle_cost": math.nan}, config, 50)) == []
    assert list(signs_of_collapse(dead, autoencoder(), 1000)) == []


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Choose digits whose class is worth some 20 nats: more than the bit it takes, less than a hundred times that."""
    return [*TOY, str(write_digits(tmp_path_factory.mktemp("monitored") / "raw", contrast=40))]


def warned(out: Path) -> list[str]:
    return [line["name"] for line in log_lines(out, "warning")]


@pytest.mark.slow
def test_a_large_beta_collapses_and_is_reported_once_also_when_resumed(argv: list[str], tmp_path: Path) -> None:
    argv = [*argv, "--beta", "100"]
    text = run(argv, tmp_path / "run")
    assert sorted(warned(tmp_path / "run")) == ["channels_inactive", "kl_vanished", "latents_ignored"]
    assert text.count("kl_vanished") == 1
    assert run([*argv, "--steps", "180"], tmp_path / "run").count("kl_vanished") == 1  # what both printed
    assert len(warned(tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("change", ["--beta 1", "--beta 100 --free-bits 2"])
def test_free_bits_prevent_it_and_a_sound_run_reports_nothing(argv: list[str], tmp_path: Path, change: str) -> None:
    text = run([*argv, *flags(change)], tmp_path / "run")
    assert warned(tmp_path / "run") == [] and "warning" not in text
    assert log_lines(tmp_path / "run", "eval")[-1]["shuffle_cost"] > 10
