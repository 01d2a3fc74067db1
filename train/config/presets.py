"""Whole configurations by name. The command line overrides single fields."""

import dataclasses
from collections.abc import Callable

from latent_codec.model.config import (
    BernoulliConfig,
    CodecConfig,
    ConvConfig,
    DiagonalGaussianConfig,
    DiscretizedLogisticConfig,
    FiniteScalarConfig,
    GaussianConfig,
    IdentityConfig,
    LinearConfig,
    LiteConfig,
    MLPConfig,
    VectorQuantizerConfig,
)
from train.config.vae import AdversarialConfig, CodebookConfig, ELBOConfig, IWAEConfig, JointConfig, TrainConfig


def photo() -> TrainConfig:
    """The shipped codec's kind: lite, f8, 32 channels, a fixed rate-distortion trade-off, closed-form start."""
    return TrainConfig(
        codec=CodecConfig(
            image_channels=3,
            latent_channels=32,
            backbone=LiteConfig(
                patch=8,
                stem=4,
                encoder_widths=(64, 192),
                encoder_depths=(1, 2),
                decoder_widths=(64, 192),
                decoder_depths=(2, 3),
                overlap=4,
            ),
            bottleneck=DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
            likelihood=GaussianConfig(scale="fixed", sigma=0.08),
        ),
        objective=ELBOConfig(
            beta=1.0,
            warmup="none",
            warmup_steps=0,
            free_bits=0.0,
            mode_weight=1.0,
            mode_steps=(0.25, 6.0),
            lpips_weight=0.0,
            lpips_net="alex",
        ),
        closed_form=True,
        closed_form_crops=16_384,
        mean_start=False,
        steps=10_000,
        batch_size=8,
        accumulation=1,
        crop=128,
        flip=True,
        learning_rate=4e-4,
        lr_warmup_steps=200,
        lr_schedule="cosine",
        adam_eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=100_000.0,
        ema_decay=0.999,
        channels_last=True,
        compile=False,
        seed=0,
        log_every=100,
        eval_every=1_000,
        eval_crop=256,
        save_every=500,
        keep_checkpoints=2,
        max_skipped=25,
    )


def photo_joint() -> TrainConfig:
    """The shipped codec's last phase: the encoder learns what the context prior charges, at all rates at once."""
    base = photo()
    objective = JointConfig(
        noise_steps=(0.35, 4.0),
        mode_weight=1.0,
        prior_groups=(1, 3, 8),
        prior_levels=(3, 1, 1),
        prior_width=96,
        prior_learning_rate=5e-4,
    )
    return dataclasses.replace(base, objective=objective, closed_form=False, learning_rate=1e-4)


def pca() -> TrainConfig:
    """Principal components of 8x8 patches, from their moments alone: the floor that any VAE must beat."""
    base = photo()
    # Noise of half a grey level: no shrinkage to speak of, and every component is kept.
    likelihood = GaussianConfig(scale="fixed", sigma=1 / 255)
    codec = dataclasses.replace(base.codec, backbone=LinearConfig(patch=8), likelihood=likelihood)
    return dataclasses.replace(base, codec=codec, closed_form_crops=None, steps=0)


def conv() -> TrainConfig:
    """A small AutoencoderKL (f8, 4 channels) with LPIPS, from random weights: KL warm-up."""
    base = photo()
    codec = dataclasses.replace(
        base.codec,
        latent_channels=4,
        backbone=ConvConfig(
            widths=(64, 128, 256, 256),
            layers_per_block=2,
            groups=32,
            mid_attention=True,
            quant_conv=True,
            post_quant_conv=True,
        ),
        likelihood=GaussianConfig(scale="fixed", sigma=0.2),
    )
    objective = dataclasses.replace(base.objective, warmup="linear", warmup_steps=5_000, lpips_weight=5.0)
    return dataclasses.replace(
        base,
        codec=codec,
        objective=objective,
        closed_form=False,
        steps=100_000,
        batch_size=32,
        crop=256,
        learning_rate=1e-4,
        lr_warmup_steps=1_000,
    )


def kl_f8c4() -> TrainConfig:
    """An AutoencoderKL of half the usual width (f8, 4 channels) for latent diffusion: LPIPS and an adversary.

    The trade-off of latent diffusion's own (Rombach et al. 2022, appendix G), there an L1 of 1 nat for each value of
    each pixel, LPIPS once for each of the three values, and 1e-6 of the KL: a Gaussian of sigma 1/4 pulls as hard as
    that L1 where the error is 1/16, which is what such a model ends at.
    """
    base = conv()
    objective = dataclasses.replace(
        base.objective,
        beta=1e-6,
        warmup="none",
        warmup_steps=0,
        mode_weight=0.0,  # at this beta the posterior is so narrow that a sample is the mode
        mode_steps=None,
        lpips_weight=3.0,
        adversarial=AdversarialConfig(
            adversarial_start=10_000,
            adversarial_weight=0.5,
            adaptive=True,
            most_weight=1e6,
            discriminator_width=64,
            discriminator_layers=3,
        ),
    )
    codec = dataclasses.replace(base.codec, likelihood=GaussianConfig(scale="fixed", sigma=0.25))
    return dataclasses.replace(base, codec=codec, objective=objective, steps=24_000)


def kl_f8c16() -> TrainConfig:
    """The same with 16 latent channels."""
    base = kl_f8c4()
    return dataclasses.replace(base, codec=dataclasses.replace(base.codec, latent_channels=16))


def mnist_vae() -> TrainConfig:
    """The MLP VAE of Burda et al. 2016 (784-200-200-50, tanh, Bernoulli); 3,280 passes over MNIST's 60,000 images."""
    base = photo()
    codec = CodecConfig(
        image_channels=1,
        latent_channels=50,
        backbone=MLPConfig(side=28, encoder_widths=(200, 200), decoder_widths=(200, 200), activation="tanh"),
        bottleneck=base.codec.bottleneck,
        likelihood=BernoulliConfig(pixels="drawn"),
    )
    return dataclasses.replace(
        base,
        codec=codec,
        objective=dataclasses.replace(base.objective, mode_weight=0.0, mode_steps=None),
        closed_form=False,
        mean_start=True,
        steps=3_280 * 3_000,
        batch_size=20,
        crop=28,
        flip=False,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        lr_schedule="stages",
        adam_eps=1e-4,
        max_grad_norm=None,
        ema_decay=0.0,
        channels_last=False,
        log_every=3_000,
        eval_every=30_000,
        eval_crop=28,
        save_every=30_000,
    )


def mnist_iwae() -> TrainConfig:
    """The same network trained with the importance-weighted bound of 50 samples (Burda et al. 2016)."""
    return dataclasses.replace(mnist_vae(), objective=IWAEConfig(samples=50))


def mnist_cvae() -> TrainConfig:
    """An MLP VAE told which digit it sees; few latents, so that draws from the prior are good digits. 10 passes."""
    base = mnist_vae()
    widths = (500, 500)
    backbone = MLPConfig(side=28, encoder_widths=widths, decoder_widths=widths, activation="relu")
    codec = dataclasses.replace(base.codec, latent_channels=4, backbone=backbone, classes=tuple("0123456789"))
    return dataclasses.replace(
        base,
        codec=codec,
        steps=6_000,
        batch_size=100,
        learning_rate=2e-3,
        lr_schedule="cosine",
        log_every=500,
        eval_every=3_000,
        save_every=1_000,
    )


def autoencoder() -> TrainConfig:
    """A deterministic autoencoder of the shipped codec's shape: no posterior, no rate."""
    base = photo()
    codec = dataclasses.replace(base.codec, bottleneck=IdentityConfig())
    return dataclasses.replace(base, codec=codec, objective=dataclasses.replace(base.objective, mode_weight=0.0))


def vqvae() -> TrainConfig:
    """A VQ-VAE: one of 512 codes for each 4x4 pixels, averaged, the dead ones revived."""
    base = photo()
    codec = dataclasses.replace(
        base.codec,
        latent_channels=16,
        backbone=LiteConfig(
            patch=4,
            stem=4,
            encoder_widths=(64,),
            encoder_depths=(2,),
            decoder_widths=(64,),
            decoder_depths=(3,),
        ),
        bottleneck=VectorQuantizerConfig(codes=512),
    )
    codebook = CodebookConfig(commitment=20.0, codebook="ema", codebook_decay=0.99, revive_below=0.25, revive_every=50)
    objective = dataclasses.replace(base.objective, mode_weight=0.0, codebook=codebook)
    return dataclasses.replace(base, codec=codec, objective=objective, batch_size=16, crop=64)


def fsq() -> TrainConfig:
    """Finite scalar quantisation: one of 8 x 5 x 5 x 5 codes for each 4x4 pixels, nothing to train in them."""
    base = vqvae()
    codec = dataclasses.replace(base.codec, latent_channels=4, bottleneck=FiniteScalarConfig(levels=(8, 5, 5, 5)))
    return dataclasses.replace(base, codec=codec, objective=dataclasses.replace(base.objective, codebook=None))


def logistic() -> TrainConfig:
    """Probabilities of whole pixel values, for bits/dim of 32x32 crops: logistics, one or (--components) several."""
    base = photo()
    codec = dataclasses.replace(
        base.codec,
        latent_channels=16,
        backbone=LiteConfig(
            patch=4,
            stem=4,
            encoder_widths=(64,),
            encoder_depths=(2,),
            decoder_widths=(64,),
            decoder_depths=(2,),
        ),
        likelihood=DiscretizedLogisticConfig(components=1),
    )
    objective = dataclasses.replace(base.objective, mode_weight=0.0, warmup="linear", warmup_steps=500)
    return dataclasses.replace(
        base, codec=codec, objective=objective, closed_form=False, batch_size=16, crop=32, eval_crop=32
    )


_ALL: tuple[Callable[[], TrainConfig], ...] = (
    photo,
    photo_joint,
    pca,
    conv,
    kl_f8c4,
    kl_f8c16,
    autoencoder,
    vqvae,
    fsq,
    logistic,
    mnist_vae,
    mnist_iwae,
    mnist_cvae,
)
PRESETS = {preset.__name__: preset for preset in _ALL}
