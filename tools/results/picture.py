"""Show originals above their reconstructions: `python -m tools.results.picture SRC DECODED OUT.jpg`."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from latent_codec.flags import FLAGS
from latent_codec.images.sources import find_images
from latent_codec.images.write import to_pil
from latent_codec.storage.files import atomic_path


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Show squares from the middle of each image at its own resolution."""

    src: tyro.conf.Positional[str]
    """Folder that was encoded."""
    decoded: tyro.conf.Positional[Path]
    """Folder that `latent-codec decode` wrote."""
    out: tyro.conf.Positional[Path]
    columns: int = 6
    side: int = 192
    """Side of the squares in pixels."""

    def run(self) -> None:
        """Write the picture."""
        sources = find_images(self.src)[: self.columns]
        canvas = Image.new("RGB", (self.side * len(sources), 2 * self.side))
        for column, source in enumerate(sources):
            with Image.open(self.decoded / f"{source.name}.png") as decoded:
                for row, image in enumerate((to_pil(*source.read()), decoded)):
                    square = _middle(image.convert("RGB"), self.side)
                    canvas.paste(square, (column * self.side, row * self.side))
        with atomic_path(self.out) as temporary:
            canvas.save(temporary, format="JPEG", quality=92, subsampling=0)


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    tyro.cli(Picture, prog="tools.results.picture", description=__doc__, registry=FLAGS).run()
