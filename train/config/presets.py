"""Define the named configurations of `train.vae`; the command line overrides single fields."""

from collections.abc import Callable
from dataclasses import replace

from latent_codec.model import config
from train.config.vae import AdversarialConfig, CodebookConfig, ELBOConfig, IWAEConfig, JointConfig, TrainConfig

_PHOTO_LITE = config.LiteConfig(
    patch=8,
    stem=4,
    encoder_widths=(64, 192),
    encoder_depths=(1, 2),
    decoder_widths=(64, 192),
    decoder_depths=(2, 3),
    overlap=4,
)
_PHOTO_CODEC = config.CodecConfig(
    image_channels=3,
    latent_channels=32,
    backbone=_PHOTO_LITE,
    bottleneck=config.DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
    likelihood=config.GaussianConfig(scale="fixed", sigma=0.08),
)
_PHOTO_OBJECTIVE = ELBOConfig(
    beta=1.0,
    warmup="none",
    warmup_steps=0,
    free_bits=0.0,
    mode_weight=1.0,
    mode_steps=(0.25, 6.0),
    lpips_weight=0.0,
    lpips_net="alex",
)
_PATCH_4 = config.LiteConfig(
    patch=4, stem=4, encoder_widths=(64,), encoder_depths=(2,), decoder_widths=(64,), decoder_depths=(3,)
)


def photo() -> TrainConfig:
    """Train the shipped kind of codec: lite, f8, 32 channels, fixed rate-distortion trade-off, closed-form start."""
    return TrainConfig(
        codec=_PHOTO_CODEC,
        objective=_PHOTO_OBJECTIVE,
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
    """Train a codec jointly with its context prior at all rates at once, the shipped codec's last phase."""
    objective = JointConfig(
        noise_steps=(0.35, 4.0),
        mode_weight=1.0,
        prior_groups=(1, 3, 8),
        prior_levels=(3, 1, 1),
        prior_width=96,
        prior_learning_rate=5e-4,
    )
    return replace(photo(), objective=objective, closed_form=False, learning_rate=1e-4)


def nested() -> TrainConfig:
    """Grow a codec of 192 channels, of which any prefix is a latent of its own, from `photo` in closed form."""
    backbone = replace(_PHOTO_LITE, decoder_depths=(3, 5))
    codec = replace(
        _PHOTO_CODEC,
        latent_channels=192,
        backbone=backbone,
        bottleneck=config.DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0, logvar_channels=32),
        prefixes=(4, 8, 16, 32, 64, 128, 192),
    )
    return replace(photo(), codec=codec, closed_form=False, steps=0)


def nested_joint() -> TrainConfig:
    """Train the codec of `nested` jointly with its context prior, at all rates and prefixes at once."""
    objective = JointConfig(
        noise_steps=(0.1, 5.6),
        fine_weight=1.5,
        prefix_share=0.5,
        mode_weight=1.0,
        prior_groups=(1, 3, 8, 20, 32, 64),
        prior_levels=(3, 1, 1),
        prior_width=96,
        prior_learning_rate=1.5e-3,
    )
    return replace(nested(), objective=objective, steps=20_000, learning_rate=3e-4)


def pca() -> TrainConfig:
    """Compute the principal components of 8x8 patches from their moments: a lower bound for any VAE."""
    # Noise of half a grey level shrinks components by next to nothing and keeps all of them.
    likelihood = config.GaussianConfig(scale="fixed", sigma=1 / 255)
    codec = replace(_PHOTO_CODEC, backbone=config.LinearConfig(patch=8), likelihood=likelihood)
    return replace(photo(), codec=codec, closed_form_crops=None, steps=0)


def conv() -> TrainConfig:
    """Train a small AutoencoderKL (f8, 4 channels) with LPIPS and KL warm-up, from random weights."""
    backbone = config.ConvConfig(
        widths=(64, 128, 256, 256),
        layers_per_block=2,
        groups=32,
        mid_attention=True,
        quant_conv=True,
        post_quant_conv=True,
    )
    likelihood = config.GaussianConfig(scale="fixed", sigma=0.2)
    return replace(
        photo(),
        codec=replace(_PHOTO_CODEC, latent_channels=4, backbone=backbone, likelihood=likelihood),
        objective=replace(_PHOTO_OBJECTIVE, warmup="linear", warmup_steps=5_000, lpips_weight=5.0),
        closed_form=False,
        steps=100_000,
        batch_size=32,
        crop=256,
        learning_rate=1e-4,
        lr_warmup_steps=1_000,
    )


def kl_f8c4() -> TrainConfig:
    """Train an AutoencoderKL of half the usual width (f8c4) for latent diffusion, with LPIPS and adversarial loss.

    It keeps the trade-off of latent diffusion (Rombach et al. 2022, appendix G): there, an L1 of 1 nat per value,
    LPIPS once for each of a pixel's three values, and 1e-6 of the KL. A Gaussian of sigma 1/4 has the same gradient as
    that L1 at an error of 1/16, which is where such a model ends.
    """
    base = conv()
    objective = replace(
        _PHOTO_OBJECTIVE,
        beta=1e-6,
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
    codec = replace(base.codec, likelihood=config.GaussianConfig(scale="fixed", sigma=0.25))
    return replace(base, codec=codec, objective=objective, steps=24_000)


def kl_f8c16() -> TrainConfig:
    """Train the AutoencoderKL of `kl_f8c4` with 16 latent channels."""
    base = kl_f8c4()
    return replace(base, codec=replace(base.codec, latent_channels=16))


def autoencoder() -> TrainConfig:
    """Train a deterministic autoencoder of the shipped codec's shape: no posterior, no rate."""
    codec = replace(_PHOTO_CODEC, bottleneck=config.IdentityConfig())
    return replace(photo(), codec=codec, objective=replace(_PHOTO_OBJECTIVE, mode_weight=0.0))


def vqvae() -> TrainConfig:
    """Train a VQ-VAE: one of 512 codes for each 4x4 pixels, by running averages; unused codes are replaced."""
    bottleneck = config.VectorQuantizerConfig(codes=512)
    codebook = CodebookConfig(commitment=20.0, codebook="ema", codebook_decay=0.99, revive_below=0.25, revive_every=50)
    return replace(
        photo(),
        codec=replace(_PHOTO_CODEC, latent_channels=16, backbone=_PATCH_4, bottleneck=bottleneck),
        objective=replace(_PHOTO_OBJECTIVE, mode_weight=0.0, codebook=codebook),
        batch_size=16,
        crop=64,
    )


def fsq() -> TrainConfig:
    """Train a finite scalar quantiser: one of 8 x 5 x 5 x 5 codes for each 4x4 pixels, without a codebook to train."""
    base = vqvae()
    codec = replace(base.codec, latent_channels=4, bottleneck=config.FiniteScalarConfig(levels=(8, 5, 5, 5)))
    return replace(base, codec=codec, objective=replace(_PHOTO_OBJECTIVE, mode_weight=0.0))


def logistic() -> TrainConfig:
    """Train a discretised logistic likelihood, for bits/dim of 32x32 crops; --components makes it a mixture."""
    backbone = replace(_PATCH_4, decoder_depths=(2,))
    likelihood = config.DiscretizedLogisticConfig(components=1)
    return replace(
        photo(),
        codec=replace(_PHOTO_CODEC, latent_channels=16, backbone=backbone, likelihood=likelihood),
        objective=replace(_PHOTO_OBJECTIVE, mode_weight=0.0, warmup="linear", warmup_steps=500),
        closed_form=False,
        batch_size=16,
        crop=32,
        eval_crop=32,
    )


def mnist_vae() -> TrainConfig:
    """Train the MLP VAE of Burda et al. 2016 (784-200-200-50, tanh, Bernoulli): 3,280 epochs of MNIST."""
    codec = config.CodecConfig(
        image_channels=1,
        latent_channels=50,
        backbone=config.MLPConfig(side=28, encoder_widths=(200, 200), decoder_widths=(200, 200), activation="tanh"),
        bottleneck=_PHOTO_CODEC.bottleneck,
        likelihood=config.BernoulliConfig(pixels="drawn"),
    )
    return replace(
        photo(),
        codec=codec,
        objective=replace(_PHOTO_OBJECTIVE, mode_weight=0.0, mode_steps=None),
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
    """Train the network of `mnist_vae` with the importance-weighted bound of 50 samples (Burda et al. 2016)."""
    return replace(mnist_vae(), objective=IWAEConfig(samples=50))


def mnist_cvae() -> TrainConfig:
    """Train an MLP VAE conditioned on the digit, with 4 latent channels so that prior samples look good; 10 epochs."""
    base, widths = mnist_vae(), (500, 500)
    backbone = config.MLPConfig(side=28, encoder_widths=widths, decoder_widths=widths, activation="relu")
    return replace(
        base,
        codec=replace(base.codec, latent_channels=4, backbone=backbone, classes=tuple("0123456789")),
        steps=6_000,
        batch_size=100,
        learning_rate=2e-3,
        lr_schedule="cosine",
        log_every=500,
        eval_every=3_000,
        save_every=1_000,
    )


_PHOTOS = (photo, photo_joint, nested, nested_joint, pca, conv, kl_f8c4, kl_f8c16, autoencoder, vqvae, fsq, logistic)
_DIGITS = (mnist_vae, mnist_iwae, mnist_cvae)
PRESETS: dict[str, Callable[[], TrainConfig]] = {preset.__name__: preset for preset in _PHOTOS + _DIGITS}
