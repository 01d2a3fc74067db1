"""List what others published of their codecs and autoencoders, with its source; nothing is measured here."""

from typing import NamedTuple

COMPRESSAI = "CompressAI, results/image/kodak"


class PublishedCurve(NamedTuple):
    """Hold a codec's curve on Kodak's 24 images of 768x512: PSNR of RGB in dB, mean over images."""

    name: str
    source: str
    points: tuple[tuple[float, float], ...]
    """(bits per pixel, PSNR), by ascending rate."""


CURVES = (
    PublishedCurve(
        name="bmshj2018-factorized",
        source=COMPRESSAI,
        points=(
            *((0.123, 26.91), (0.189, 28.22), (0.288, 29.62), (0.440, 31.28)),
            *((0.648, 32.96), (0.967, 35.38), (1.351, 37.40), (1.833, 39.62)),
        ),
    ),
    PublishedCurve(
        name="bmshj2018-hyperprior",
        source=COMPRESSAI,
        points=(
            *((0.131, 27.58), (0.209, 29.20), (0.320, 30.97), (0.478, 32.84)),
            *((0.669, 34.53), (0.939, 36.74), (1.259, 38.58), (1.660, 40.56)),
        ),
    ),
    PublishedCurve(
        name="mbt2018-mean",
        source=COMPRESSAI,
        points=(
            *((0.124, 27.70), (0.198, 29.36), (0.307, 31.13), (0.461, 32.95)),
            *((0.662, 34.97), (0.914, 36.91), (1.234, 38.84), (1.619, 40.63)),
        ),
    ),
    PublishedCurve(
        name="cheng2020-anchor",
        source=COMPRESSAI,
        points=((0.120, 28.58), (0.184, 29.97), (0.271, 31.34), (0.417, 33.39), (0.595, 35.12), (0.806, 36.70)),
    ),
    PublishedCurve(
        name="ELIC",
        source="He et al. 2022, their paper",
        points=((0.124, 29.11), (0.197, 30.70), (0.334, 32.78), (0.491, 34.58), (0.704, 36.49), (0.857, 37.62)),
    ),
    PublishedCurve(
        name="VTM",
        source=COMPRESSAI,
        points=((0.048, 26.15), (0.113, 28.49), (0.246, 31.20), (0.491, 34.26), (0.875, 37.42), (1.431, 40.42)),
    ),
    PublishedCurve(
        name="AV1",
        source=COMPRESSAI,
        points=((0.056, 25.56), (0.110, 27.56), (0.246, 30.44), (0.499, 33.65), (0.909, 36.99), (1.415, 39.81)),
    ),
)


class PublishedStage(NamedTuple):
    """Hold the quality of a diffusion model's autoencoder as its authors measured it."""

    name: str
    factor: int
    channels: int
    set: str
    psnr: float
    ssim: float
    lpips: float
    sd_shape: bool
    """True if its networks are Stable Diffusion's except for the latents' channels, so that `costs` can count them."""


STAGES = (
    PublishedStage(
        name="SD ft-MSE", factor=8, channels=4, set="ImageNet 256", psnr=26.91, ssim=0.772, lpips=0.130, sd_shape=True
    ),
    PublishedStage(
        name="SDXL", factor=8, channels=4, set="ImageNet 256", psnr=27.38, ssim=0.794, lpips=0.122, sd_shape=True
    ),
    PublishedStage(
        name="FLUX.1", factor=8, channels=16, set="ImageNet 256", psnr=32.87, ssim=0.924, lpips=0.045, sd_shape=True
    ),
    PublishedStage(
        name="DC-AE f64c128",
        factor=64,
        channels=128,
        set="ImageNet 512",
        psnr=26.15,
        ssim=0.710,
        lpips=0.080,
        sd_shape=False,
    ),
)
