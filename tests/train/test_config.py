"""Test that contradictory settings of objectives are refused before any work."""

import dataclasses
from typing import Any

import pytest

from tests.support.errors import refused
from train.config.presets import PRESETS, autoencoder, fsq, kl_f8c4, mnist_iwae, mnist_vae, photo, photo_joint, vqvae
from train.config.vae import TrainConfig, check


def changed(config: TrainConfig, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, **fields))


def joint(**fields: Any) -> TrainConfig:
    return changed(photo_joint(), **fields)


def codebook(**fields: Any) -> TrainConfig:
    return changed(vqvae(), codebook=dataclasses.replace(vqvae().objective.codebook, **fields))  # pyright: ignore


def adversarial(**fields: Any) -> TrainConfig:
    return changed(kl_f8c4(), adversarial=dataclasses.replace(kl_f8c4().objective.adversarial, **fields))  # pyright: ignore


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dataclasses.replace(mnist_iwae(), codec=autoencoder().codec),
            "samples of a gaussian posterior, not of identity",
        ),
        (changed(mnist_iwae(), samples=0), "samples is 0; it must be at least 1"),
        (changed(mnist_iwae(), gradient_samples=51), "gradient_samples is 51; it must be from 0 to the 50 samples"),
        (dataclasses.replace(mnist_vae(), lr_warmup_steps=5), "lr_warmup_steps is 5; stages have no warm-up"),
        (changed(mnist_vae(), lpips_weight=1.0), "LPIPS compares RGB images, and the model's have 1 channels"),
        (joint(noise_steps=(2.0, 1.0)), "noise_steps"),
        (joint(mode_weight=-1.0), "mode_weight"),
        (joint(prior_groups=(4, 28)), "leave some of the 32 channels"),
        (joint(prior_levels=(7,)), "levels"),
        (joint(prior_width=113), "prior_width"),
        (joint(prior_learning_rate=0.0), "prior_learning_rate"),
        (joint(lpips_weight=-1.0), "lpips_weight is -1.0; it must be at least 0"),
        (adversarial(adversarial_weight=-1.0), "adversarial_weight"),
        (adversarial(adversarial_start=-1), "adversarial_start"),
        (adversarial(adversarial_start=24_000), "not below steps 24000"),
        (adversarial(discriminator_width=48), "multiple of 32"),
        (adversarial(discriminator_layers=8), "crop 256 is too small"),
        (dataclasses.replace(kl_f8c4(), compile=True), "compile"),
        (codebook(commitment=-1.0), "commitment is -1.0"),
        (codebook(revive_below=-1.0), "revive_below is -1.0"),
        (codebook(revive_every=0), "revive_every is 0"),
        (codebook(codebook_decay=1.0), "codebook_decay is 1.0"),
        (changed(vqvae(), codebook=None), "a vq bottleneck and codebook None"),
        (changed(photo(), codebook=vqvae().objective.codebook), "a gaussian bottleneck and codebook"),  # pyright: ignore
        (changed(fsq(), codebook=vqvae().objective.codebook), "a fsq bottleneck and codebook"),  # pyright: ignore
        (changed(autoencoder(), free_bits=0.1), "free_bits is 0.1, .* not identity; set it to 0.0"),
        (changed(autoencoder(), mode_weight=1.0), "mode_weight is 1.0"),
        (changed(fsq(), warmup="linear"), "warmup is linear, .* set it to none"),
    ],
)
def test_contradictory_settings_are_refused(config: TrainConfig, message: str) -> None:
    refused(message, check, config)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_presets_are_sound(preset: Any) -> None:
    check(preset())
