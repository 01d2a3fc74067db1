"""The codecs that ours is measured against, as Pillow drives them; a grey image is saved as grey by each."""

import io
from typing import Any, NamedTuple

from PIL import Image, features

from latent_codec.errors import UserError


class Peer(NamedTuple):
    """One codec and the qualities that draw its curve."""

    name: str
    format: str
    """Pillow's name of it."""
    library: str
    """Pillow's name of the library below, to ask for its presence and version."""
    qualities: tuple[int, ...]
    options: dict[str, Any]
    grey_options: dict[str, Any]
    """What replaces `options` for a grey image."""

    def settings(self) -> str:
        """All of them in words, with the library's version."""
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"Pillow {self.format}: {shown}; {self.library} {features.version(self.library)}"


PEERS = (
    Peer(
        name="JPEG",
        format="JPEG",
        library="jpg",
        qualities=(5, 10, 15, 20, 30, 40, 50, 60, 75, 85, 90),
        options={"subsampling": "4:2:0", "optimize": True},
        grey_options={"optimize": True},
    ),
    Peer(
        name="WebP",
        format="WEBP",
        library="webp",
        qualities=(1, 5, 10, 20, 30, 40, 50, 60, 75, 85, 90),
        options={"method": 6},
        grey_options={"method": 6},
    ),
    Peer(
        name="AVIF",
        format="AVIF",
        library="avif",
        qualities=(10, 20, 30, 40, 45, 50, 55, 60, 70, 80),
        # Tiles and threads would change the bytes with the machine and never for the better.
        options={"subsampling": "4:2:0", "speed": 6, "autotiling": False, "max_threads": 1},
        grey_options={"subsampling": "4:0:0", "speed": 6, "autotiling": False, "max_threads": 1},
    ),
)


def available() -> list[Peer]:
    """Those that this Pillow was built with."""
    return [peer for peer in PEERS if features.check(peer.library)]


def encode(peer: Peer, image: Image.Image, quality: int) -> bytes:
    """The whole file for an image of mode L or RGB; raises `UserError` if the codec refuses it."""
    file = io.BytesIO()
    options = peer.grey_options if image.mode == "L" else peer.options
    try:
        image.save(file, format=peer.format, quality=quality, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{image.width}x{image.height} pixels cannot be saved as {peer.name}: {error}") from error
    return file.getvalue()


def decode(peer: Peer, data: bytes, mode: str) -> Image.Image:
    """The image in `mode`, L or RGB, from its file."""
    with Image.open(io.BytesIO(data), formats=[peer.format]) as image:
        return image.convert(mode)
