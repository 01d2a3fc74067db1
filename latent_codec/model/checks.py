"""Check that a model can do what a command asks of it; each check raises `UserError` if it cannot."""

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec


def check_channels(codec: Codec) -> None:
    """Require a model of grey or of RGB images, the only ones that image files hold."""
    if (channels := codec.config.image_channels) not in (1, 3):
        raise UserError(f"a model of images with {channels} channels; image files need one with 1 (grey) or 3 (RGB)")


def check_unconditional(codec: Codec, what: str) -> None:
    """Require a model that is not told each image's class, because `what` could not tell it."""
    if classes := codec.config.classes:
        raise UserError(f"the model is told which of {len(classes)} classes an image is of; {what} cannot tell it")


def check_gaussian(codec: Codec) -> None:
    """Require a model whose latents have a mean and a log-variance to store."""
    if (kind := codec.config.bottleneck.kind) != "gaussian":
        raise UserError(
            f"latents in safetensors are a Gaussian's mean and log-variance, which a {kind} bottleneck does not have; "
            "write .lc files"
        )
